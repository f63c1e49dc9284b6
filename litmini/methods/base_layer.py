"""The layer that a method stands over, whatever it is stored in: a plain linear, one in 4 bits, or a stack of experts."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.methods.nf4 import NF4Linear
from litmini.ops.rounding import stochastic_round

pass


def plain(base: Any) -> bool:
    """Whether it gives x W^T + bias, and nothing else is known to happen there."""
    return type(base) in (nn.Linear, NF4Linear)


def product(x: Tensor, weight: Tensor, *ends: Tensor) -> Tensor:
    """x W^T; or, for weights (n_experts, out, in), of each expert's rows of x, which end at `ends`."""
    return F.grouped_mm(x, weight.mT, offs=ends[0]) if ends else F.linear(x, weight)


def shape(base: Any) -> torch.Size:
    """Of a layer's weight, whatever it is stored in: (out, in), or (n_experts, out, in)."""
    return base.shape if isinstance(base, NF4Linear) else base.weight.shape


def weight_in(dtype: torch.dtype, base: Any, stored: Tensor) -> Tensor:
    """The weight of `base`, which keeps it as `stored`, in the dtype of a product."""
    return base.dequantize(dtype) if isinstance(base, NF4Linear) else stored.to(dtype)


def weight_as_stored(base: Any) -> Tensor:
    """The weight that `base` multiplies with, in the dtype that it computes in."""
    return base.dequantize() if isinstance(base, NF4Linear) else base.weight.detach()


def dense(base: Any) -> Tensor:
    """The weight that `base` multiplies with, in fp32."""
    return weight_in(torch.float32, base, base.weight.detach())


def rounded_sum(base: Any, weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """The weight of `base` with a change, which is in fp32, in the dtype of `base`.

    A 16-bit weight would stay what it was under changes of less than half the spacing, so it is rounded by chance, the same
    way each time. A 4-bit one has any value between two 16-bit numbers, and is rounded to the nearest.
    """
    if isinstance(base, NF4Linear):
        return weight
    generator = generator or torch.Generator(weight.device).manual_seed(0)
    return stochastic_round(weight.detach(), base.weight.dtype, generator)


def plain_layer(base: Any, weight: Tensor) -> nn.Module:
    """A layer like `base` before it was quantised or adapted, with another weight, rounded once to the base's dtype."""
    dtype = base.dtype if isinstance(base, NF4Linear) else base.weight.dtype
    with torch.device("meta"):
        if weight.dim() == 2:
            layer: nn.Module = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            layer.bias = base.bias
        else:
            layer = _Stack(base.in_features, base.out_features)
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    return layer


class _Stack(nn.Module):
    """A merged stack of experts."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight: nn.Parameter

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return product(x, self.weight.to(x.dtype), ends)


class AdapterLayer(nn.Module):
    """What stands in a model over a layer `base`. `merge()` gives a plain layer that does the same."""

    base: Any


class ModulesToSaveLayer(AdapterLayer):
    """A module that is trained in full beside adapters: its weights in fp32, computed in the dtype of the frozen ones."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.full = copy.deepcopy(base).float().requires_grad_(True)

    def forward(self, *inputs: Any) -> Any:
        return torch.func.functional_call(self.full, self._rounded(), inputs)

    def _rounded(self) -> dict[str, Tensor]:
        dtypes = {name: p.dtype for name, p in self.base.named_parameters()}
        return {name: p.to(dtypes[name]) for name, p in self.full.named_parameters()}

    def merge(self, generator: torch.Generator | None = None) -> nn.Module:
        merged = copy.deepcopy(self.base)
        for name, weight in self._rounded().items():
            merged.get_parameter(name).data = weight.detach()
        return merged
