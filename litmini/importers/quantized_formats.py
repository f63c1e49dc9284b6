"""The formats of quantised checkpoints: the tensors of each weight, and the values that they mean.

| `quant_method` | tensors of a weight W | its values |
|---|---|---|
| `fp8` | W in 8-bit floats, `W_scale_inv`: one, or one for each block of `weight_block_size` | W * scale |
| `mxfp4` | `W_blocks`: two 4-bit floats a byte in groups of 32, `W_scales`: exponents | float * 2^(scale - 127), transposed |
| `bitsandbytes` | W: two indices a byte, `W.quant_map`, `W.absmax`, `W.nested_*`, `W.quant_state.*` | map[index] * absmax |

They are those of transformers 5 and bitsandbytes when they dequantise, to the last bit.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litmini.checkpoints.safetensors_io import PIECE, read_empty, read_tensors
from litmini.errors import UserError

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
EXPONENTS = torch.tensor([2.0 ** (i - 127) for i in range(255)] + [math.nan])  # 8 bits as an exponent (E8M0)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
STATE = ".quant_state.bitsandbytes__"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes
STATE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Weight(NamedTuple):
    """A weight that a quantised checkpoint stores."""

    name: str
    """Of the weight in the dequantised checkpoint."""
    shape: tuple[int, ...]
    fill: Callable[[Tensor], None]
    """Writes its values into a tensor of this shape."""
    parts: tuple[str, ...]
    """Further tensors that belong to it."""


class Stored:
    """The tensors of safetensors files by name, read one by one; and what is wrong with them."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files, self.problems = list(files), list[str]()
        self.empty: dict[str, Tensor] = {}
        self.file: dict[str, Path] = {}
        for file in self.files:
            for name, like in read_empty([file]):
                self.empty[name], self.file[name] = like, file

    def get(self, name: str) -> Tensor:
        """Return the values of a tensor."""
        return next(read_tensors([self.file[name]], copied=True, only=name.__eq__))[1]

    def finite(self, name: str) -> Tensor:
        """Return the values of a tensor of scales, in fp32.

        Raises:
            UserError: some are NaN or infinite.
        """
        values = self.get(name).float()
        if not values.isfinite().all():
            raise UserError(f"{self.file[name]}: NaN or infinite values in {name}. Download it again.")
        return values

    def has(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> bool:
        """Whether there is such a tensor; if not, it is a problem."""
        found = self.empty.get(name)
        fits = found is not None and found.shape == shape and found.dtype in dtypes
        if not fits:
            existing = "missing" if found is None else f"{words(found.dtype)} {tuple(found.shape)}"
            self.problems.append(f"{name} is {existing}, expected {' or '.join(map(words, dtypes))} {shape}")
        return fits


Found = tuple[list[tuple[str, Weight]], str]
"""Name of a stored tensor -> the weight whose values begin there; and the format in words."""


def _fp8(stored: Stored, settings: dict[str, Any]) -> Found:
    block = settings.get("weight_block_size", [128, 128])
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise ValueError(f"weight_block_size = {block!r}, expected two whole numbers above 0, or null")
    for key, only in (("scale_fmt", "float"), ("expert_dtype", "fp8")):
        if settings.get(key, only) != only:
            raise ValueError(f"{key} = {settings[key]!r} is not read, expected {only!r}")
    weights = []
    for name, like in stored.empty.items():
        if like.dtype not in FP8:
            continue
        if like.dim() < 2 or not like.numel():
            stored.problems.append(f"{name} is {words(like.dtype)} {tuple(like.shape)}, expected a matrix")
            continue
        scale = f"{name}_scale_inv"
        *experts, rows, columns = like.shape
        size = (rows, columns) if block is None else tuple(block)
        grid = (*experts, -(-rows // size[0]), -(-columns // size[1]))
        found = stored.empty.get(scale)
        whole = found is not None and found.numel() == 1  # one scale for all
        if stored.has(scale, tuple(found.shape) if whole and found is not None else grid, *STATE_DTYPES.values()):
            fill = _fill_fp8(stored, name, scale, (rows, columns) if whole else size)
            weights.append((name, Weight(name, tuple(like.shape), fill, (scale, *_activation_scales(stored, name)))))
    return weights, "FP8 with one scale a tensor" if block is None else f"FP8 in blocks of {block[0]} x {block[1]}"


def _activation_scales(stored: Stored, name: str) -> list[str]:
    """Return what only FP8 matmuls need."""
    owner = name.removesuffix(".weight")
    return [
        n
        for n in (f"{owner}.activation_scale", f"{owner}_activation_scale", f"{owner}.input_scale")
        if n in stored.empty
    ]


def _fill_fp8(stored: Stored, name: str, scale: str, size: tuple[int, ...]) -> Callable[[Tensor], None]:
    def fill(out: Tensor) -> None:
        rows, columns = out.shape[-2:]
        values = stored.get(name).view(-1, rows, columns)
        grids = stored.finite(scale).view(-1, -(-rows // size[0]), -(-columns // size[1]))
        row_of = torch.arange(rows) // size[0]
        step = max(1, PIECE // columns)
        for matrix, quantized, grid in zip(
            out.view(-1, rows, columns), values, grids.expand(len(values), -1, -1), strict=True
        ):
            wide = (
                grid.repeat_interleave(size[1], 1)[:, :columns] if grid.shape[1] > 1 else grid
            )  # of each row of blocks
            for start in range(0, rows, step):
                part = slice(start, start + step)
                matrix[part] = quantized[part].float() * wide[row_of[part]]

    return fill


def _mxfp4(stored: Stored, settings: dict[str, Any]) -> Found:
    weights = []
    for blocks, like in stored.empty.items():
        if not blocks.endswith("_blocks"):
            continue
        name = blocks.removesuffix("_blocks")
        scales, shape = f"{name}_scales", tuple(like.shape)
        if len(shape) != 4 or shape[-1] != 16 or like.dtype != torch.uint8:
            stored.problems.append(
                f"{blocks} is {words(like.dtype)} {shape}, expected uint8 (experts, rows, groups, 16)"
            )
        elif stored.has(scales, shape[:-1], torch.uint8):
            experts, rows, groups, _ = shape
            weight = Weight(name, (experts, groups * 32, rows), _fill_mxfp4(stored, blocks, scales), (scales,))
            weights.append((blocks, weight))
    return weights, "MXFP4"


def _fill_mxfp4(stored: Stored, blocks: str, scales: str) -> Callable[[Tensor], None]:
    def fill(out: Tensor) -> None:
        exponents = stored.get(scales)
        if (exponents == 255).any():
            raise UserError(f"{stored.file[scales]}: NaN among the scales of {scales}. Download it again.")
        for matrix, packed, exponent in zip(out, stored.get(blocks), exponents, strict=True):
            step = max(1, PIECE // len(matrix))
            for start in range(0, len(packed), step):
                part = packed[start : start + step]  # (rows, groups, 16)
                values = FP4[_nibbles(part, low_first=True)]  # (rows, groups, 32)
                values *= EXPONENTS[exponent[start : start + step].int()][..., None]
                matrix[:, start : start + step] = values.flatten(1).T

    return fill


def _bitsandbytes(stored: Stored, settings: dict[str, Any]) -> Found:
    if settings.get("load_in_8bit"):
        raise ValueError("load_in_8bit = True is not read, expected load_in_4bit")
    weights, kinds = [], set[str]()
    for key in [name for name in stored.empty if STATE in name]:
        name, _, kind = key.partition(STATE)
        try:
            state = State.of(bytes(stored.get(key).view(torch.uint8).tolist()), kind)
        except ValueError as error:
            stored.problems.append(f"{key}: {error}")
            continue
        n = math.prod(state.shape)
        like = stored.empty.get(name)
        size = -1 if like is None else like.numel() * like.element_size()
        if size != -(-n // 2):
            found = "missing" if like is None else f"{size} bytes"
            stored.problems.append(f"{name} is {found}, expected {-(-n // 2)} bytes for {state.shape} in 4 bits")
        n_blocks = -(-n // state.block)
        parts = {f"{name}.quant_map": ((16,), torch.float32)}
        parts[f"{name}.absmax"] = ((n_blocks,), torch.uint8 if state.nested else torch.float32)
        if state.nested:
            parts[f"{name}.nested_quant_map"] = ((256,), torch.float32)
            parts[f"{name}.nested_absmax"] = ((-(-n_blocks // state.nested),), torch.float32)
        if all([stored.has(part, *expected) for part, expected in parts.items()]):
            kinds.add(f"{kind.upper()}{' with double quantisation' * bool(state.nested)}")
            weights.append((name, Weight(name, state.shape, _fill_bitsandbytes(stored, name, state), (*parts, key))))
    return weights, f"bitsandbytes {' and '.join(sorted(kinds)) or '4 bits'}"


class State(NamedTuple):
    """What `quant_state` says of a weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """That the values are rounded to before any other."""
    block: int
    """Values that share an absmax."""
    nested: int
    """Values of absmax that share a scale; 0: absmax is not quantised."""
    offset: float

    @classmethod
    def of(cls, text: bytes, kind: str) -> "State":
        """Read its JSON; ValueError: a value is impossible."""
        try:
            found = json.loads(text)
        except (UnicodeDecodeError, RecursionError, json.JSONDecodeError):
            raise ValueError("is no JSON") from None
        if not isinstance(found, dict) or kind not in ("nf4", "fp4") or found.get("quant_type") != kind:
            raise ValueError(f"quant_type is not {kind!r}, or no nf4 or fp4")
        shape, dtype, nested = found.get("shape"), found.get("dtype"), "nested_blocksize" in found
        if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 < n < 2**31 for n in shape):
            raise ValueError(f"shape = {str(shape)[:50]}, expected sizes above 0")
        if dtype not in STATE_DTYPES:
            raise ValueError(f"dtype = {str(dtype)[:50]!r}, expected one of {', '.join(STATE_DTYPES)}")
        for key in ("blocksize", *["nested_blocksize"] * nested):
            if found.get(key) not in BLOCK_SIZES:
                raise ValueError(f"{key} = {str(found.get(key))[:50]}, expected one of {BLOCK_SIZES}")
        offset = found.get("nested_offset", 0.0)
        if type(offset) not in (int, float) or not math.isfinite(offset):
            raise ValueError(f"nested_offset = {str(offset)[:50]}, expected a number")
        sizes = int(found["blocksize"]), int(found["nested_blocksize"]) if nested else 0
        return cls(tuple(shape), STATE_DTYPES[dtype], *sizes, float(offset))


def _fill_bitsandbytes(stored: Stored, name: str, state: State) -> Callable[[Tensor], None]:
    def fill(out: Tensor) -> None:
        table = stored.finite(f"{name}.quant_map")
        if state.nested:
            scales = stored.finite(f"{name}.nested_absmax").repeat_interleave(state.nested)
            indices = stored.get(f"{name}.absmax").int()
            absmax = stored.finite(f"{name}.nested_quant_map")[indices] * scales[: len(indices)] + state.offset
        else:
            absmax = stored.finite(f"{name}.absmax")
        packed, flat = stored.get(name).flatten().view(torch.uint8), out.view(-1)
        for start in range(0, len(flat), PIECE):  # whole blocks
            part = flat[start : start + PIECE]
            indices = _nibbles(packed[start // 2 : (start + len(part) + 1) // 2], low_first=False)[: len(part)]
            of_block = absmax[start // state.block : -(-(start + len(part)) // state.block)]
            values = table[indices] * of_block.repeat_interleave(state.block)[: len(part)]
            part.copy_(values.to(state.dtype))

    return fill


def _nibbles(packed: Tensor, low_first: bool) -> Tensor:
    """Return the two indices of each byte, side by side in the last dimension: (..., n) -> (..., 2 n)."""
    low, high = (packed & 15).int(), (packed >> 4).int()
    return torch.stack((low, high) if low_first else (high, low), dim=-1).flatten(-2)


def words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FORMATS: dict[str, Callable[[Stored, dict[str, Any]], Found]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
}
