"""Dropout off while a model is trained, for objectives that compare log-probabilities or scores."""

import dataclasses
from typing import Any

from torch import nn


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
