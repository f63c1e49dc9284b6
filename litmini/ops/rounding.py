"""fp32 numbers and the 16-bit ones that they are rounded to: so that updates smaller than the spacing of the latter count."""

from collections.abc import Iterable

import torch
from torch import Tensor

DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of fp32's mantissa that rounding cuts off
PIECE = 1 << 20  # numbers at once: what is computed on the way takes little memory


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """fp32 -> `dtype`, up or down by chance, so that the mean is `x`: an update too small for it counts now and then.

    What `dtype` holds stays as it is; to fp32 nothing is rounded. Numbers below 6e-5 are rounded to the nearest of fp16.
    (Revisiting BFloat16 Training, arXiv 2010.06192.)
    """
    if dtype not in DROPPED:
        return x.to(dtype)
    size, rounded = 1 << DROPPED[dtype], torch.empty(x.shape, dtype=dtype, device=x.device)
    for part, out in zip(x.contiguous().view(-1).split(PIECE), rounded.view(-1).split(PIECE), strict=True):
        bits = torch.randint(0, size, part.shape, dtype=torch.int32, device=x.device, generator=generator)
        bits.add_(part.view(torch.int32)).bitwise_and_(-size)
        out.copy_(torch.where(part.isfinite(), bits.view(torch.float32), part))  # a GPU's NaN would overflow
    return rounded


@torch.no_grad()
def dither(parameters: Iterable[Tensor], dtype: torch.dtype, seed: int = 0) -> None:
    """Move fp32 weights that came out of 16 bits, in place, to a random point among those that `dtype` rounds to the same.

    A forward pass in `dtype` sees the weights that it saw before. But weights that all lie in the middle between two
    roundings must move by half the spacing of `dtype` before it sees any change, 0.2% in bf16, which is more than many
    steps of finetuning add up to. Of weights spread evenly, an update of x% of the spacing moves x% at once: the mean is
    right. What is trained, and matrices only: biases and norms are computed in fp32. Zeros stay, and weights that `dtype`
    rounds already.
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
