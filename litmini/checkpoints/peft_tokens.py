"""PEFT's `trainable_token_indices`, and vocabularies that grew before an adapter was trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from litmini.checkpoints.adapter import Adapter
from litmini.errors import UserError
from litmini.methods.base_layer import PREFIX, AdapterLayer
from litmini.methods.trainable_tokens import (
    KEY,
    SETTING,
    grow_vocabulary,
    grown,
    indices_of,
    is_tied,
    token_layers,
    vocabulary_modules,
)

FROZEN = ".token_adapter.base_layer.weight"
"""The end of the key of a whole embedding or head in whose rows tokens are trained; PEFT adds it where the vocabulary grew."""


def read_tokens(
    others: dict[str, Tensor], full: dict[str, dict[str, Tensor]], config: dict[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Take the rows of tokens, and whole frozen embeddings and heads, out of `others` (key -> tensor); return them by module.

    Args:
        full: the modules that are trained in full.
    """
    tokens = {
        key.removeprefix(PREFIX).removesuffix(f".{KEY}"): {KEY: others.pop(key)}
        for key in list(others)
        if key.startswith(PREFIX) and key.endswith(f".{KEY}") and config.get(SETTING)
    }
    frozen = {key for key in others if key.startswith(PREFIX) and key.endswith(FROZEN)}
    sizes = {len(others[key]) for key in frozen} | {
        len(t) for one in full.values() for t in one.values() if t.dim() == 2
    }
    frozen |= {
        key
        for key, tensor in others.items()
        if key.startswith(PREFIX) and key.endswith(".weight") and tensor.dim() == 2 and len(tensor) in sizes
    }
    vocabulary = {
        key.removeprefix(PREFIX).removesuffix(FROZEN).removesuffix(".weight"): others.pop(key) for key in frozen
    }
    return tokens, vocabulary


def has_vocabulary(model: nn.Module, adapter: Adapter) -> bool:
    """Return whether an adapter trains rows of tokens, brings embeddings or heads, or has one in full with other rows."""
    modules = dict(model.named_modules()) if adapter.full else {}
    others = [
        name
        for name, tensors in adapter.full.items()
        if "weight" in tensors and name in modules and tensors["weight"].shape != _shape(modules[name])
    ]
    return bool(adapter.tokens or adapter.vocabulary or others)


def _shape(module: Any) -> Any:
    return getattr(module, "weight", torch.empty(0)).shape


def grow_for(model: nn.Module, adapter: Adapter) -> None:
    """Give `model` the rows of tokens that the adapter's base had in training, and whole frozen weights that it brings.

    Raises:
        UserError: rows are missing between the model's and those of the adapter.
    """
    names, ids = vocabulary_modules(model), token_ids(adapter)
    whole = [len(adapter.full[name]["weight"]) for name in names if "weight" in adapter.full.get(name, {})]
    whole += [len(weight) for name, weight in adapter.vocabulary.items() if name in names]
    rows: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    rows_before = max([rows, *whole])
    new = sorted({i for i in ids if i >= rows_before})
    if new and new[-1] != rows_before + len(new) - 1:
        raise UserError(
            f"the adapter in {adapter.directory} was made for another base: it trains the token {new[-1]}, the model has "
            f"rows for 0 to {rows - 1} only, and there are none between."
        )
    needed = rows_before + len(new)
    if needed > rows:
        grow_vocabulary(model, rows, needed - rows)
    tied = is_tied(model, names)
    for name, weight in adapter.vocabulary.items():
        module: Any = dict(model.named_modules()).get(name)
        if name not in names or module.weight.shape != weight.shape:
            raise UserError(
                f"the adapter in {adapter.directory} was made for another base: it brings {name} {tuple(weight.shape)}."
            )
        if not module.weight.is_meta and not (tied and name != names[0] and names[0] in adapter.vocabulary):
            module.weight.data = weight.to(module.weight)


def _equal(own: Tensor, weight: Tensor) -> bool:
    return own.shape == weight.shape and torch.equal(own, weight.to(own))


def token_ids(adapter: Adapter) -> list[int]:
    """Return the ids of all tokens that an adapter trains."""
    return [i for name in adapter.tokens for i in indices_of(adapter.config, name)]


def check_tokens(model: nn.Module, adapter: Adapter) -> tuple[dict[str, AdapterLayer], list[str]]:
    """Return a layer for each embedding and head in which the adapter trains tokens, frozen, and what does not fit."""
    names = vocabulary_modules(model)
    problems = [f"{name}: the model has no such embedding or head" for name in adapter.tokens if name not in names]
    indices = {name: indices_of(adapter.config, name) for name in adapter.tokens if name in names}
    rows: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    for name, ids in indices.items():
        module: Any = model.get_submodule(name)
        found, expected = tuple(adapter.tokens[name][KEY].shape), (len(ids), module.weight.shape[-1])
        if found != expected:
            problems.append(
                f"{name}: the adapter has {found} rows of tokens, its settings and the model want {expected}"
            )
        if ids and max(ids) >= rows:
            problems.append(
                f"{name}: token {max(ids)}, but the model has rows for 0 to {rows - 1}. An adapter with new tokens cannot "
                f"share its base: merge it (scripts/merge_adapter.py), or use it alone (--adapter_dir)"
            )
    if is_tied(model, names) and names[1] in indices and names[0] not in indices:
        problems.append(f"{names[1]}: the adapter trains rows of it alone, and it is tied to {names[0]}")
    for name, weight in adapter.vocabulary.items():
        own: Any = dict(model.named_modules()).get(name)
        if own is None or (not own.weight.is_meta and not _equal(own.weight, weight)):
            problems.append(
                f"{name}: the adapter brings another one, so it cannot share its base: merge it (scripts/merge_adapter.py), "
                f"or use it alone (--adapter_dir)"
            )
    setting = adapter.config.get(SETTING) or {}
    keys = {names[0]} if isinstance(setting, list) else setting.keys()
    named = [name for name in names if any(name.endswith(key) for key in keys)]
    if lost := [n for n in named if n not in adapter.tokens and not (is_tied(model, names) and adapter.tokens)]:
        problems.append(f"{', '.join(lost)}: {SETTING} names it, and the adapter has no rows for it")
    if problems:
        return {}, problems
    layers = token_layers(model, indices)
    if twice := [name for name in layers if name in adapter.layers or name in adapter.full]:
        return {}, [
            f"{name}: the adapter trains rows of it, and it has an adapter or is trained in full" for name in twice
        ]
    return {name: layer.requires_grad_(False) for name, layer in layers.items()}, []


def with_rows(
    model: nn.Module, adapter: Adapter, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's base, embedding and head with all rows of `model`, which has grown, and those of tokens.

    Args:
        model: on the meta device.
    """
    names = vocabulary_modules(model)
    tied = names if is_tied(model, names) else []
    for full_name, tensor in tensors:
        name, _, last = full_name.rpartition(".")
        if name not in names:
            yield full_name, tensor
            continue
        same = tied or [name]
        rows = len(model.get_parameter(full_name))
        whole = next((adapter.vocabulary[one] for one in same if one in adapter.vocabulary), None)
        if last == "weight" and whole is not None and not tensor.is_meta:
            tensor = whole.to(tensor.dtype)
        if len(tensor) < rows:
            tensor = grown(tensor, len(tensor), rows - len(tensor))
        if owner := next((one for one in same if one in adapter.tokens and last == "weight"), None):
            values = adapter.tokens[owner][KEY]
            if not tensor.is_meta:
                tensor = tensor.index_copy(0, torch.tensor(indices_of(adapter.config, owner)), values.to(tensor.dtype))
        yield full_name, tensor
