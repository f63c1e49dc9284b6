"""The one registry of families: `model_type` in `config.json` -> the module that implements it."""

import importlib
from types import ModuleType

FAMILIES = {
    "falcon": "litmini.models.falcon",
    "gemma": "litmini.models.gemma",
    "gemma2": "litmini.models.gemma2",
    "gemma3_text": "litmini.models.gemma3",
    "gpt2": "litmini.models.gpt2",
    "gpt_neox": "litmini.models.gpt_neox",
    "llama": "litmini.models.llama",
    "mistral": "litmini.models.llama",
    "mixtral": "litmini.models.mixtral",
    "mpt": "litmini.models.mpt",
    "olmo2": "litmini.models.olmo2",
    "olmo3": "litmini.models.olmo2",
    "phi": "litmini.models.phi",
    "phi3": "litmini.models.phi3",
    "qwen2": "litmini.models.qwen2",
    "qwen3": "litmini.models.qwen3",
    "qwen3_moe": "litmini.models.qwen3_moe",
}


def family(model_type: str) -> ModuleType:
    """The module of a family.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type '{model_type}' is not implemented; there are: {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(FAMILIES[model_type])
