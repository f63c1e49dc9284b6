"""The base of every method: `AdapterLayer`, and the layer that it stands over, plain, quantised, or grouped experts."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.distributed.fsdp import full_tensor
from litmini.ops.rounding import stochastic_round

PREFIX = "base_model.model."
"""Of every name in PEFT's files."""


class QuantizedLayer(nn.Module):
    """A frozen linear, or grouped experts, that keeps its weight in fewer bits and dequantises it for each matmul."""

    shape: torch.Size
    """Of the dequantised weight: (out, in), or (n_experts, out, in)."""
    dtype: torch.dtype
    """In which it computes where nothing else is asked for."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, (..., out, in), in `dtype` or its own."""
        raise NotImplementedError


class AdapterLayer(nn.Module):
    """A layer of a method in the place of a layer `base` of any model, and its format in PEFT's files.

    A class whose adapters are read from disk stands in `registry.METHODS`.
    """

    base: Any
    additive = False
    """Whether it sums base(x) and `output_delta(x)`, and so reads the base's weight itself."""
    is_beside = False
    """Whether it stands beside the layers of a method, of which a model has one."""
    peft_keys: tuple[str, ...] = ()
    """Its tensors in `adapter_model.safetensors`, without the name of the module: "lora_A.weight", ..."""

    def merged_weight(self) -> Tensor:
        """Return the weight of a plain layer that computes the same, (..., out, in) in fp32."""
        raise NotImplementedError

    def merge(self, generator: torch.Generator | None = None) -> nn.Module:
        """Return a plain layer that computes the same: the sum in fp32, rounded once to the base's dtype.

        The base stays as it is: putting this layer back in its place undoes the merge, bit by bit.
        """
        merged: Any = plain_layer(self.base, rounded_sum(self.base, self.merged_weight(), generator))
        if merged.weight.dim() == 2 and (bias := self.base.bias) is not None:
            changed = self.merged_bias(bias, self.peft_tensors())
            if changed is not bias:
                merged.bias = nn.Parameter(changed.detach().to(bias.dtype), requires_grad=False)
        return merged

    def at_start(self) -> nn.Module:
        """Return a layer that computes what this one computed before it was trained. It has no parameters of its own."""
        return self.base  # type: ignore[no-any-return]

    def peft_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of `peft_keys` as PEFT has them. Every rank of a sharded model has to ask for them."""
        raise NotImplementedError

    def load_peft(self, tensors: dict[str, Tensor]) -> None:
        """Take the values of `tensors`, which have the keys and shapes of `peft_tensors()`."""
        raise NotImplementedError

    @classmethod
    def from_peft(cls, base: Any, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> "AdapterLayer":
        """Return a layer over `base`, the module `name`, as `adapter_config.json` describes it; its values are not loaded."""
        raise NotImplementedError

    @classmethod
    def peft_config(cls, layers: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """Return what `adapter_config.json` says of these layers, all of `model` that are of this class, by module."""
        raise NotImplementedError

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        """Whether an `adapter_config.json` describes this method."""
        return False

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> list[str]:
        """Return what an `adapter_config.json` asks for and this method cannot do, a sentence each."""
        return []

    @classmethod
    def ineffective(cls, layers: list[dict[str, Tensor]]) -> str:
        """Return why tensors of all layers leave every base as it is, such as "every lora_B is zero"; "" if they don't."""
        return ""

    @classmethod
    def merged_bias(cls, bias: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """Return the bias (out,) of the merged layer, from the base's and the tensors of `peft_keys`."""
        return bias

    @classmethod
    def names_in_peft(cls, layers: dict[str, Any]) -> dict[str, str]:
        """Return module -> its name in PEFT's file, where the two differ."""
        return {}

    @classmethod
    def names_in_model(cls, names: list[str], config: dict[str, Any], model: nn.Module) -> dict[str, str]:
        """Return name in PEFT's file -> module of `model`, where the two differ."""
        return {}


class ModulesToSaveLayer(AdapterLayer):
    """A module trained in full beside adapters (PEFT's `modules_to_save`): fp32 weights, compute in the base's dtype."""

    is_beside = True

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

    def peft_tensors(self) -> dict[str, Tensor]:
        return {name: full_tensor(p) for name, p in self.full.named_parameters()}

    def load_peft(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.full.get_parameter(name).data.copy_(tensor)

    @classmethod
    def from_peft(cls, base: Any, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> "AdapterLayer":
        return cls(base)

    @classmethod
    def peft_config(cls, layers: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """PEFT finds modules by the end of their names: whole names where the last part would find others, too."""
        others = [name for name, _ in model.named_modules() if name not in layers]
        ambiguous = {name for name in layers if any(other.endswith(module_name(name)) for other in others)}
        return {"modules_to_save": sorted({name if name in ambiguous else module_name(name) for name in layers})}


def linears(model: nn.Module) -> dict[str, Any]:
    """Return every linear, in 16 or 4 bits, by its full name; grouped experts are not among them."""
    existing = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | QuantizedLayer)}
    return {name: m for name, m in existing.items() if len(shape(m)) == 2}


def grouped_experts(model: nn.Module) -> dict[str, Any]:
    """Return every family's `GroupedLinear`, in 16 or 4 bits, by its full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == "GroupedLinear" or (isinstance(module, QuantizedLayer) and len(module.shape) == 3)
    }


def module_name(full_name: str) -> str:
    """Return the last part of a module's full name: `q_proj` of `model.layers.0.self_attn.q_proj`."""
    return full_name.rpartition(".")[2]


def is_plain_linear(base: Any) -> bool:
    """Whether it gives x W^T + bias, and nothing else is known to happen there."""
    return type(base) is nn.Linear or isinstance(base, QuantizedLayer)


def matmul(x: Tensor, weight: Tensor, *offsets: Tensor) -> Tensor:
    """Return x W^T; for weights (n_experts, out, in), x holds the tokens of each expert in turn, which end at `offsets`."""
    return F.grouped_mm(x, weight.mT, offs=offsets[0]) if offsets else F.linear(x, weight)


def shape(base: Any) -> torch.Size:
    """Return the shape of a layer's weight, whatever it is stored in: (out, in), or (n_experts, out, in)."""
    return base.shape if isinstance(base, QuantizedLayer) else base.weight.shape


def weight_in(dtype: torch.dtype, base: Any, stored: Tensor) -> Tensor:
    """Return the weight of `base`, which keeps it as `stored`, in the dtype of a matmul."""
    return base.dequantize(dtype) if isinstance(base, QuantizedLayer) else stored.to(dtype)


def weight_in_own_dtype(base: Any) -> Tensor:
    """Return the weight of `base` in the dtype that it computes in."""
    return base.dequantize() if isinstance(base, QuantizedLayer) else base.weight.detach()


def dense(base: Any) -> Tensor:
    """Return the weight of `base`, dequantised, in fp32."""
    return weight_in(torch.float32, base, base.weight.detach())


def rounded_sum(base: Any, weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the sum of base and delta, `weight` in fp32, in the dtype of `base`.

    Deltas below half a ULP would leave a 16-bit weight as it was, so rounding is stochastic, the same way each time. The
    values of a 4-bit weight lie anywhere between two 16-bit ones: it stays in fp32, to be rounded to nearest.
    """
    if isinstance(base, QuantizedLayer):
        return weight
    generator = generator or torch.Generator(weight.device).manual_seed(0)
    return stochastic_round(weight.detach(), base.weight.dtype, generator)


def plain_layer(base: Any, weight: Tensor) -> nn.Module:
    """Return a layer like `base` before it was quantised or adapted, with another weight, rounded once to the base's dtype."""
    dtype = base.dtype if isinstance(base, QuantizedLayer) else base.weight.dtype
    with torch.device("meta"):
        if weight.dim() == 2:
            layer: nn.Module = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            layer.bias = base.bias
        else:
            layer = _MergedExperts(base.in_features, base.out_features)
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    return layer


class _MergedExperts(nn.Module):
    """Grouped experts after a merge."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight: nn.Parameter

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return matmul(x, self.weight.to(x.dtype), offsets)
