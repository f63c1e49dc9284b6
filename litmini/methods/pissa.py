"""PiSSA: LoRA that starts as the principal part of the weight."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from litmini.distributed.fsdp import full_tensor
from litmini.errors import UserError
from litmini.methods.base_layer import dense, plain_layer
from litmini.methods.lora import LoRALinear
from litmini.methods.lora_matmul import LoRAMatmul, is_autocast


class PiSSALinear(LoRALinear):
    """LoRA that starts as the `rank` largest singular values of the weight, which the base then lacks (arXiv 2404.02948).

    On disk it is an ordinary LoRA adapter of twice the rank over the original base: B A - B0 A0.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, base: Any, *settings: Any, **options: Any) -> None:
        if not isinstance(base, nn.Linear):
            raise UserError("lora.init pissa needs plain 16-bit linears, not 4-bit ones or grouped experts.")
        super().__init__(base, *settings, **options)
        weight, rank = dense(base), len(self.lora_A)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same start when a run resumes
            u, s, v = torch.svd_lowrank(weight, q=min(2 * rank + 8, *weight.shape), niter=8)
        root = (s[:rank] / self.scale).sqrt()
        self.lora_A.data, self.lora_B.data = (root[:, None] * v[:, :rank].T).contiguous(), u[:, :rank] * root
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())
        self.base = plain_layer(base, weight - self.delta().detach())

    def at_start(self) -> nn.Module:
        """Return a layer of the factors with which this one began: the base lacks them."""
        return _Start(self)

    def peft_tensors(self) -> dict[str, Tensor]:
        a, b = full_tensor(self.lora_A), full_tensor(self.lora_B)
        return {"lora_A.weight": torch.cat((a, self.start_A)), "lora_B.weight": torch.cat((b, -self.start_B), 1)}

    def peft_rank_and_alpha(self) -> tuple[int, float]:
        """Return twice the rank, and the alpha that leaves the scale as it is."""
        return 2 * len(self.lora_A), self.alpha * (math.sqrt(2) if self.rank_stabilized else 2)


class _Start(nn.Module):
    """What a `PiSSALinear` computed at first, by the same kernels."""

    def __init__(self, layer: PiSSALinear) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: it is no module of this one's

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self._layer
        if is_autocast(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        base, flat = layer.base, x.flatten(0, -2)
        factors = layer.start_A, layer.start_B, layer.scale, None
        y = LoRAMatmul.apply(flat, None, base, base.weight, base.bias, *factors, None, None)
        return y.unflatten(0, x.shape[:-1])
