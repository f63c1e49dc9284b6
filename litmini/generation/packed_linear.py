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
    """A linear for inference, without a weight that anything else could read. Only rounding of its outputs may differ.

    Args:
        linear: its bias is shared; its weight is no longer needed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.register_parameter("weight", None)
        self.bias = linear.bias
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # the head, while a prompt is read
            return x.new_empty(*x.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


def pack_linears(model: nn.Module) -> None:
    """Put a `PackedLinear` in the place of each plain linear for which `can_pack` holds.

    The model then gives logits, but no loss. One weight at a time exists twice; that of a head which is tied to the embedding
    stays so. Linears with adapters beside them are left as they are.
    """
    adapted = {module.base for module in model.modules() if isinstance(module, AdapterLayer)}
    packed: dict[nn.Module, PackedLinear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Linear and module not in adapted and can_pack(module):
            if module not in packed:
                packed[module] = PackedLinear(module)
            model.set_submodule(name, packed[module])
