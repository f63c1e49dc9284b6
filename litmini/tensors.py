"""Tensors in safetensors files: read one by one, written whole, and never a pickle."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from litmini.config import UserError
from litmini.files import read_json

UMASK = os.umask(0)
os.umask(UMASK)


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, from the index of a sharded checkpoint. A UserError where it is damaged or names other places."""
    found = read_json(index).get("weight_map")
    if not (isinstance(found, dict) and all(isinstance(name, str) for name in found.values())):
        raise UserError(f"{index} has no weight_map of file names.")
    if outside := [name for name in found.values() if Path(name).name != name]:
        raise UserError(f"{index} names a file outside its directory: {outside[0]}")
    return found


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, readable by whoever may read new files."""
    save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(0o666 & ~UMASK)  # safetensors itself makes it readable by its owner only


def shards(directory: Path) -> list[Path]:
    """The weight files of a checkpoint or adapter directory."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(weight_map(index).values()))]
    return [directory / "model.safetensors"]


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except FileNotFoundError:
        raise UserError(f"weight file not found: {file}") from None
    except OSError as error:
        raise UserError(f"weight file {file} cannot be read: {error}") from None
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"weight file {file} is damaged ({error}). Delete it and download it again.") from None


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of some safetensors files, one tensor in memory at a time.

    Raises:
        UserError: a file is missing, truncated or not safetensors; names the file.
    """
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                yield name, opened.get_tensor(name)


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of some safetensors files, from their headers.

    Raises:
        UserError: as `read_tensors`.
    """
    shapes = {}
    for file in files:
        with _open(file) as opened:
            shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
    return shapes
