"""Reading and writing `config.json` for all families: field tables, rotary settings in both spellings, refusals.

Nothing here knows a family: what it reads, writes and implements stands in the tables of its own file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Table = dict[str, str | tuple[Any, ...]]
"""Config's field -> key of config.json, which must be there; or (key, value if it is missing[, conversion])."""

LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Yarn:
    """How YaRN (arXiv 2309.00071) stretches rotary frequencies beyond the length of pretraining: low ones by `factor`."""

    factor: float
    original_positions: int
    attention_factor: float  # on cos and sin, so attention scores are larger by its square
    beta_fast: float = 32.0  # turns within the original length: frequencies from here on are kept
    beta_slow: float = 1.0  # up to here they are stretched; between, blended


def read_fields(table: Table, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a family's `Config` that its table names.

    As in transformers, without n_kv_heads there are n_heads of them, and without head_dim it is dim // n_heads.

    Raises:
        KeyError: a key that must be there is missing.
    """
    fields: dict[str, Any] = {}
    for field, row in table.items():
        if isinstance(row, str):
            fields[field] = hf[row]
        else:
            key, default, *conversion = row
            value = hf.get(key, default)
            fields[field] = conversion[0](value) if conversion and value is not None else value
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
            an empty list) and True for all that says yes. A missing key is fine.
        checks: key -> whether its value is implemented, where a table cannot say so.

    Raises:
        ValueError: with each such key and its value.
    """
    found = {**hf, **rope}
    verdicts = {key: _is_implemented(found[key], values) for key, values in implemented.items() if key in found}
    verdicts |= {**checks, "quantization_config": hf.get("quantization_config") is None}
    verdicts |= {"mscale": not rope.get("mscale"), "truncate": rope.get("truncate", True)}  # variants of YaRN
    if refused := [f"{key} = {found.get(key)!r}" for key, is_fine in verdicts.items() if not is_fine]:
        raise ValueError(f"not implemented in {file}: {', '.join(refused)}")


def _is_implemented(value: object, values: object) -> bool:
    if isinstance(values, bool):
        return bool(value) is values
    return value in (values if isinstance(values, tuple) else (values,))


def read_rope(
    hf: Mapping[str, Any], theta: float = 10_000.0, partial: float = 1.0, layer_type: str = "full_attention"
) -> dict[str, Any]:
    """Return the rotary settings: `rope_type`, `rope_theta`, `partial_rotary_factor`, and what goes with the type.

    transformers 4 writes `rope_theta`, and `rope_scaling` with a `type` or `rope_type`; transformers 5 writes all of it into
    `rope_parameters`, by type of layer where these differ. Of both, `rope_scaling` wins: someone has added it by hand.

    Args:
        theta, partial: what holds where config.json says nothing.
        layer_type: whose settings to return where they differ.
    """
    scaling, rope = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    by_layer_type = bool(LAYER_TYPES & rope.keys())
    rope = {**(rope.get(layer_type) or {}), **scaling} if by_layer_type else scaling or rope
    of_type = scaling or rope
    partials = (rope.get("partial_rotary_factor"), hf.get("partial_rotary_factor"), partial)
    return {
        **rope,
        "rope_type": of_type.get("rope_type", of_type.get("type", "default")),
        "rope_theta": float(rope.get("rope_theta", hf.get("rope_theta") or theta)),
        "partial_rotary_factor": next(value for value in partials if value is not None),
    }


def read_yarn(rope: dict[str, Any], max_positions: int) -> Yarn | None:
    """Return YaRN's settings from what `read_rope` gave; None: rotary settings of another type."""
    if rope["rope_type"] != "yarn":
        return None
    factor = float(rope["factor"])
    return Yarn(
        factor=factor,
        original_positions=int(rope.get("original_max_position_embeddings") or max_positions),
        attention_factor=float(rope.get("attention_factor") or 0.1 * math.log(max(factor, 1.0)) + 1.0),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
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
        }
    parameters: dict[str, Any] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    if local_theta is not None:
        local = {"rope_type": "default", "rope_theta": local_theta}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}


def layer_types(n_layers: int, full_every: int) -> list[str]:
    """Return `layer_types` of a model whose layers have a sliding window, all but every `full_every`-th."""
    return ["sliding_attention" if (i + 1) % full_every else "full_attention" for i in range(n_layers)]
