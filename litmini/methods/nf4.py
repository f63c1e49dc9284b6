"""4-bit base weights: NF4 (QLoRA, arXiv 2305.14314) on bitsandbytes' functional kernels, which run on CPUs, too.

A frozen linear keeps 4 bits a weight and is dequantised for each matmul, forward and backward: the 16-bit weight never
outlives the matmul. Adapters go over it as over any linear.
"""

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.errors import UserError
from litmini.methods.base_layer import QuantizedLayer

BLOCK = 64  # weights that share an absmax
CHUNK = 2**18  # weights that a CPU quantises at once, whole blocks; its kernel takes 20 bytes of memory for each
GPU_CHUNK = 2**30  # the same for a GPU: whole linears
NESTED = 256  # values of absmax that share a scale, with double quantisation


class NF4Linear(QuantizedLayer):
    """A frozen linear, or grouped experts, in 4 bits a weight.

    `weight` holds two 4-bit weights a byte, (..., out, in / 2) uint8; `absmax` the largest magnitude in each block of 64,
    (..., out, in / 64), in fp32, or in 8 bits with double quantisation: 4.5 or 4.13 bits a weight in all. Both are frozen
    parameters with a row for each output, so FSDP gives each rank a shard of the bytes.
    """

    absmax_scale: Tensor
    absmax_offset: Tensor
    code: Tensor

    def __init__(self, base: nn.Module, double: bool = True, on: torch.device | None = None) -> None:
        """Quantise `base`, an `nn.Linear` or a family's `GroupedLinear`, which is left as it is.

        Args:
            on: the device that quantises; the result is on the device of `base`, which None stands for.
        """
        super().__init__()
        weight: Tensor = base.weight.detach()  # type: ignore[assignment, operator, union-attr]
        home = weight.device
        weight = weight.to(home if home.type == "meta" else on or home)
        self.shape, self.dtype, self.nested = weight.shape, weight.dtype, double
        self.out_features, self.in_features = weight.shape[-2:]
        if self.in_features % BLOCK:
            raise UserError(f"4-bit layers need an input size that is a multiple of {BLOCK}, found {self.in_features}.")
        rows = weight.shape[:-1]
        chunks = weight.reshape(-1).split(GPU_CHUNK if weight.device.type == "cuda" else CHUNK)
        quantized = [_kernels().quantize_4bit.default(chunk, BLOCK, "nf4", torch.uint8) for chunk in chunks]
        packed, absmax = (torch.cat(parts) for parts in zip(*quantized, strict=True))
        if double:
            offset = absmax.mean()
            code = _code(absmax.device)
            absmax, scale = _kernels().quantize_blockwise.default(absmax - offset, code, NESTED)
            # a buffer, as compiled code could not look it up; its own, as buffers of several layers count as tied
            self.register_buffer("code", code.to(home, copy=True), persistent=False)
            self.register_buffer("absmax_scale", scale.to(home))  # 1 / 16,384 of the weights: every rank has it whole
            self.register_buffer("absmax_offset", offset.view(1).to(home))
        self.weight = nn.Parameter(packed.view(*rows, self.in_features // 2).to(home), requires_grad=False)
        self.absmax = nn.Parameter(absmax.view(*rows, self.in_features // BLOCK).to(home), requires_grad=False)
        self.bias = getattr(base, "bias", None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        absmax = self.absmax
        if self.nested:
            absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
                absmax, self.absmax_scale, self.code, NESTED, torch.float32
            )
            absmax = absmax + self.absmax_offset
        packed, dtype = self.weight.view(-1, 1), dtype or self.dtype
        dequantize = torch.ops.bitsandbytes.dequantize_4bit.default  # `__init__` has imported them
        return dequantize(packed, absmax.view(-1), BLOCK, "nf4", list(self.shape), dtype)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return x W^T + bias; of grouped experts, x holds the tokens of each in turn, which end at `offsets`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _NF4Matmul.apply(x, offsets, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4Linear":
        """Let `.to(...)` move the weights to another device; another dtype is for the bias only."""
        bias = self.bias
        return super()._apply(lambda t: fn(t) if t is bias else fn(t.view(torch.uint8)).view(t.dtype), recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, double={self.nested}"


class _NF4Matmul(torch.autograd.Function):
    """Keeps neither the dequantised weight nor x for the backward pass: the weight is frozen, and dequantised again."""

    @staticmethod
    def forward(ctx, x: Tensor, offsets: Tensor | None, layer: NF4Linear) -> Tensor:  # type: ignore[override,no-untyped-def]
        ctx.offsets, ctx.layer, ctx.dtype = offsets, layer, x.dtype
        weight = layer.dequantize(x.dtype)
        return F.linear(x, weight) if offsets is None else F.grouped_mm(x, weight.mT, offs=offsets)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override,no-untyped-def]
        weight = ctx.layer.dequantize(ctx.dtype)
        return grad @ weight if ctx.offsets is None else F.grouped_mm(grad, weight, offs=ctx.offsets), None, None


@functools.lru_cache(maxsize=1)
def _kernels() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional kernels on CPUs
    import bitsandbytes  # noqa: F401  (registers them)

    return torch.ops.bitsandbytes


@functools.lru_cache
def _code(device: torch.device) -> Tensor:
    """Return the 256 values that 8 bits stand for (dynamic tree, arXiv 1511.04561)."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Return what goes into 4 bits, by full name: linears and experts of blocks. Embeddings, head, norms and routers stay.

    Raises:
        UserError: the input size of some is not a multiple of 64; lists all.
    """
    inner = {
        name: module
        for name, module in model.named_modules()
        if "." in name and (isinstance(module, nn.Linear) or type(module).__name__ == "GroupedLinear")
    }
    if unaligned := [f"{name} ({m.in_features} inputs)" for name, m in inner.items() if m.in_features % BLOCK]:  # type: ignore[operator]
        more = f", ... and {len(unaligned) - 5} more" if len(unaligned) > 5 else ""
        raise UserError(
            f"4-bit layers need an input size that is a multiple of {BLOCK}: {', '.join(unaligned[:5])}{more}."
        )
    return inner


def quantize_linears(model: nn.Module, double: bool = True) -> list[str]:
    """Put an `NF4Linear` in the place of every linear inside of `model`'s blocks; return their names."""
    inner = quantizable(model)
    for name, module in inner.items():
        model.set_submodule(name, NF4Linear(module, double))
    return list(inner)


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Let `model` compute in `dtype`; 4-bit weights stay as they are."""
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.dtype = dtype
