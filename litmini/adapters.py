"""Adapters as layer swaps: `LoRALinear(base)` takes the place of a linear in any model, by leaf name.

Each class here is one method; `add_adapters` puts it over the linears that are asked for, whatever the model, and
whatever the base: a plain linear, one in 4 bits (`NF4Linear`), or a stack of experts. `peft_format.py` saves and loads.
"""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.config import LoraConfig, UserError
from litmini.quantize import NF4Linear
from litmini.sharding import whole

FLOOR = 1e-6  # smallest norm of a weight's row in DoRA: rows of zeros stay finite


class Swapped(nn.Module):
    """What stands in a model over a layer `base`. `merge()` gives a plain layer that does the same."""

    base: Any


class LoRALinear(Swapped):
    """y = base(x) + (alpha / rank) * B A dropout(x), with the base frozen (LoRA, arXiv 2106.09685).

    A (rank, in) and B (out, rank) are kept in fp32 and multiplied in x's dtype; over a stack of experts there is one pair
    for each. B starts at zero: so does the change. rank_stabilized: alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
    """

    def __init__(self, base: Any, rank: int, alpha: float, dropout: float = 0.0, rank_stabilized: bool = False) -> None:
        super().__init__()
        self.base, self.alpha, self.rank_stabilized = base, alpha, rank_stabilized
        self.scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.dropout = nn.Dropout(dropout)
        stack, device = shape(base)[:-2], base.weight.device  # (n_experts,) or ()
        self.lora_A = nn.Parameter(torch.empty(*stack, rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*stack, base.out_features, rank, dtype=torch.float32, device=device))
        for one in self.lora_A.data.view(-1, rank, base.in_features):
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))

    def forward(self, x: Tensor, *ends: Tensor) -> Tensor:
        return self.change(x, self.base(x, *ends), *ends)

    def change(self, x: Tensor, y: Tensor, *ends: Tensor) -> Tensor:
        """y = base(x) as the adapter makes it. `ends`: of each expert's rows in x, where the base is a stack."""
        down, up = self.lora_A.to(x.dtype), (self.lora_B * self.scale).to(x.dtype)  # (..., rank, in), (..., out, rank)
        if ends:
            idle = -down.shape[1] % 8  # grouped products want rows of whole 16 bytes
            low = product(self.dropout(x), F.pad(down, (0, 0, 0, idle)), *ends)
            return y + product(low, F.pad(up, (0, idle)), *ends)
        low = product(self.dropout(x), down)  # (..., rank)
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), up.T).view_as(y)  # the sum costs no pass of its own

    def delta(self) -> Tensor:
        """The change of the base weight, (..., out, in) in fp32."""
        return self.scale * (self.lora_B @ self.lora_A)

    def merged_weight(self) -> Tensor:
        """(..., out, in) in fp32."""
        return dense(self.base) + self.delta()

    def merge(self) -> nn.Module:
        """A plain linear (or stack) that does the same: the change is added in fp32 and rounded once to the base's dtype.

        The merged layer is a new one: putting this one back in its place undoes the merge, bit by bit.
        """
        return plain_layer(self.base, self.merged_weight())

    def saved(self) -> tuple[float, dict[str, Tensor]]:
        """(alpha, tensors) that say the same to whoever puts them over the original base."""
        return self.alpha, {name: whole(p) for name, p in self.named_parameters() if name.startswith("lora_")}


class PiSSALinear(LoRALinear):
    """LoRA that starts as the `rank` largest singular values of the weight, which the base then lacks (arXiv 2404.02948).

    On disk it is an ordinary adapter of twice the rank over the original base: B A - B0 A0.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, base: Any, *settings: Any, **options: Any) -> None:
        if not isinstance(base, nn.Linear):
            raise UserError("lora.init pissa needs plain 16-bit linears, not 4-bit or stacked ones.")
        super().__init__(base, *settings, **options)
        weight, rank = dense(base), len(self.lora_A)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same start when a run goes on
            u, s, v = torch.svd_lowrank(weight, q=min(2 * rank + 8, *weight.shape), niter=8)
        root = (s[:rank] / self.scale).sqrt()
        self.lora_A.data, self.lora_B.data = (root[:, None] * v[:, :rank].T).contiguous(), u[:, :rank] * root
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())
        self.base = plain_layer(base, weight - self.delta().detach())

    def saved(self) -> tuple[float, dict[str, Tensor]]:
        a, b = whole(self.lora_A), whole(self.lora_B)
        both = {"lora_A": torch.cat((a, self.start_A)), "lora_B": torch.cat((b, -self.start_B), 1)}
        return self.alpha * (math.sqrt(2) if self.rank_stabilized else 2), both  # the same scale at twice the rank


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

    def change(self, x: Tensor, y: Tensor, *ends: Tensor) -> Tensor:
        gain = self.gain()
        scaled = _Scale.apply(super().change(x, y), gain)
        return scaled if self.base.bias is None else scaled + ((1 - gain) * self.base.bias).to(y.dtype)

    def merged_weight(self) -> Tensor:
        weight = dense(self.base)
        return (self.lora_magnitude_vector / self.norm(weight))[:, None] * (weight + self.delta())


class _Scale(torch.autograd.Function):
    """y * gain, in y's dtype, with gain (out,) in fp32: rounded once, and nothing in fp32 as large as y."""

    @staticmethod
    def forward(ctx, y: Tensor, gain: Tensor) -> Tensor:  # type: ignore[override,no-untyped-def]
        ctx.save_for_backward(y, gain)
        return torch.mul(y, gain, out=torch.empty_like(y))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override,no-untyped-def]
        y, gain = ctx.saved_tensors
        d_y = torch.mul(grad, gain, out=torch.empty_like(grad)) if ctx.needs_input_grad[0] else None
        d_gain = (grad * y).flatten(0, -2).sum(0, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        return d_y, d_gain


class FullLayer(Swapped):
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

    def merge(self) -> nn.Module:
        merged = copy.deepcopy(self.base)
        for name, weight in self._rounded().items():
            merged.get_parameter(name).data = weight.detach()
        return merged


STARTS = {"zero": LoRALinear, "pissa": PiSSALinear}


def product(x: Tensor, weight: Tensor, *ends: Tensor) -> Tensor:
    """x W^T; or, for weights (n_experts, out, in), of each expert's rows of x, which end at `ends`."""
    return F.grouped_mm(x, weight.mT, offs=ends[0]) if ends else F.linear(x, weight)


def shape(base: Any) -> torch.Size:
    """Of a layer's weight, whatever it is stored in: (out, in), or (n_experts, out, in)."""
    return base.shape if isinstance(base, NF4Linear) else base.weight.shape


def weight_as_stored(base: Any) -> Tensor:
    """The weight that `base` multiplies with, in the dtype that it computes in."""
    return base.dequantize() if isinstance(base, NF4Linear) else base.weight.detach()


def dense(base: Any) -> Tensor:
    """The weight that `base` multiplies with, in fp32."""
    return base.dequantize(torch.float32) if isinstance(base, NF4Linear) else base.weight.detach().float()


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


def leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def linears(model: nn.Module) -> dict[str, Any]:
    """Every linear, in 16 or 4 bits, by its full name; stacks of experts are not among them."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | NF4Linear)}
    return {name: m for name, m in found.items() if len(shape(m)) == 2}


def experts(model: nn.Module) -> dict[str, Any]:
    """Every stack of experts, in 16 or 4 bits, by its full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == "GroupedLinear" or (isinstance(module, NF4Linear) and len(module.shape) == 3)
    }


def adapters(model: nn.Module) -> dict[str, Any]:
    """Every adapter in `model`, by the full name of what it covers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def add_adapters(model: nn.Module, config: LoraConfig, layer: Callable[..., nn.Module] | None = None) -> list[str]:
    """Freeze `model` and put an adapter over each linear that `config.targets` names; returns their names.

    Args:
        layer: the method's class; by default LoRA, started as `config.init` says.

    Raises:
        UserError: a target, pattern or module matches nothing (the message lists the leaf names there), a rank is larger
            than its linear, or the method does not go with such a layer.
    """
    if layer is not None and config.init != "zero":
        raise UserError(f"lora.init {config.init} goes with plain LoRA only.")
    there = linears(model)
    inner = {name for name in there if "." in name}  # a linear that hangs on the model itself is its head
    there |= experts(model)
    names = _targets(there, inner, config.targets)
    ranks = {n: pattern_value(config.rank_pattern, n, config.rank) for n in names}
    alphas = {n: pattern_value(config.alpha_pattern, n, config.alpha) for n in names}
    for group, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if idle := [key for key in pattern if not any(matches(key, name) for name in names)]:
            raise UserError(f"lora.{group} {', '.join(idle)} matches no target; there are: {_leaves(names)}.")
    largest = {n: min(there[n].in_features, there[n].out_features) for n in names}
    if wide := [n for n in names if ranks[n] > largest[n]]:
        n = min(wide, key=lambda name: largest[name])
        raise UserError(f"lora.rank {ranks[n]} is outside 1..{largest[n]}, the smaller size of {n}.")
    saved = {
        leaf: [n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] == leaf] for leaf in config.modules_to_save
    }
    if lost := [leaf for leaf, found in saved.items() if not found]:
        all_leaves = _leaves([n for n, m in model.named_modules() if n and any(True for _ in m.parameters(False))])
        raise UserError(f"lora.modules_to_save {', '.join(lost)} matches no module; there are: {all_leaves}.")
    whole = [name for found in saved.values() for name in found]
    if both := sorted({leaf(n) for n in whole} & {leaf(n) for n in names}):
        raise UserError(f"{', '.join(both)}: in both lora.targets and lora.modules_to_save, expected one of them.")
    if packed := sorted({leaf(n) for n in whole if isinstance(model.get_submodule(n), NF4Linear)}):
        raise UserError(f"lora.modules_to_save {', '.join(packed)}: in 4 bits, which are not trained.")
    model.requires_grad_(False)
    make = layer or STARTS[config.init]
    for name in names:
        made = make(there[name], ranks[name], alphas[name], config.dropout, config.rank_stabilized)
        replace_module(model, name, made.train(there[name].training))
    for name in whole:
        replace_module(model, name, FullLayer(model.get_submodule(name)))
    return names


def _targets(there: dict[str, Any], inner: set[str], wanted: list[str]) -> list[str]:
    leaves = _leaves(list(there))
    if unmatched := set(wanted) - {"all-linear"} - {leaf(name) for name in there}:
        raise UserError(
            f"lora.targets {', '.join(sorted(unmatched))} match no linear of this model; there are: {leaves}, "
            f"and all-linear for every one but the head."
        )
    names = [n for n in there if leaf(n) in wanted or ("all-linear" in wanted and n in inner)]
    if not names:
        raise UserError(f"lora.targets is empty; there are: {leaves}, or all-linear.")
    return names


def _leaves(names: list[str]) -> str:
    return ", ".join(sorted({leaf(name) for name in names}))


def matches(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` means the layer `name`: the end of it, from a dot on, as a regular expression."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def pattern_value(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if matches(key, name)), default)


def learning_rate_ratios(model: nn.Module, config: LoraConfig) -> dict[str, float]:
    """Parameter name -> its learning rate, relative to the others (LoRA+, arXiv 2402.12354)."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and leaf(name) == "lora_B"]
    return dict.fromkeys(names, config.plus_ratio)


def merge_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Replace every adapter in `model` by its merged layer. A merged head is no longer tied to the embedding.

    Returns:
        What was replaced, by name; `restore_adapters` puts it back, bit by bit.
    """
    found = adapters(model)
    for name, module in found.items():
        replace_module(model, name, module.merge())
    return found


def restore_adapters(model: nn.Module, replaced: dict[str, nn.Module]) -> None:
    """Undo `merge_adapters` or `remove_adapters`, exactly."""
    for name, module in replaced.items():
        replace_module(model, name, module)


def remove_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Leave the bare base in place of every adapter; returns what was there."""
    found = adapters(model)
    for name, module in found.items():
        replace_module(model, name, module.base)
    return found
