"""GGUF files: their metadata, and the offset of each tensor; tensors are read when they are used.

The format and its metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader
makes several objects of each token, a gigabyte for a large vocabulary; the tests compare with it.
"""

import math
import mmap
import reprlib
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from litmini.errors import UserError
from litmini.files import check_no_pointer

SCALARS = {  # type of a value -> numpy's, little-endian
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
MAX_COUNT = 4_000_000  # values in a list, bytes of a text, settings, tensors: several times those of any published file


class StoredTensor(NamedTuple):
    """A tensor of a file, on disk."""

    file: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """In torch's order: the contiguous dimension is the last."""
    offset: int
    """Of its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the last dimension."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of all dimensions but the last taken together, in fp32: (rows, last dimension)."""
        count = (stop - start) * self.row_bytes
        raw = np.fromfile(self.file, np.uint8, count, offset=self.offset + start * self.row_bytes)
        if len(raw) < count:
            raise UserError(f"{self.file} is truncated: it ends within {self.name}. Get it again.")
        return dequantize(raw.reshape(stop - start, self.row_bytes), self.kind)


class Metadata:
    """A file's metadata, with floats as before they were stored in fp32 (1e-05, not 9.99e-06)."""

    def __init__(self, fields: dict[str, Any], file: Path) -> None:
        self.fields, self.file = fields, file

    def get(self, key: str, default: Any = None) -> Any:
        value = self.fields.get(key, default)
        if isinstance(value, np.ndarray):
            return value.tolist()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str, kind: type = int) -> Any:
        value = self.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{self.file}: metadata {key} is {reprlib.repr(value)}; expected one {kind.__name__}.")
        return value

    def optional(self, key: str, default: Any) -> Any:
        """Return a value of the type of `default`, which stands for a missing one."""
        return self.need(key, type(default)) if key in self.fields else default


class _Cursor:
    """Reads one value after the other; a ValueError where the file ends before it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        """Read one number of a numpy dtype."""
        return self.numbers(code, 1)[0].item()

    def numbers(self, code: str, count: int) -> np.ndarray:
        dtype = np.dtype(code)
        content = self.take(count * dtype.itemsize)
        return np.frombuffer(content, dtype)

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,}, within a value of {count:,} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def text(self) -> str:
        (count,) = struct.unpack("<Q", self.take(8))
        self.check_count(count, 1)
        return self.take(count).decode("utf-8")

    def value(self) -> Any:
        kind = GGUFValueType(self.number("<u4"))
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.number(SCALARS[kind])
        kind, count = GGUFValueType(self.number("<u4")), self.number("<u8")
        self.check_count(count, 8 if kind == GGUFValueType.STRING else 1)
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        if kind == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays")
        return self.numbers(SCALARS[kind], count)

    def check_count(self, count: int, size: int) -> None:
        """Check that so many values, of `size` bytes at least, can follow."""
        if count > min(MAX_COUNT, (len(self.data) - self.at) // size):
            raise ValueError(f"{count:,} values, in {len(self.data) - self.at:,} bytes; {MAX_COUNT:,} at most")

    def unique(self, existing: dict[str, Any]) -> str:
        """Read a name that is not in `existing`."""
        if (name := self.text()) in existing:
            raise ValueError(f"{name} occurs twice")
        return name


def read_gguf(file: Path) -> tuple[Metadata, dict[str, StoredTensor]]:
    """Open a GGUF file: its metadata, and its tensors by name.

    Raises:
        UserError: it is missing, truncated, damaged or no GGUF file.
    """
    if not file.is_file():
        raise UserError(f"GGUF file not found: {file}")
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            fields, tensors = _parse(_Cursor(data), file)
            size = len(data)
        if ends := [t.name for t in tensors.values() if t.offset + t.nbytes > size]:
            raise ValueError(f"{ends[0]} ends after the file's {size:,} bytes")
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        check_no_pointer(file)
        raise UserError(f"{file} is truncated, damaged or no GGUF file ({error}). Get it again.") from None
    return Metadata(fields, file), tensors


def _parse(cursor: _Cursor, file: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := cursor.number("<u4")) not in (2, 3):
        raise ValueError(f"version {version}; versions 2 and 3, little-endian, are read")
    n_tensors, n_fields = cursor.number("<u8"), cursor.number("<u8")
    cursor.check_count(n_tensors, 32)
    cursor.check_count(n_fields, 13)
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        name = cursor.unique(fields)
        fields[name] = cursor.value()
    tensors: dict[str, StoredTensor] = {}
    for _ in range(n_tensors):
        name = cursor.unique(tensors)
        if (n_sizes := cursor.number("<u4")) > 8:
            raise ValueError(f"{name} has {n_sizes:,} dimensions")
        sizes = cursor.numbers("<u8", n_sizes).tolist()
        kind, offset = GGMLQuantizationType(cursor.number("<u4")), cursor.number("<u8")
        if not sizes or math.prod(sizes) == 0 or sizes[0] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"{name} is {kind.name} of sizes {sizes}")
        tensors[name] = StoredTensor(file, name, kind, tuple(reversed(sizes)), offset)
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}")
    begin = -(-cursor.at // alignment) * alignment
    return fields, {name: t._replace(offset=begin + t.offset) for name, t in tensors.items()}
