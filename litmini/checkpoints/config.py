"""`config.json` of a checkpoint as it holds for the weights beside it, and the empty model that it describes."""

import functools
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from litmini.checkpoints.safetensors_io import read_empty, read_tensors, shards
from litmini.errors import UserError
from litmini.files import read_json
from litmini.models import FAMILIES, family, meta_model
from litmini.models.hf_config import towers_of

Tensors = Iterable[tuple[str, Tensor]]


def is_multimodal(raw: dict[str, Any]) -> bool:
    """Whether a config.json describes a text model and parts beside it."""
    return bool(towers_of(raw) or (raw.get("text_config") and str(raw.get("model_type")) not in FAMILIES))


def changed_config(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return config.json with other values, of a multimodal model wherever its text part has them."""
    if not is_multimodal(raw):
        return {**raw, **changes}
    from litmini.checkpoints.text_part import changed_config

    return changed_config(raw, changes)


def parse_config(raw: dict[str, Any], file: Path, names: Collection[str] | None = None) -> tuple[ModuleType, Any]:
    """Return the family module and the `Config` of the content of a config.json, or of its text part (`text_part.py`).

    Args:
        names: of the tensors that it describes; None: those in the files beside it.

    Raises:
        UserError: the family or something that it asks for is not implemented, or a value is missing or impossible.
    """
    text = raw.get("text_config")
    if quantized := raw.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config")):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"{file}: its weights are quantised (quantization_config: quant_method {str(method)[:50]!r}), expected 16 bits or "
            f"more. To dequantise them: python scripts/convert_to_litmini.py {file.parent} --out_dir {file.parent}-bf16"
        )
    try:
        if not is_multimodal(raw):
            module = family(str(raw.get("model_type", "")))
            if not hasattr(module, "carried"):
                return module, module.config_from_hf(raw)
            from litmini.checkpoints.text_part import CarriedParts

            carrying = CarriedParts(module)
            return carrying, carrying.read_config(raw)
        from litmini.checkpoints.text_part import open_text_part

        part, text = open_text_part(raw, file, names)
        return part, part.read_config(text)
    except KeyError as error:
        raise UserError(f"{file} lacks the key {error}.") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: {error}.") from None


def parse_model(raw: dict[str, Any], file: Path, names: Collection[str] | None = None) -> tuple[ModuleType, Any]:
    """Return the family module and the model of the content of a config.json, with all parameters on the meta device."""
    module, config = parse_config(raw, file, names)
    try:
        model = meta_model(module, config)
        if is_multimodal(raw):
            model.in_whole_model = module.layout.in_model  # adapters are found under other names there
        if hasattr(module, "expert_groups"):  # which PEFT means by these names, even where others have them, too
            model.expert_linears = {one for linears, _ in module.expert_groups(config).values() for one in linears}
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{file} describes an impossible model: {error}.") from None
    if "ForSequenceClassification" in str(raw.get("architectures")):
        from litmini.checkpoints.scores import give_scores  # which a language model does not need

        give_scores(model, raw)
    return module, model


def read_raw_config(directory: Path) -> dict[str, Any]:
    """Return config.json; untied if the weights beside it have a head of their own, as transformers reads it."""
    raw = read_json(directory / "config.json")
    files = shards(directory)
    if all(file.is_file() for file in files):
        states = tuple(
            (s.st_ino, s.st_size, s.st_mtime_ns) for s in (f.stat() for f in [directory / "config.json", *files])
        )
        if _is_untied(directory.resolve(), states):
            return changed_config(raw, tie_word_embeddings=False)
    return raw


@functools.lru_cache(64)
def _is_untied(directory: Path, states: tuple[tuple[int, ...], ...]) -> bool:
    """Whether a tied config.json stands beside an own head; said once for each state of the files."""
    module, model = parse_model(read_json(directory / "config.json"), directory / "config.json")
    files = shards(directory)
    return bool(untied(module, model, lambda meta: read_empty(files) if meta else read_tensors(files), directory))


def untied(module: ModuleType, model: Any, read: Callable[[bool], Tensors], source: Path) -> list[str]:
    """Return further names of tied parameters that a checkpoint has other values for than for the first, and say so.

    Args:
        model: on the meta device.
        read: meta -> all tensors of the files under Hugging Face's names; with meta True, only their shapes and dtypes.
    """
    pairs = {copy: first for first, *copies in parameter_names(model).values() for copy in copies}
    ends = tuple(".".join(name.split(".")[-2:]) for name in {*pairs, *pairs.values()})  # old files lack prefixes

    def found(meta: bool) -> dict[str, Tensor]:
        return dict(model_tensors(module, model.config, ((n, t) for n, t in read(meta) if n.endswith(ends))))

    names = found(True).keys() if pairs else ()
    if not any(copy in names and first in names for copy, first in pairs.items()):
        return []
    values = found(False)
    others = [copy for copy, first in pairs.items() if copy in values and not _equal(values[copy], values.get(first))]
    if others:
        print(
            f"note: {source}: config.json ties {others[0]} to {pairs[others[0]]}, but the weights of the two differ; both "
            f"are used, and what is written is untied.",
            file=sys.stderr,
        )
    return others


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a, b.to(a.dtype)) and torch.equal(a.to(b.dtype), b)


def read_config(directory: Path) -> tuple[ModuleType, Any]:
    """Return the family module and the `Config` of a checkpoint."""
    return parse_config(read_raw_config(directory), directory / "config.json")


def empty_model(directory: Path) -> tuple[ModuleType, nn.Module]:
    """Return the family module and the model of a checkpoint, with all parameters on the meta device."""
    return parse_model(read_raw_config(directory), directory / "config.json")


def parameter_names(model: nn.Module) -> dict[str, list[str]]:
    """Return the first name of each parameter -> all its names: a tied parameter has several."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    names: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[first[parameter]].append(name)
    return names


def model_tensors(module: ModuleType, config: Any, tensors: Tensors) -> Tensors:
    """Convert the tensors of a checkpoint's files to the names and shapes of the family's model."""
    return module.from_hf(tensors, config) if hasattr(module, "from_hf") else tensors


def dtype_of(module: ModuleType, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor in a model in `dtype`: fp32, if its family says so in `FP32`."""
    return torch.float32 if name.endswith(getattr(module, "FP32", ())) else dtype


def parts_beside(module: ModuleType, directory: Path) -> tuple[Tensors, Tensors] | None:
    """Return what a checkpoint has beside the text part `module`, as `empty` and `tensors` of `save_model`; None: nothing."""
    return module.beside(directory) if hasattr(module, "beside") else None


def disk_tensors(module: ModuleType, config: Any, tensors: Tensors) -> Tensors:
    """Convert a model's tensors to the names and shapes of Hugging Face's files: the inverse of `model_tensors`."""
    return module.to_hf(tensors, config) if hasattr(module, "to_hf") else tensors
