"""IA3: a frozen linear's outputs, or inputs, each times a factor that is trained; some hundredths of LoRA's parameters."""

from typing import Any

import torch
from torch import Tensor, nn

from litmini.config.finetune import Ia3Config
from litmini.errors import UserError
from litmini.methods.adapters import leaf, linears, replace_module
from litmini.methods.base_layer import AdapterLayer, dense, plain_layer, rounded_sum


class IA3Linear(AdapterLayer):
    """y = l * base(x), or base(l * x) for a feed-forward layer's second linear (IA3, arXiv 2205.05638, section 3.3).

    `ia3_l`, in fp32, is (out,), or (in,) for `feedforward`; it starts at 1, so the output starts as the base's, exactly.
    """

    def __init__(self, base: Any, feedforward: bool) -> None:
        super().__init__()
        self.base, self.feedforward = base, feedforward
        size = base.in_features if feedforward else base.out_features
        self.ia3_l = nn.Parameter(torch.ones(size, dtype=torch.float32, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self._scaled(x)) if self.feedforward else self._scaled(self.base(x))

    def _scaled(self, x: Tensor) -> Tensor:
        return (x * self.ia3_l).to(x.dtype)  # in fp32, rounded once

    def merged_weight(self) -> Tensor:
        """(out, in) in fp32."""
        return dense(self.base) * (self.ia3_l if self.feedforward else self.ia3_l[:, None])

    def merge(self, generator: torch.Generator | None = None) -> nn.Module:
        merged: Any = plain_layer(self.base, rounded_sum(self.base, self.merged_weight(), generator))
        if self.base.bias is not None and not self.feedforward:
            merged.bias = nn.Parameter(self._scaled(self.base.bias).detach(), requires_grad=False)
        return merged


def add_ia3(model: nn.Module, config: Ia3Config) -> list[str]:
    """Freeze `model` and put an `IA3Linear` over each linear that `config` names; returns their names.

    Raises:
        UserError: a name matches no linear; lists the leaf names there.
    """
    there = linears(model)
    wanted = {*config.targets, *config.feedforward}
    if (lost := wanted - {leaf(name) for name in there}) or not wanted:
        leaves = ", ".join(sorted({leaf(name) for name in there}))
        raise UserError(f"ia3.targets, ia3.feedforward: {', '.join(sorted(lost)) or 'empty'}; linears there: {leaves}.")
    names = [name for name in there if leaf(name) in wanted]
    model.requires_grad_(False)
    for name in names:
        replace_module(model, name, IA3Linear(there[name], leaf(name) in config.feedforward))
    return names
