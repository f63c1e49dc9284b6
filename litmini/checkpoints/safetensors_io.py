"""Reads and writes safetensors files tensor by tensor; no pickle is ever read.

The format: eight bytes with the size of a JSON header, the header with dtype, shape and offsets of each tensor, then their
bytes without gaps. https://huggingface.co/docs/safetensors
"""

import ctypes
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from litmini.errors import UserError
from litmini.files import check_no_pointer, read_json

UMASK = os.umask(0)
os.umask(UMASK)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
OTHER_FORMATS = ("pytorch_model*.bin", "consolidated*.pth", "model.pth")
M_MMAP_THRESHOLD = -3  # of malloc.h
PIECE = 2**19  # values that are converted and written at once


def give_memory_back() -> None:
    """Let glibc return the memory of freed tensors to the system at once, for the rest of this process.

    Otherwise it keeps blocks of up to 32 MB, and fragmentation costs the memory of several tensors if each is used once.
    Other allocators stay unchanged.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 * 2**20)


def weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> file name, from the index of a sharded checkpoint.

    Raises:
        UserError: the index is damaged, or names a file outside its directory.
    """
    found = read_json(index).get("weight_map")
    if not (isinstance(found, dict) and all(isinstance(name, str) for name in found.values())):
        raise UserError(f"{index} has no weight_map of file names.")
    if outside := [name for name in found.values() if Path(name).name != name]:
        raise UserError(f"{index} names a file outside its directory: {outside[0]}")
    return found


def check_one_format(directory: Path) -> None:
    """Check that a directory holds weights once, so that nobody reads other ones than those that were meant.

    Raises:
        UserError: an index beside a whole file, or several formats; names them.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    existing = [single] if single.is_file() else []
    if index.is_file() and set(weight_map(index).values()) - {single.name}:
        existing.append(index)
    for pattern in OTHER_FORMATS:
        existing += sorted(directory.glob(pattern))[:1]
    if len(existing) > 1:
        names = " and ".join(file.name for file in existing)
        raise UserError(
            f"{directory} holds weights more than once: {names}. Keep those that you mean, and move the others elsewhere."
        )


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with the permissions of other new files."""
    save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(0o666 & ~UMASK)  # safetensors makes it readable by its owner only


def write_stream(file: Path, empty: Sequence[tuple[str, Tensor]], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write a safetensors file from an iterator: one tensor is in memory at a time.

    Args:
        empty: name, and a tensor with the shape and dtype to write, such as one on the meta device.
        tensors: (name, tensor) in the same order; each is rounded to the dtype in `empty`.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, like in sorted(empty, key=lambda item: (-item[1].element_size(), item[0])):  # largest first, to align all
        begin, end = end, end + like.numel() * like.element_size()
        header[name] = {"dtype": codes[like.dtype], "shape": list(like.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        opened.truncate(8 + len(encoded) + end)
        for name, like in empty:
            found, tensor = next(tensors)
            assert found == name and tensor.shape == like.shape, f"{found} {tensor.shape} is not {name} {like.shape}"
            opened.seek(8 + len(encoded) + header[name]["data_offsets"][0])
            for piece in tensor.detach().contiguous().flatten().split(PIECE):
                opened.write(piece.to("cpu", like.dtype).view(torch.uint8).numpy())


def shards(directory: Path) -> list[Path]:
    """Return the weight files of a checkpoint directory."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(weight_map(index).values()))]
    return [directory / "model.safetensors"]


@contextmanager
def _open(file: Path, backend: str = "mmap") -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", backend=backend) as opened:
            yield opened
    except FileNotFoundError:
        raise UserError(f"weight file not found: {file}") from None
    except OSError as error:
        raise UserError(f"weight file {file} cannot be read: {error}") from None
    except (SafetensorError, ValueError, RuntimeError) as error:
        check_no_pointer(file)
        if "Cannot allocate memory" in str(error):
            raise UserError(f"{file} does not fit into the available memory.") from None
        raise UserError(f"weight file {file} is damaged ({error}). Delete it and download it again.") from None


def read_tensors(
    files: Iterable[Path], copied: bool = False, only: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) from safetensors files, one tensor in memory at a time.

    Args:
        copied: each tensor has its own memory; else it is a view of the mapped file, whose pages count as memory of this
            process until the file is closed.
        only: name -> whether to read that tensor; None: all.

    Raises:
        UserError: a file is missing, truncated or not safetensors; names the file.
    """
    for file in files:
        with _open(file, "pread" if copied else "mmap") as opened:
            for name in filter(only, opened.offset_keys()) if only else opened.offset_keys():
                yield name, opened.get_tensor(name)


def read_empty(files: Iterable[Path], only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield what `read_tensors` yields, but on the meta device: shapes and dtypes from the headers of the files.

    Raises:
        UserError: as `read_tensors`; or a dtype is unknown.
    """
    for file in files:
        with _open(file, "pread") as opened:
            for name in filter(only, opened.offset_keys()) if only else opened.offset_keys():
                tensor = opened.get_slice(name)
                if (code := tensor.get_dtype()) not in DTYPES:
                    raise UserError(f"{file}: {name} is {code}; supported dtypes: {', '.join(DTYPES)}.")
                yield name, torch.empty(tensor.get_shape(), dtype=DTYPES[code], device="meta")
