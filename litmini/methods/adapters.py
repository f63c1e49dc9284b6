"""Adapters as layer swaps: `LoRALinear(base)` takes the place of a linear in any model, by leaf name.

Each class in `lora.py` is one method; `add_adapters` puts it over the linears that are asked for, whatever the model, and
whatever the base: a plain linear, one in 4 bits (`NF4Linear`), or a stack of experts. `peft_format.py` reads adapters from
disk, `peft_save.py` writes them.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.methods.base_layer import AdapterLayer, ModulesToSaveLayer, shape
from litmini.methods.lora import LoRALinear, PiSSALinear
from litmini.methods.nf4 import NF4Linear

STARTS = {"zero": LoRALinear, "pissa": PiSSALinear}


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
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


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
        replace_module(model, name, ModulesToSaveLayer(model.get_submodule(name)))
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
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, module in found.items():
        replace_module(model, name, module.merge(generator))
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
