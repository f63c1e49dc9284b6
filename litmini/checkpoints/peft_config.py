"""What PEFT's `adapter_config.json` says: its types, and the modules that it names."""

import re
import reprlib
from collections.abc import Callable
from typing import Any

from torch import nn

from litmini.models.hf_config import EXPECTED, read_value
from litmini.system import time_limit

SECONDS = 5
"""Longest time that the expressions of an adapter may take on all names of a model."""

TYPES: dict[type, tuple[str, ...]] = {  # of PEFT's settings that are read
    str: ("peft_type",),
    int: ("r",),
    float: ("lora_alpha", "lora_dropout"),
    bool: ("use_dora", "use_rslora", "lora_bias", "use_qalora", "fan_in_fan_out"),
    dict: ("rank_pattern", "alpha_pattern"),
    list: ("modules_to_save", "target_parameters"),
}


ONE_OR_MORE = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules"), str),
    "layers_to_transform": int,
}


def check_types(config: dict[str, Any]) -> None:
    """Raise ValueError for a setting of another type than PEFT's, or an expression that is none."""
    for kind, keys in TYPES.items():
        for key in keys:
            value = read_value(config, key, kind, None)
            if kind is list and not all(isinstance(name, str) and name for name in value or ()):
                raise ValueError(f"{key} = {reprlib.repr(value)}, expected a list of names")
    for key, item in ONE_OR_MORE.items():
        value = config.get(key)
        if not all(type(one) is item for one in (value if isinstance(value, list) else [value]) if value is not None):
            raise ValueError(f"{key} = {reprlib.repr(value)}, expected {EXPECTED[item]} or a list of that")
    tokens = config.get("trainable_token_indices")
    lists = list(tokens.values()) if isinstance(tokens, dict) else [] if tokens is None else [tokens]
    if not all(
        isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids) for ids in lists
    ) or not all(len(set(ids)) == len(ids) for ids in lists):
        found = reprlib.repr(tokens)
        raise ValueError(
            f"trainable_token_indices = {found}, expected different token ids, or such for names of modules"
        )
    patterns = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    patterns += [value for key in ONE_OR_MORE if isinstance(value := config.get(key), str)]
    patterns += value if isinstance(value := config.get("layers_pattern"), list) else []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{reprlib.repr(pattern)} is no regular expression: {error}") from None


def named_modules(
    linears: dict[str, Any],
    experts: dict[str, Any],
    modules: dict[str, nn.Module],
    config: dict[str, Any],
    whole_name: Callable[[str], str] = str,
) -> dict[str, str]:
    """Return module of the model -> the setting that names it, as PEFT reads `adapter_config.json`.

    Args:
        whole_name: module -> its name in the model that PEFT puts the adapter over.

    Raises:
        UserError: an expression takes too long.
    """
    keys = "target_modules, exclude_modules and layers_pattern"
    with time_limit(SECONDS, f"{keys} take more than {SECONDS} s on the modules of this model; expected simpler ones."):
        own = {whole_name(name): name for name in (*modules, *linears, *experts)}
        by_name = [{whole_name(name): module for name, module in some.items()} for some in (linears, experts, modules)]
        return {
            own[name]: setting for name, setting in _named_modules(by_name[0], by_name[1], by_name[2], config).items()
        }


def _named_modules(
    linears: dict[str, Any], experts: dict[str, Any], modules: dict[str, nn.Module], config: dict[str, Any]
) -> dict[str, str]:
    targets, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    every = targets == "all-linear"  # but the head
    names = [name for name in linears if ("." in name if every else _matches(name, targets))]
    names = [name for name in names if not _matches(name, excluded)]
    if (wanted := config.get("layers_to_transform")) is not None:
        indices = [wanted] if isinstance(wanted, int) else wanted
        patterns = config.get("layers_pattern") or r"[^.]*"
        above = "|".join([patterns] if isinstance(patterns, str) else patterns)
        found = {name: re.match(rf".*\.(?:{above})\.(?P<layer>\d+)\.", name) for name in names}
        names = [name for name, match in found.items() if match and int(match["layer"]) in indices]
    parameters, in_full = config.get("target_parameters") or [], tuple(config.get("modules_to_save") or ())
    whole = [name for name, m in modules.items() if name.endswith(in_full) and list(m.parameters())]
    return (
        dict.fromkeys(names, "target_modules")
        | dict.fromkeys((name for name in experts if _matches(name, parameters)), "target_parameters")
        | dict.fromkeys((name for name in linears if _matches(f"{name}.weight", parameters)), "target_parameters")
        | dict.fromkeys(whole, "modules_to_save")
    )


def _matches(name: str, targets: str | list[str]) -> bool:
    """Whether PEFT's setting means the module `name`: an expression for all of it, or ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
