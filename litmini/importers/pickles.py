"""Files that torch saved: opened as tensors only (`weights_only`), and read one tensor at a time."""

import io
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from litmini.errors import UserError
from litmini.files import check_no_pointer
from litmini.models import FAMILIES

MAX_READS = 2_000_000  # of a pickle's opcodes and their arguments, in a file of torch before 1.6: seconds
PICKLE_BYTES, PICKLE_BYTES_PER_RECORD = 2**20, 2**12  # most of the pickle in an archive; torch writes some 200 a tensor


class Pickle:
    """The tensors of a file by name. None of them is read, or mapped, until it is asked for.

    Raises:
        UserError: it is missing or damaged, or holds anything but tensors by name.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"weight file not found: {file}")
        self.file = file
        self.records: dict[int, zipfile.ZipInfo] = {}
        state = self._open()
        if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(state[n], Tensor) for n in state):
            raise UserError(f"{file} holds no tensors by name; expected a state dict of {', '.join(sorted(FAMILIES))}.")
        if unexpected := [
            name for name, t in state.items() if t.layout != torch.strided or t.is_quantized or t.is_neg()
        ]:
            raise UserError(f"{file}: {unexpected[0]} is sparse, quantised or a negative view; plain tensors are read.")
        if without := [n for n, t in state.items() if t.is_meta and t.untyped_storage()._checkpoint_offset is None]:
            raise UserError(f"{file}: {without[0]} has no values: it was saved from the meta device.")
        self.tensors: dict[str, Tensor] = state

    def get(self, name: str, meta: bool = False) -> Tensor:
        """Return a tensor; on the meta device, only its shape and dtype.

        Raises:
            UserError: the file ends before it does, or is damaged.
        """
        like = self.tensors[name]
        if meta:
            return torch.empty(like.shape, dtype=like.dtype, device="meta")
        offset = like.untyped_storage()._checkpoint_offset
        if offset is None:
            return like
        record = self.records[offset]
        span = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        values = torch.empty(span, dtype=like.dtype)
        content: Any = values.view(torch.uint8).numpy()
        start = int(like.storage_offset()) * like.element_size()
        n_read = 0
        try:
            if start + len(content) > record.file_size:
                raise UserError(f"weight file {self.file} is damaged: {record.filename} is shorter than {name}.")
            with self._open_record(record, start) as opened:
                while n_read < len(content) and (more := opened.readinto(content[n_read:])):
                    n_read += more
        except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
            raise UserError(f"weight file {self.file} is damaged: {record.filename} ({error}). Get it again.") from None
        if n_read < len(content):
            raise UserError(f"weight file {self.file} is truncated: it ends within {name}. Get it again.")
        return values.as_strided(like.shape, like.stride())

    @contextmanager
    def _open_record(self, record: zipfile.ZipInfo, start: int) -> Iterator[Any]:
        """Open a record of the archive at its byte `start`, to be read with `readinto`."""
        if record.compress_type != zipfile.ZIP_STORED:
            with zipfile.ZipFile(self.file) as archive, archive.open(record) as unpacked:
                unpacked.seek(start)
                yield unpacked
            return
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(record.header_offset)
            name, extra = struct.unpack("<26xHH", opened.read(30))
            if opened.read(name) != record.orig_filename.encode("utf-8" if record.flag_bits & 0x800 else "cp437"):
                raise zipfile.BadZipFile("its place in the directory is that of another")
            opened.seek(record.header_offset + 30 + name + extra + start)
            yield opened

    def _open(self) -> Any:
        """Return what is pickled in the file; tensors of an archive say which record holds their values."""
        file = self.file
        try:
            with file.open("rb") as opened:
                if opened.read(4) == b"PK\x03\x04":
                    with FakeTensorMode():
                        return torch.load(self._without_values(), map_location="meta", weights_only=True)
                opened.seek(0)  # of torch before 1.6: in memory as a whole
                bounded: Any = _Bounded(opened)
                return torch.load(bounded, map_location="cpu", weights_only=True)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # damaged pickles and archives raise any class
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            check_no_pointer(file)
            if "Weights only load failed" in str(error):
                wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
                raise UserError(
                    f"{file} is refused: it holds more than tensors{f', such as {wanted[1]},' if wanted else ','} and opening "
                    f"that could run any code. Ask its author for safetensors."
                ) from None
            raise UserError(f"weight file {file} is truncated or damaged ({reason}). Get it again.") from None

    def _without_values(self) -> io.BytesIO:
        """Return the archive with empty records of values, and fill `records`: offset in it -> record of the file.

        torch itself takes offsets to be those that torch would write: other values, if a file was zipped again.
        """
        with zipfile.ZipFile(self.file) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            pickled = next((name for name in infos if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
            if pickled is None or len(infos) < len(archive.infolist()) or any(i.flag_bits & 1 for i in infos.values()):
                raise ValueError("it has no data.pkl, names twice, or is encrypted")
            root = pickled.removesuffix("data.pkl")
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in infos else b"little"
            if order != sys.byteorder.encode():
                raise UserError(
                    f"{self.file} is from a machine of other byte order; load and save it with torch there."
                )
            if infos[pickled].file_size > (limit := PICKLE_BYTES + PICKLE_BYTES_PER_RECORD * len(infos)):
                raise UserError(
                    f"{self.file} is refused: its data.pkl of {infos[pickled].file_size:,} bytes holds more than tensors, "
                    f"which need fewer than {limit:,}."
                )
            empty = io.BytesIO()
            with zipfile.ZipFile(empty, "w") as written:
                written.writestr(pickled, archive.read(pickled))
                written.writestr(f"{root}version", "3\n")
                for name, info in infos.items():
                    if name.startswith(f"{root}data/"):
                        at = zipfile.ZipInfo(name)
                        written.writestr(at, b"")
                        self.records[at.header_offset + 30 + len(name.encode())] = info
        empty.seek(0)
        return empty


class _Bounded(io.RawIOBase):
    """A file that can be read so often: a pickle of nothing but opcodes ends in an error, not in minutes."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, MAX_READS

    def read(self, size: int = -1) -> bytes:
        self._count()
        return self.file.read(size)

    def readinto(self, buffer: Any) -> int:
        self._count()
        return self.file.readinto(buffer)

    def readline(self, size: int | None = -1) -> bytes:
        self._count()
        return self.file.readline(2**16)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {MAX_READS:,} opcodes")
