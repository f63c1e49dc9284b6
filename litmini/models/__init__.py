"""The registry of families: `model_type` in `config.json` -> the module that implements it.

Each family file defines `Config`, `PRESETS`, `config_from_hf`, `config_to_hf` and `Model`; and `from_hf` and `to_hf` where
Hugging Face's tensors are laid out differently. All models are called alike:

    Model.forward(tokens, positions=None, documents=None, cache=None, labels=None)

Args:
    tokens: (B, T) int64.
    positions: (B, T) int64, from 0 within each document; by default they continue from the cache. Below 0: padding.
    documents: (B, T) ints, one id per document; a token sees only tokens of its own document. 0: padding.
    cache: `litmini.ops.kv_cache.KVCache` with the keys and values, or the states, of the tokens before these.
    labels: (B, T) int64, the target after each token; -100 where there is none.

Returns:
    Logits (B, T, vocab_size); with labels, the loss summed over targets (fp32) and the number of targets.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from litmini.errors import UserError
from litmini.files import existing_file

if TYPE_CHECKING:
    from torch import nn

FAMILIES = {
    "deepseek_v3": "litmini.models.deepseek_v3",
    "falcon": "litmini.models.falcon",
    "gemma": "litmini.models.gemma",
    "gemma2": "litmini.models.gemma2",
    "gemma3_text": "litmini.models.gemma3",
    "gemma4_text": "litmini.models.gemma4",
    "glm4_moe_lite": "litmini.models.deepseek_v3",
    "gpt2": "litmini.models.gpt2",
    "gpt_neox": "litmini.models.gpt_neox",
    "gpt_oss": "litmini.models.gpt_oss",
    "granitemoehybrid": "litmini.models.granite_hybrid",
    "lfm2": "litmini.models.lfm2",
    "llama": "litmini.models.llama",
    "mamba2": "litmini.models.mamba2",
    "ministral3": "litmini.models.ministral3",
    "mistral": "litmini.models.llama",
    "mixtral": "litmini.models.mixtral",
    "mpt": "litmini.models.mpt",
    "olmo2": "litmini.models.olmo2",
    "olmo3": "litmini.models.olmo2",
    "phi": "litmini.models.phi",
    "phi3": "litmini.models.phi3",
    "qwen2": "litmini.models.qwen2",
    "qwen3": "litmini.models.qwen3",
    "qwen3_5_moe_text": "litmini.models.qwen3_5_moe",
    "qwen3_5_text": "litmini.models.qwen3_5",
    "qwen3_moe": "litmini.models.qwen3_moe",
    "smollm3": "litmini.models.smollm3",
}


def family(model_type: str) -> ModuleType:
    """Return the module of a family.

    Raises:
        ValueError: there is no such family; the message lists all.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type '{model_type[:50]}' is not implemented; there are: {', '.join(sorted(FAMILIES))}. If it comes from a "
            f"model file of your own, give that file: --model_file FILE.py"
        )
    return importlib.import_module(FAMILIES[model_type])


def use_model_file(path: str | None) -> ModuleType | None:
    """Register the family in a user's own file, for this process; a checkpoint never brings code along.

    As those in `litmini/models/`, it defines `Config`, `PRESETS`, `config_from_hf`, `config_to_hf` and `Model`.

    Raises:
        UserError: the file is missing, does not run, lacks one of these, or takes the name of another family.
    """
    if path is None:
        return None
    file = existing_file(path, "model file")
    name = f"litmini_model_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is no Python file.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code can fail in any way
        line = getattr(error, "lineno", None) or (error.__traceback__ and _last_line(error, str(file)))
        raise UserError(f"{file}:{line} fails: {type(error).__name__}: {error}") from None
    parts = ("Config", "PRESETS", "config_from_hf", "config_to_hf", "Model")
    if missing := [part for part in parts if not hasattr(module, part)]:
        raise UserError(f"{file} lacks {', '.join(missing)}; the files in litmini/models/ show what a model file has.")
    if not module.PRESETS:
        raise UserError(f"{file} has no preset in PRESETS.")
    model_type = module.config_to_hf(next(iter(module.PRESETS.values()))).get("model_type")
    if not isinstance(model_type, str) or FAMILIES.get(model_type, name) != name:
        raise UserError(
            f"{file}: config_to_hf gives model_type {model_type!r}, expected a name that none of {', '.join(FAMILIES)} has: "
            f"checkpoints of this file would be taken for checkpoints of another."
        )
    FAMILIES[model_type] = name
    return module


def _last_line(error: BaseException, file: str) -> int | None:
    """Return the last line of `file` in the traceback of an error."""
    line, trace = None, error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == file else line
        trace = trace.tb_next
    return line


def meta_model(module: ModuleType, config: Any) -> Any:
    """Return a family's model with all parameters on the meta device, without any work on their values."""
    import torch
    from torch.overrides import TorchFunctionMode

    class NoInit(TorchFunctionMode):
        """Skips torch's initialisers: on the meta device they do nothing, but import the compiler, which takes a second."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if getattr(func, "__module__", None) == "torch.nn.init":
                return kwargs["tensor"] if "tensor" in kwargs else args[0]
            return func(*args, **kwargs)

    with torch.device("meta"), NoInit():
        return module.Model(config)


def preset(name: str) -> nn.Module | None:
    """Return the model of a preset on the meta device; None if no family has a preset of this name."""
    import torch

    for module in map(family, FAMILIES):
        if name in module.PRESETS:
            with torch.device("meta"):
                return module.Model(module.PRESETS[name])
    return None


def preset_names() -> str:
    """Return the names of all presets but those for tests, sorted and joined by commas."""
    return ", ".join(sorted({name for model_type in FAMILIES for name in family(model_type).PRESETS if "/" in name}))
