"""fp32 numbers and the 16-bit ones that they are rounded to: so that updates smaller than the spacing of the latter count."""

from collections.abc import Iterable

import torch
from torch import Tensor

DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of fp32's mantissa that rounding cuts off


def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """fp32 -> bf16, up or down by chance, so that the mean is `x`: an update too small for bf16 counts now and then.

    (Revisiting BFloat16 Training, arXiv 2010.06192.)
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = (x.view(torch.int32) + noise) & -(1 << 16)  # bf16 is the upper half of fp32
    return bits.view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def spread(parameters: Iterable[Tensor], dtype: torch.dtype, seed: int = 0) -> None:
    """Move fp32 weights that came out of 16 bits, in place, to a random point among those that `dtype` rounds to the same.

    A forward pass in `dtype` sees the weights that it saw before. But weights that all lie in the middle between two
    roundings must move by half the spacing of `dtype` before it sees any change, 0.2% in bf16, which is more than many
    steps of finetuning add up to. Of weights spread evenly, an update of x% of the spacing moves x% at once: the mean is
    right. Matrices only: the rest is computed in fp32. Zeros stay, and weights that `dtype` rounds already.
    """
    if dtype not in DROPPED:
        return
    size = 1 << DROPPED[dtype]
    for parameter in parameters:
        if parameter.dim() < 2 or parameter.dtype != torch.float32 or parameter.is_meta:
            continue
        generator = torch.Generator(parameter.device).manual_seed(seed)
        for bits in parameter.data.view(-1).view(torch.int32).split(1 << 24):
            moves = torch.randint(
                1 - size // 2, size // 2, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
            )
            bits += moves.mul_((bits & (size - 1) == 0) & (bits << 1 != 0))
