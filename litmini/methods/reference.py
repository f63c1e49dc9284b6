"""For objectives that compare a model with itself: as its adapters began, and without dropout."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from litmini.methods.adapters import adapters, restore_adapters


def disable_dropout(model: nn.Module) -> None:
    """Let `model` compute in training mode what it computes in evaluation mode: every dropout gets probability 0.

    These are `nn.Dropout`, numbers that a module keeps as `dropout`, and fields of the model's `Config` that end so.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0  # type: ignore[assignment]
    config: Any = model.config
    if names := [f.name for f in dataclasses.fields(config) if f.name.endswith("dropout")]:
        model.config = dataclasses.replace(config, **dict.fromkeys(names, 0.0))  # type: ignore[assignment]


@contextmanager
def at_start(model: nn.Module) -> Iterator[None]:
    """Let `model` be what it was before its adapters were trained, for as long as this lasts. Nothing is copied."""
    layers = adapters(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.at_start())
    try:
        yield
    finally:
        restore_adapters(model, layers)
