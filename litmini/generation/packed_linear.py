"""Linears whose weights lie in memory as a CPU's matmul instructions read them.

oneDNN rearranges a plain weight in each product: a third of the time with one token, a tenth with 500; and MKL's fp32 takes
twice as long on AMD's CPUs. Linears of one input are one product, which takes a tenth less time than theirs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from litmini.methods.base_layer import AdapterLayer

DTYPES = (torch.bfloat16, torch.float32)
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linears in one module that all families give the same input, which must not change in place meanwhile."""


def can_pack(linear: nn.Linear) -> bool:
    """Return whether a linear can be a `PackedLinear`: in bf16 or fp32, on a CPU with AVX512 (where it was measured)."""
    if linear.weight.device.type != "cpu" or linear.weight.dtype not in DTYPES:
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class Product:
    """The product of one input with the weights of several linears, computed when the first of them is called.

    Args:
        linears: of one dtype and input size; those without a bias have one of zeros if others have one.
    """

    def __init__(self, linears: list[nn.Linear]) -> None:
        weights = [linear.weight.detach() for linear in linears]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        biases = [
            w.new_zeros(len(w)) if n.bias is None else n.bias.detach() for n, w in zip(linears, weights, strict=True)
        ]
        self.bias = torch.cat(biases) if any(linear.bias is not None for linear in linears) else None
        self.sizes = [len(weight) for weight in weights]
        self._kept: tuple[Tensor | None, dict[int, Tensor]] = None, {}

    def take(self, i: int, x: Tensor) -> Tensor:
        """Return the output (..., sizes[i]) of linear i. The others' are kept until they are called with the same x."""
        kept, waiting = self._kept
        if x is not kept or i not in waiting:
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            waiting = dict(enumerate(y.split(self.sizes, -1)))
            self._kept = x, waiting  # at once: another thread may come between
        y = waiting.pop(i)
        if not waiting:
            self._kept = None, {}
        return y


class PackedLinear(nn.Linear):
    """A linear for inference. Only rounding of its outputs may differ.

    Args:
        product: what computes it, and the linears that have the same input.
        i: which of them it is.
        linear: its bias is shared; its weight is no longer needed.
    """

    def __init__(self, product: Product, i: int, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's would register a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.product, self.i = product, i
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in), put in order at each call: a model of a user's own may multiply by it."""
        return self.product.packed.to_dense().split(self.product.sizes)[self.i]

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # the head, while a prompt is read
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self.product.take(self.i, x)


def pack_linears(model: nn.Module) -> None:
    """Put a `PackedLinear` in the place of each plain linear for which `can_pack` holds.

    The model is then for inference only. The weight of one linear at a time exists twice, those of a product of several three
    times; that of a head which is tied to the embedding stays so. Linears with adapters beside them, and those of adapters,
    are left as they are.
    """
    groups = _linears_of_one_input(model)
    while groups:
        _pack(model, groups.pop())  # nothing else holds them


def _linears_of_one_input(model: nn.Module) -> list[dict[nn.Linear, list[str]]]:
    """Return linear -> all its names in the model, for those of one product each."""
    layers = (module for module in model.modules() if isinstance(module, AdapterLayer))
    adapted = {inner for layer in layers for inner in layer.modules()}
    groups: dict[tuple[Any, ...], dict[nn.Linear, list[str]]] = {}
    group_of: dict[nn.Linear, dict[nn.Linear, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Linear or module in adapted or not can_pack(module):
            continue
        if module not in group_of:
            parent, _, own = name.rpartition(".")
            together = next((names for names in ONE_INPUT if own in names), own)
            key = parent, together, module.in_features, module.weight.dtype
            group_of[module] = groups.setdefault(key, {})
        group_of[module].setdefault(module, []).append(name)
    return list(groups.values())


def _pack(model: nn.Module, group: dict[nn.Linear, list[str]]) -> None:
    product = Product(list(group))
    for i, (linear, names) in enumerate(group.items()):
        packed = PackedLinear(product, i, linear)
        for name in names:
            model.set_submodule(name, packed)
