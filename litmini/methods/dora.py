"""DoRA: LoRA whose output rows are scaled to a trained magnitude."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.distributed.fsdp import full_tensor
from litmini.errors import UserError
from litmini.methods.base_layer import dense, shape, weight_in, weight_in_own_dtype
from litmini.methods.lora import LoRALinear
from litmini.methods.lora_matmul import cast_factors, scaled_delta

FLOOR = 1e-6  # smallest norm of a weight's row in DoRA: rows of zeros stay finite


class DoRALinear(LoRALinear):
    """LoRA whose rows are scaled to a trained magnitude: W' = m * (W + s B A) / |W + s B A| (DoRA, arXiv 2402.09353).

    The norm, one for each output row, is a constant in the backward pass (section 4.3 of the paper). m starts as the
    norm of W: so the output starts as the base's, exactly. Dropout is on the adapter's input alone.
    """

    peft_keys = (*LoRALinear.peft_keys, "lora_magnitude_vector")
    square_norm: Tensor

    def __init__(self, base: Any, *settings: Any, **options: Any) -> None:
        super().__init__(base, *settings, **options)
        if len(shape(base)) != 2:
            raise UserError("DoRA over grouped experts is not implemented: leave them out of --lora.targets.")
        weight = dense(base)
        self.register_buffer("square_norm", weight.square().sum(1), persistent=False)  # (out,) fp32
        self.lora_magnitude_vector = nn.Parameter(self.norm(weight))
        self._frozen_scale: Tensor | None = None

    @torch.no_grad()
    def norm(self, weight: Tensor) -> Tensor:
        """Return the norm of each row, (out,) in fp32, of `weight` (out, in), which is the base's, plus the delta.

        |w + d|^2 = |w|^2 + 2 w.d + |d|^2, so the sum is never made: one matmul of `rank` columns is enough.
        """
        a, b = self.lora_A, self.lora_B * self.scale
        mixed = (b * (weight @ a.T.to(weight.dtype)).float()).sum(1)  # (out,)
        delta = (b * (b @ (a @ a.T))).sum(1)  # (out,)
        return (self.square_norm + 2 * mixed + delta).clamp(min=FLOOR**2).sqrt()

    def magnitude_scale(self) -> Tensor:
        """Return m / norm, (out,) in fp32; computed once where nothing is trained any more."""
        m = self.lora_magnitude_vector
        trained = any(p.requires_grad for p in (m, self.lora_A, self.lora_B))
        if not trained and self._frozen_scale is not None:
            return self._frozen_scale
        scale = m / self.norm(weight_in_own_dtype(self.base))
        self._frozen_scale = None if trained else scale
        return scale

    def _apply(self, fn: Any, recurse: bool = True) -> "DoRALinear":
        self._frozen_scale = None  # of the old device or dtype
        return super()._apply(fn, recurse)

    def output_delta(self, x: Tensor, *offsets: Tensor) -> Tensor:
        a, b = cast_factors(self.lora_A, self.lora_B, self.scale, x.dtype)
        y = F.linear(x, weight_in(x.dtype, self.base, self.base.weight))
        return scaled_delta(y, F.linear(self.dropout(x), a), b, self.magnitude_scale())

    def merged_weight(self) -> Tensor:
        weight = dense(self.base)
        return (self.lora_magnitude_vector / self.norm(weight))[:, None] * (weight + self.delta())

    def peft_tensors(self) -> dict[str, Tensor]:
        return {**super().peft_tensors(), "lora_magnitude_vector": full_tensor(self.lora_magnitude_vector)}

    def load_peft(self, tensors: dict[str, Tensor]) -> None:
        super().load_peft(tensors)
        self.lora_magnitude_vector.data.copy_(tensors["lora_magnitude_vector"])

    @classmethod
    def peft_config(cls, layers: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        return {**super().peft_config(layers, model), "use_dora": True}

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type", "LORA") == "LORA" and bool(config.get("use_dora"))
