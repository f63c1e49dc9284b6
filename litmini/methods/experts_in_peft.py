"""How PEFT names LoRA over experts: not by modules, but by parameters (`target_parameters`)."""

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import nn

from litmini.methods.base_layer import grouped_experts, module_name

GROUPED = ("gate_up_proj", "down_proj")  # experts' weights, in the order in which PEFT wraps them


def parameters_in_peft(layers: dict[str, Any], expert_linears: Collection[str]) -> dict[str, str]:
    """Return layer -> its parameter, of those that PEFT names so: experts, and linears with the names of experts in files.

    In `target_modules` PEFT takes such a name for that of experts, also where a linear beside them has it (DeepSeek-V3).

    Args:
        expert_linears: the names of experts' linears where files have experts one by one; else none.
    """
    grouped = {name: name for name, layer in layers.items() if layer.lora_A.dim() == 3}
    beside = (name for name in layers.keys() - grouped.keys() if module_name(name) in expert_linears)
    return grouped | {name: f"{name}.weight" for name in beside}


def names_in_peft(layers: dict[str, Any]) -> dict[str, str]:
    """PEFT wraps the module that holds the experts once for each of their weights: the last one is outermost."""
    holders = {n: n.rpartition(".")[0] for n, layer in layers.items() if layer.lora_A.dim() == 3}
    names, depths = {}, Counter[str]()
    for name, holder in reversed(holders.items()):
        names[name] = holder + ".base_layer" * depths[holder]
        depths[holder] += 1
    return names


def names_in_model(names: list[str], config: dict[str, Any], model: nn.Module) -> dict[str, str]:
    """Return PEFT's name -> the model's, of adapters over experts: the inverse of `names_in_peft`."""
    targets = {module_name(target) for target in config["target_parameters"]}
    wrapped = [kind for kind in GROUPED if kind in targets]
    # transformers 5 gave the module that holds the experts another name: layers and weights say which is meant
    experts = {_layer_and_weight(name): name for name in grouped_experts(model)}
    result = {}
    for name in names:
        holder = name.removesuffix(".base_layer")
        if wrapped and (holder != name or module_name(holder) == "experts"):
            full_name = f"{holder}.{wrapped[0] if holder != name else wrapped[-1]}"
            result[name] = experts.get(_layer_and_weight(full_name), full_name)
    return result


def _layer_and_weight(name: str) -> tuple[str, str]:
    """`model.layers.0` and `experts.down_proj` of `model.layers.0.mlp.experts.down_proj`."""
    layer = re.match(r"(.*\.\d+)?", name)
    return layer[0] if layer else "", ".".join(name.split(".")[-2:])
