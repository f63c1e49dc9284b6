"""Adapters as layer swaps: `LoRALinear(base)` takes the place of a linear in any model, by module name.

`add_adapters` puts a method's layer over the linears that are asked for, whatever the model, and whatever the base: a plain
linear, a quantised one (`NF4Linear`), or grouped experts.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.methods.base_layer import (
    AdapterLayer,
    ModulesToSaveLayer,
    QuantizedLayer,
    grouped_experts,
    linears,
    module_name,
    shape,
)
from litmini.methods.lora import LoRALinear, matches, pattern_value


def adapters(model: nn.Module) -> dict[str, Any]:
    """Return every adapter layer in `model`, by the full name of what it stands over."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def add_adapters(model: nn.Module, config: LoraConfig, layer: Callable[..., nn.Module] | None = None) -> list[str]:
    """Freeze `model` and put an adapter over each linear that `config.targets` names; return their full names.

    Args:
        layer: the method's class; by default LoRA, initialized as `config.init` says.

    Raises:
        UserError: a target, pattern or module matches nothing (the message lists the module names that exist), a rank is
            larger than its linear, or the method does not go with such a layer.
    """
    if layer is not None and config.init != "zero":
        raise UserError(f"lora.init {config.init} goes with plain LoRA only.")
    existing = linears(model)
    without = getattr(model, "unadapted", ())
    if refused := sorted({*without} & {*config.targets}):
        raise UserError(f"lora.targets {', '.join(refused)}: PEFT has no LoRA there in this family; leave it out.")
    # a linear that hangs on the model itself is its head
    inner = {name for name in existing if "." in name and module_name(name) not in without}
    existing |= grouped_experts(model)
    names = _targets(existing, inner, config.targets)
    ranks, alphas = _ranks_and_alphas(names, existing, config)
    in_full = _modules_to_save(model, names, config.modules_to_save)
    model.requires_grad_(False)
    make = layer or _lora(config.init)
    for name in names:
        made = make(existing[name], ranks[name], alphas[name], config.dropout, config.rank_stabilized)
        model.set_submodule(name, made.train(existing[name].training))
    for name in in_full:
        model.set_submodule(name, ModulesToSaveLayer(model.get_submodule(name)))
    return names


def experts_left_out(model: nn.Module) -> str:
    """Return how many parameters of experts no adapter of `model` covers, as a sentence; empty: all are, or it has none.

    The same where a family has no LoRA over some linears.
    """
    if not adapters(model):
        return ""
    experts = {name: one for name, one in grouped_experts(model).items() if not name.endswith(".base")}
    bare = {name: one for name, one in linears(model).items() if module_name(name) in getattr(model, "unadapted", ())}
    names = ", ".join(sorted({module_name(name) for name in bare or experts}))
    number = sum(math.prod(shape(one)) for one in (bare or experts).values())
    if bare:
        return f"no adapter covers {names}, {number:,} parameters, as PEFT has none there"
    text = f"no adapter covers the experts ({names}), {number:,} parameters: name them in lora.targets to adapt them"
    return text if experts else ""


def keep_casts(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let adapters cast their factors to the compute dtype once for each step of `optimizer`, not in each forward.

    Their values must change in its steps only; and not for sharded models, whose parameters come and go.
    """
    if getattr(optimizer, "in_backward", False):  # its steps are those of single parameters
        return
    layers = [layer for layer in adapters(model).values() if isinstance(layer, LoRALinear)]
    for layer in layers:
        layer.casts = {}

    def forget(*_: Any) -> None:
        for layer in layers:
            layer.casts = {}

    optimizer.register_step_post_hook(forget)


def _lora(init: str) -> type[LoRALinear]:
    """Return LoRA's layer that starts as `lora.init` says."""
    if init == "pissa":
        from litmini.methods.pissa import PiSSALinear

        return PiSSALinear
    return LoRALinear


def _targets(existing: dict[str, Any], inner: set[str], targets: list[str]) -> list[str]:
    """Return the linears that `targets` means, by full name."""
    choices = _module_names(existing)
    if unmatched := set(targets) - {"all-linear"} - {module_name(name) for name in existing}:
        raise UserError(
            f"lora.targets {', '.join(sorted(unmatched))} match no linear of this model; there are: {choices}, "
            f"and all-linear for every one but the head."
        )
    names = [n for n in existing if module_name(n) in targets or ("all-linear" in targets and n in inner)]
    if not names:
        raise UserError(f"lora.targets is empty; there are: {choices}, or all-linear.")
    return names


def _ranks_and_alphas(
    names: list[str], existing: dict[str, Any], config: LoraConfig
) -> tuple[dict[str, int], dict[str, float]]:
    for setting, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if unmatched := [key for key in pattern if not any(matches(key, name) for name in names)]:
            raise UserError(
                f"lora.{setting} {', '.join(unmatched)} matches no target; there are: {_module_names(names)}."
            )
    ranks = {n: pattern_value(config.rank_pattern, n, config.rank) for n in names}
    max_rank = {n: min(existing[n].in_features, existing[n].out_features) for n in names}
    # beside large modules, small ones may have a rank that is above their size, as in PEFT
    largest = max(max_rank.values())
    shared = {n for n in names if ranks[n] == config.rank <= largest and config.init != "pissa"}
    if too_large := [n for n in names if ranks[n] > max_rank[n] and n not in shared]:
        n = min(too_large, key=lambda name: max_rank[name])
        raise UserError(f"lora.rank {ranks[n]} is outside 1..{max_rank[n]}, the smaller size of {n}.")
    return ranks, {n: pattern_value(config.alpha_pattern, n, config.alpha) for n in names}


def _modules_to_save(model: nn.Module, targets: list[str], wanted: list[str]) -> list[str]:
    """Return the modules to train in full, by full name."""
    existing = [n for n, m in model.named_modules() if n and not list(m.children()) and list(m.parameters(False))]
    matching = {w: [n for n in existing if module_name(n) == w] for w in wanted}
    if missing := [w or "''" for w, names in matching.items() if not names]:
        parts = (
            "; a module with parts is not one of them"
            if any(module_name(n) in missing for n, _ in model.named_modules())
            else ""
        )
        raise UserError(
            f"lora.modules_to_save {', '.join(missing)} matches no module; there are: {_module_names(existing)}{parts}."
        )
    in_full = [name for names in matching.values() for name in names]
    if both := sorted({module_name(n) for n in in_full} & {module_name(n) for n in targets}):
        raise UserError(f"{', '.join(both)}: in both lora.targets and lora.modules_to_save, expected one of them.")
    if packed := sorted({module_name(n) for n in in_full if isinstance(model.get_submodule(n), QuantizedLayer)}):
        raise UserError(f"lora.modules_to_save {', '.join(packed)}: in 4 bits, which are not trained.")
    return in_full


def _module_names(names: Iterable[str]) -> str:
    return ", ".join(sorted({module_name(name) for name in names}))


def learning_rate_ratios(model: nn.Module, config: LoraConfig) -> dict[str, float]:
    """Return parameter name -> its learning rate, relative to the others (LoRA+, arXiv 2402.12354)."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and module_name(name) == "lora_B"]
    return dict.fromkeys(names, config.plus_ratio)


def merge_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Replace every adapter in `model` by its merged layer. A merged head is no longer tied to the embedding.

    Returns:
        What was replaced, by name; `restore_adapters` puts it back, bit by bit.
    """
    replaced = adapters(model)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, module in replaced.items():
        model.set_submodule(name, module.merge(generator))
    return replaced


def restore_adapters(model: nn.Module, replaced: dict[str, nn.Module]) -> None:
    """Undo `merge_adapters` or `remove_adapters`, exactly."""
    for name, module in replaced.items():
        model.set_submodule(name, module)


def remove_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Leave the bare base in place of every adapter; return what was there."""
    removed = adapters(model)
    for name, module in removed.items():
        model.set_submodule(name, module.base)
    return removed
