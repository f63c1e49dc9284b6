"""Reading and writing `config.json` for all families: field tables, rotary settings in both spellings, refusals.

Nothing here knows a family: what it reads, writes and implements stands in the tables of its own file.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Table = dict[str, str | tuple[Any, ...]]
"""Config's field -> key of config.json, which must be there; or (key, value if it is missing[, type]).

Values have the type of the value if it is missing; a whole number where there is none, but for `model_type`.
"""

TOWERS = ("vision_config", "audio_config")
LAYER_TYPES = {"full_attention", "sliding_attention"}
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}
TYPES = {
    **{key: bool for key in ("is_causal", "use_bidirectional_attention", "use_sliding_window", "tie_word_embeddings")},
    **{key: int for key in ("sliding_window", "max_window_layers", "num_key_value_heads", "head_dim")},
    **{key: int for key in ("max_position_embeddings", "original_max_position_embeddings")},
    **{key: dict for key in ("rope_scaling", "rope_parameters")},
}
MAX_INT = 2**31 - 1
MAX_LAYERS = 10_000  # more would take minutes and gigabytes, on the meta device, too
REQUIRED: Any = object()


@dataclass(frozen=True)
class Yarn:
    """How YaRN (arXiv 2309.00071) stretches rotary frequencies beyond the length of pretraining: low ones by `factor`."""

    factor: float
    original_positions: int
    attention_factor: float  # on cos and sin, so attention scores are larger by its square
    beta_fast: float = 32.0  # turns within the original length: frequencies from here on are kept
    beta_slow: float = 1.0  # up to here they are stretched; between, blended
    truncate: bool = True  # the bounds of the blend are whole pairs of the head


def read_value(hf: Mapping[str, Any], key: str, kind: type, default: Any = REQUIRED, zero: bool = True) -> Any:
    """Return the value of a key of config.json, or `default` if it is missing; None: it is null, and need not be there.

    Args:
        kind: bool, int, float, str, list or dict. Numbers are finite and not below zero; floats may be written as ints.
        zero: whether a number may be zero.

    Raises:
        KeyError: a key that must be there is missing.
        ValueError: the value has another type.
    """
    value = hf[key] if default is REQUIRED else hf.get(key, default)
    if value is None and default is not REQUIRED:
        return None
    if kind is float and type(value) is int and 0 <= value <= MAX_INT:
        value = float(value)
    fits = type(value) is kind
    if kind in (int, float):
        most = 1e30 if kind is float else MAX_LAYERS if "layer" in key else MAX_INT
        fits = fits and (zero or value != 0) and 0 <= value <= most  # NaN is not
    if not fits:
        raise ValueError(f"{key} = {reprlib.repr(value)}, expected {EXPECTED[kind]}{' above 0' * (not zero)}")
    return value


def read_fields(table: Table, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a family's `Config` that its table names, each of its type; sizes are above zero.

    As in transformers, without n_kv_heads there are n_heads of them, and without head_dim it is dim // n_heads.

    Raises:
        KeyError: a key that must be there is missing.
        ValueError: a value is of another type, or an impossible size.
    """
    fields: dict[str, Any] = {}
    for field, row in table.items():
        key, default, *kinds = (row, REQUIRED) if isinstance(row, str) else row
        implied = (str if field == "model_type" else int) if default in (REQUIRED, None) else type(default)
        implied_by_others = field in ("n_kv_heads", "head_dim")
        kind, zero = kinds[0] if kinds else implied, implied is not int or implied_by_others
        fields[field] = read_value(hf, key, kind, default, zero)
        if fields[field] is None and default is not None and not implied_by_others:
            raise ValueError(f"{key} is null, expected {EXPECTED[kind]}")
    if "n_kv_heads" in fields:
        fields["n_kv_heads"] = fields["n_kv_heads"] or fields["n_heads"]
    if "head_dim" in fields:
        fields["head_dim"] = fields["head_dim"] or fields["dim"] // fields["n_heads"]
    return fields


def write_fields(table: Table, config: Any) -> dict[str, Any]:
    """Return the entries of config.json that a family's table names: the way back of `read_fields`."""
    return {row if isinstance(row, str) else row[0]: getattr(config, field) for field, row in table.items()}


def refuse(
    file: str, hf: Mapping[str, Any], rope: Mapping[str, Any], implemented: Mapping[str, object], **checks: bool
) -> None:
    """Raise for what config.json asks for and a family file does not implement: all of it in one error.

    Args:
        file: the family's, for the message.
        rope: what `read_rope` gave; its keys are looked up in it, the others in hf.
        implemented: key -> its only implemented value, or a tuple of them. False stands for all that says no (null, 0,
            an empty list) and True for any number that says yes, but no text. A missing key is fine.
        checks: key -> whether its value is implemented, where a table cannot say so. Without `layer_types` among them,
            all layers have full attention; without `mscale` and `truncate`, these variants of YaRN are refused.

    Raises:
        ValueError: with each such key and its value.
    """
    found = {**hf, **rope}
    verdicts = {key: _is_implemented(found[key], values) for key, values in implemented.items() if key in found}
    verdicts |= {"layer_types": has_layer_types(hf, "full_attention")} | checks
    verdicts |= {"quantization_config": hf.get("quantization_config") is None}
    for key, kind in TYPES.items():  # of what some of the families read: a value of another type means nothing anywhere
        read_value(hf, key, kind, None)
    verdicts |= {"is_causal": hf.get("is_causal") is not False}  # transformers heeds it in every family
    verdicts |= {"use_bidirectional_attention": not hf.get("use_bidirectional_attention")}
    variants = {"mscale": not rope.get("mscale"), "truncate": rope.get("truncate", True)}  # of YaRN
    verdicts |= {key: is_fine for key, is_fine in variants.items() if key not in checks}
    if refused := [f"{key} = {reprlib.repr(found.get(key))}" for key, is_fine in verdicts.items() if not is_fine]:
        raise ValueError(f"not implemented in {file}: {', '.join(refused)}")


def _is_implemented(value: object, values: object) -> bool:
    if values is False:
        return not value and not isinstance(value, str)
    if values is True:
        return isinstance(value, int | float) and 0 < abs(value) < math.inf
    all_values = values if isinstance(values, tuple) else (values,)
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in all_values)


def towers_of(raw: Mapping[str, Any]) -> list[str]:
    """Return the keys of a config.json that describe a vision or audio tower."""
    return [key for key in TOWERS if raw.get(key) not in (None, {})]


def has_layer_types(hf: Mapping[str, Any], kind: str) -> bool:
    """Whether `layer_types` is missing, or says that every layer is of this kind."""
    return all(layer_type == kind for layer_type in read_value(hf, "layer_types", list, None) or ())


def read_rope(
    hf: Mapping[str, Any], theta: float = 10_000.0, partial: float = 1.0, layer_type: str | None = None
) -> dict[str, Any]:
    """Return the rotary settings: `rope_type`, `rope_theta`, `partial_rotary_factor`, and what goes with the type.

    transformers 4 writes `rope_theta`, and `rope_scaling` with a `type` or `rope_type`; transformers 5 writes all of it into
    `rope_parameters`, by type of layer where these differ. Of both, `rope_scaling` wins: someone has added it by hand.

    Args:
        theta, partial: what holds where config.json says nothing.
        layer_type: whose settings to return where they differ; None: they do not differ in this family.

    Raises:
        ValueError: a value has another type, or settings differ by type of layer and must not.
    """
    scaling, rope = (read_value(hf, key, dict, None) or {} for key in ("rope_scaling", "rope_parameters"))
    by_layer_type = layer_type is not None and bool(LAYER_TYPES & rope.keys())
    if nested := [key for key, value in rope.items() if isinstance(value, dict) and not by_layer_type]:
        raise ValueError(f"rope_parameters has settings of {', '.join(nested)}, expected those of all layers at once")
    if layer_type is not None and by_layer_type:
        rope = {**(read_value(rope, layer_type, dict, None) or {}), **scaling}
    else:
        rope = scaling or rope
    of_type = scaling or rope
    thetas = (*(read_value(found, "rope_theta", float, None, zero=False) for found in (rope, hf)), theta)
    partials = (*(read_value(found, "partial_rotary_factor", float, None) for found in (rope, hf)), partial)
    return {
        **rope,
        "rope_type": of_type.get("rope_type", of_type.get("type", "default")),
        "rope_theta": next(value for value in thetas if value is not None),
        "partial_rotary_factor": next(value for value in partials if value is not None),
    }


def read_yarn(rope: dict[str, Any], max_positions: int) -> Yarn | None:
    """Return YaRN's settings from what `read_rope` gave; None: rotary settings of another type."""
    if rope["rope_type"] != "yarn":
        return None
    factor = read_value(rope, "factor", float, zero=False)
    original = read_value(rope, "original_max_position_embeddings", int, None, zero=False)
    mscale, mscale_all = (read_value(rope, key, float, None) for key in ("mscale", "mscale_all_dim"))
    grown = 0.1 * math.log(max(factor, 1.0))
    implied = (grown * mscale + 1.0) / (grown * mscale_all + 1.0) if mscale and mscale_all else grown + 1.0
    return Yarn(
        factor=factor,
        original_positions=original or max_positions,
        attention_factor=read_value(rope, "attention_factor", float, None, zero=False) or implied,
        beta_fast=read_value(rope, "beta_fast", float, None) or 32.0,
        beta_slow=read_value(rope, "beta_slow", float, None) or 1.0,
        truncate=read_value(rope, "truncate", bool, True) is not False,
    )


def write_rope(
    theta: float, scaling: dict[str, Any] | Yarn | None = None, local_theta: float | None = None
) -> dict[str, Any]:
    """Return the rotary settings as transformers 4 and 5 read them.

    Args:
        scaling: YaRN's settings, or `rope_type` and what goes with it; None: no scaling.
        local_theta: of layers with a sliding window, where they have rotary settings of their own, never scaled.
    """
    if isinstance(scaling, Yarn):
        scaling = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_positions,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            **({} if scaling.truncate else {"truncate": False}),
        }
    parameters: dict[str, Any] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    if local_theta is not None:
        local = {"rope_type": "default", "rope_theta": local_theta}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}


def layer_types(n_layers: int, full_every: int) -> list[str]:
    """Return `layer_types` of a model whose layers have a sliding window, all but every `full_every`-th."""
    return ["sliding_attention" if (i + 1) % full_every else "full_attention" for i in range(n_layers)]
