"""DoRA: LoRA whose output rows are scaled to a trained magnitude."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.errors import UserError
from litmini.methods.base_layer import dense, shape, weight_as_stored, weight_in
from litmini.methods.lora import LoRALinear, rescaled

FLOOR = 1e-6  # smallest norm of a weight's row in DoRA: rows of zeros stay finite


class DoRALinear(LoRALinear):
    """LoRA whose rows are scaled to a trained magnitude: W' = m * (W + s B A) / |W + s B A| (DoRA, arXiv 2402.09353).

    The norm, one for each output row, is a constant in the backward pass (section 4.3 of the paper). m starts as the
    norm of W: so the output starts as the base's, exactly. Dropout is on the adapter's input alone.
    """

    square_norm: Tensor

    def __init__(self, base: Any, *settings: Any, **options: Any) -> None:
        super().__init__(base, *settings, **options)
        if len(shape(base)) != 2:
            raise UserError("DoRA over stacked experts is not implemented: leave them out of --lora.targets.")
        weight = dense(base)
        self.register_buffer("square_norm", weight.square().sum(1), persistent=False)  # (out,) fp32
        self.lora_magnitude_vector = nn.Parameter(self.norm(weight))
        self._frozen_gain: Tensor | None = None

    @torch.no_grad()
    def norm(self, weight: Tensor) -> Tensor:
        """(out,) in fp32: of the rows of `weight` (out, in), which is the base's, plus the change.

        |w + c|^2 = |w|^2 + 2 w.c + |c|^2, so the changed weight is never made: one product of `rank` columns is enough.
        """
        a, b = self.lora_A, self.lora_B * self.scale
        mixed = (b * (weight @ a.T.to(weight.dtype)).float()).sum(1)  # (out,)
        change = (b * (b @ (a @ a.T))).sum(1)  # (out,)
        return (self.square_norm + 2 * mixed + change).clamp(min=FLOOR**2).sqrt()

    def gain(self) -> Tensor:
        """m / norm, (out,) in fp32; computed once where nothing is trained any more."""
        m = self.lora_magnitude_vector
        trained = any(p.requires_grad for p in (m, self.lora_A, self.lora_B))
        if not trained and self._frozen_gain is not None:
            return self._frozen_gain
        gain = m / self.norm(weight_as_stored(self.base))
        self._frozen_gain = None if trained else gain
        return gain

    def _apply(self, fn: Any, recurse: bool = True) -> "DoRALinear":
        self._frozen_gain = None  # of the old device or dtype
        return super()._apply(fn, recurse)

    def change(self, x: Tensor, *ends: Tensor) -> Tensor:
        down, up = self.factors(x.dtype)
        y = F.linear(x, weight_in(x.dtype, self.base, self.base.weight))
        return rescaled(y, F.linear(self.dropout(x), down), up, self.gain())

    def merged_weight(self) -> Tensor:
        weight = dense(self.base)
        return (self.lora_magnitude_vector / self.norm(weight))[:, None] * (weight + self.delta())
