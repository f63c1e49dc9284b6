"""Linears whose weights lie in memory as a CPU's matmul instructions read them.

oneDNN rearranges a plain weight in each product: a third of the time with one token, a tenth with 500; and MKL's fp32 takes
twice as long on AMD's CPUs.
"""

import torch
from torch import Tensor, nn

from litmini.methods.base_layer import AdapterLayer

DTYPES = (torch.bfloat16, torch.float32)


def can_pack(linear: nn.Linear) -> bool:
    """Return whether a linear can be a `PackedLinear`: in bf16 or fp32, on a CPU with AVX512 (where it was measured)."""
    if linear.weight.device.type != "cpu" or linear.weight.dtype not in DTYPES:
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class PackedLinear(nn.Linear):
    """A linear for inference. Only rounding of its outputs may differ.

    Args:
        linear: its bias is shared; its weight is no longer needed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's would register a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in), put in order at each call: a model of a user's own may multiply by it."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # the head, while a prompt is read
            return x.new_empty(*x.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


def pack_linears(model: nn.Module, batched: bool) -> None:
    """Put a `PackedLinear` in the place of each plain linear for which `can_pack` holds.

    Args:
        batched: whether several sequences are decoded at once. One token by one in bf16, torch's own GEMV is as fast on a
            plain weight, so that stays.

    The model is then for inference only. One weight at a time exists twice; that of a head which is tied to the embedding
    stays so. Linears with adapters beside them, and those of adapters, are left as they are.
    """
    layers = (module for module in model.modules() if isinstance(module, AdapterLayer))
    adapted = {inner for layer in layers for inner in layer.modules()}
    packed: dict[nn.Module, PackedLinear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear or module in adapted or not can_pack(module):
            continue
        if batched or module.weight.dtype != torch.bfloat16:
            if module not in packed:
                packed[module] = PackedLinear(module)
            model.set_submodule(name, packed[module])
