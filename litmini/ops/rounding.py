"""Stochastic rounding and dither: they keep updates that are smaller than a ULP of a 16-bit dtype."""

from collections.abc import Iterable

import torch
from torch import Tensor

DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of fp32's mantissa that rounding drops
PIECE = 1 << 20  # values at once, so that temporary tensors are small


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Round fp32 values to `dtype`, up or down at random, so that the expected value is `x`.

    So the sum of many updates below a ULP is kept in the mean. Values that `dtype` represents exactly stay the same; to fp32
    nothing is rounded; to fp16, values below 6e-5 are rounded to the nearest. (Revisiting BFloat16 Training, arXiv
    2010.06192.)
    """
    if dtype not in DROPPED:
        return x.to(dtype)
    size, rounded = 1 << DROPPED[dtype], torch.empty(x.shape, dtype=dtype, device=x.device)
    for part, out in zip(x.contiguous().view(-1).split(PIECE), rounded.view(-1).split(PIECE), strict=True):
        bits = torch.randint(0, size, part.shape, dtype=torch.int32, device=x.device, generator=generator)
        bits.add_(part.view(torch.int32)).bitwise_and_(-size)
        out.copy_(torch.where(part.isfinite(), bits.view(torch.float32), part))  # the bits of a GPU's NaN overflow
    return rounded


@torch.no_grad()
def dither(parameters: Iterable[Tensor], dtype: torch.dtype, seed: int = 0) -> None:
    """Add uniform noise within the rounding interval of `dtype` to fp32 weights that came from 16 bits, in place.

    A forward pass in `dtype` sees the same weights as before. But without dither all weights lie in the middle of their
    rounding interval, and must move by half a ULP before the forward pass sees a change: 0.2% in bf16, more than many steps
    of finetuning add up to. With dither, an update of x% of a ULP changes the rounded value of x% of the weights at once,
    so the mean is right. Only trained matrices are changed: biases and norms are computed in fp32. Zeros stay zero, and
    weights that `dtype` does not represent exactly stay the same.
    """
    if dtype not in DROPPED:
        return
    size, generator = 1 << DROPPED[dtype], None
    for parameter in parameters:
        if parameter.dim() < 2 or parameter.dtype != torch.float32 or parameter.is_meta or not parameter.requires_grad:
            continue
        generator = generator or torch.Generator(parameter.device).manual_seed(seed)
        for bits in parameter.data.view(-1).view(torch.int32).split(PIECE):
            moves = torch.randint(
                1 - size // 2, size // 2, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
            )
            bits += moves.mul_((bits & (size - 1) == 0) & (bits << 1 != 0))
