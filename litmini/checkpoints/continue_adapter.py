"""Trains the adapter of an earlier run further."""

from pathlib import Path

from torch import nn

from litmini.checkpoints.peft import load_adapter, read_adapter
from litmini.errors import UserError
from litmini.methods.adapters import adapters
from litmini.methods.base_layer import AdapterLayer


def continue_adapter(model: nn.Module, directory: str | Path, method: type[AdapterLayer], dropout: float = 0.0) -> None:
    """Put the adapter of `directory` over `model` to train it further; all else is frozen.

    Args:
        method: the class of layers that the script trains.
        dropout: on the adapter's input, for methods that have one.

    Raises:
        UserError: the adapter is one of another method, or was made for another base.
    """
    adapter = read_adapter(directory)
    if adapter.method is not method:
        found, wanted = (kind.__name__.removesuffix("Linear") for kind in (adapter.method, method))
        raise UserError(
            f"{directory} is an adapter of {found}, and this script trains {wanted}: take "
            f"scripts/finetune_{found.lower()}.py, or train a new adapter over the merged one with --adapter_start merge."
        )
    load_adapter(model, directory)
    for layer in adapters(model).values():
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.startswith("base."))
        for part in layer.children():
            if isinstance(part, nn.Dropout):
                part.p = dropout
