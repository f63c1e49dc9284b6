"""Files that torch saved: opened as tensors only (`weights_only`), and read one tensor at a time."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from litmini.errors import UserError
from litmini.files import check_no_pointer
from litmini.models import FAMILIES


class Pickle:
    """The tensors of a file by name. None of them is read, or mapped, until it is asked for.

    Raises:
        UserError: it is missing or damaged, or holds anything but tensors by name.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"weight file not found: {file}")
        self.file = file
        with file.open("rb") as opened:
            zipped = opened.read(2) == b"PK"  # else of torch before 1.6: in memory as a whole
        state = _open(file, zipped)
        if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(state[n], Tensor) for n in state):
            raise UserError(f"{file} holds no tensors by name; expected a state dict of {', '.join(sorted(FAMILIES))}.")
        if unexpected := [name for name, t in state.items() if t.layout != torch.strided or t.is_quantized]:
            raise UserError(f"{file}: {unexpected[0]} is sparse or quantised; plain tensors are read.")
        self.tensors: dict[str, Tensor] = state

    def get(self, name: str, meta: bool = False) -> Tensor:
        """Return a tensor; on the meta device, only its shape and dtype.

        Raises:
            UserError: the file ends before it does.
        """
        like = self.tensors[name]
        if meta:
            return torch.empty(like.shape, dtype=like.dtype, device="meta")
        offset = like.untyped_storage()._checkpoint_offset
        if offset is None:
            return like
        span = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        values = torch.empty(span, dtype=like.dtype)
        content: Any = values.view(torch.uint8).numpy()
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(offset + int(like.storage_offset()) * like.element_size())
            n_read = 0
            while n_read < len(content) and (more := opened.readinto(content[n_read:])):
                n_read += more
        if n_read < len(content):
            raise UserError(f"weight file {self.file} is truncated: it ends within {name}. Get it again.")
        return values.as_strided(like.shape, like.stride())


def _open(file: Path, zipped: bool) -> Any:
    try:
        if not zipped:
            return torch.load(file, map_location="cpu", weights_only=True)
        with FakeTensorMode():  # such a tensor says where in the file its values are
            return torch.load(file, map_location="meta", weights_only=True)
    except MemoryError:
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
