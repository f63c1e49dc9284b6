"""GGUF files opened: their metadata and tensors, which stay on disk until they are used.

The format and its metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from litmini.config import UserError


class Metadata:
    """A file's metadata, with floats as they were before they were stored in fp32 (1e-05, not 9.99e-06)."""

    def __init__(self, reader: GGUFReader, file: Path) -> None:
        self.fields, self.file = reader.fields, file

    def get(self, key: str, default: Any = None) -> Any:
        try:
            value = self.fields[key].contents() if key in self.fields else default
        except (ValueError, IndexError) as error:
            raise UserError(f"{self.file} is damaged: metadata {key} cannot be read ({error}).") from None
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str, kind: type = int) -> Any:
        value = self.get(key)
        if not isinstance(value, kind):
            raise UserError(f"{self.file}: metadata {key} is {value!r}; expected one {kind.__name__}.")
        return value


def read_gguf(file: Path) -> tuple[GGUFReader, Metadata]:
    """Open a GGUF file.

    Raises:
        UserError: it is missing, truncated, damaged or no GGUF file.
    """
    if not file.is_file():
        raise UserError(f"GGUF file not found: {file}")
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} is truncated, damaged or no GGUF file ({error}). Get it again.") from None
    return reader, Metadata(reader, file)
