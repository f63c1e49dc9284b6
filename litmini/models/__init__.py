"""The one registry of families: `model_type` in `config.json` -> the module that implements it."""

import importlib
from types import ModuleType

FAMILIES = {
    "llama": "litmini.models.llama",
    "mistral": "litmini.models.llama",
}


def family(model_type: str) -> ModuleType:
    """The module of a family.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type '{model_type}' is not implemented; there are: {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(FAMILIES[model_type])
