"""Checkpoints of other layouts in: pickled shards, Meta's, litgpt's, and GGUF files become Hugging Face directories.

Files are memory-mapped and tensors pass one by one, so that what is in memory is one shard of the result and the file's
pages. Pickles are opened as tensors only (`weights_only`): one that wants to run code is refused.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litmini.checkpoint import (
    FAMILIES,
    check_fit,
    copy_side_files,
    disk_tensors,
    model_tensors,
    parameter_names,
    read_shapes,
    read_tensors,
    save_model,
    shards,
)
from litmini.config import UserError
from litmini.files import read_json, write_aside, write_json
from litmini.gguf_import import import_gguf
from litmini.models import family
from litmini.vocabulary import ensure_tokenizer

Tensors = Iterable[tuple[str, Tensor]]
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
KINDS = (
    "a GGUF file, or a directory with model*.safetensors or pytorch_model*.bin (and config.json), with Meta's "
    "consolidated.*.pth (and params.json), or with litgpt's lit_model.pth (and config.json)"
)


class Source(NamedTuple):
    """A checkpoint to convert."""

    kind: str
    config: dict[str, Any]
    """What `config.json` shall hold."""
    read: Callable[[bool], Tensors]
    """meta -> the tensors under Hugging Face's names; on the meta device, only their shapes."""
    ties: bool = True
    """Whether a second name of a tied weight holds the same numbers by definition; else they are compared."""


def convert(
    source: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write the checkpoint `source` as a Hugging Face directory, whole or not at all.

    Args:
        dtype: of the result; None keeps each tensor's own, and means bf16 for a GGUF file.
        max_shard_bytes: size of a weight file; bounds the memory that is needed.

    Raises:
        UserError: `source` is nothing that is read here, or damaged, or does not fit its own settings; `out_dir` exists.
    """
    path, target = Path(source), Path(out_dir)
    if target.exists():
        raise UserError(f"{target} exists already; choose another --out_dir or remove it.")
    if path.is_file() and path.suffix == ".gguf":
        with write_aside(target) as aside:
            facts = import_gguf(path, aside, dtype or torch.bfloat16, max_shard_bytes)
            write_json(aside / "source.json", {"source": str(path), "format": "GGUF", "gguf": facts})
        return target
    found = _find(path)
    try:
        module = family(found.config.get("model_type", ""))
        config = module.config_from_hf(found.config)
        with torch.device("meta"):
            model = module.Model(config)
    except KeyError as error:
        raise UserError(f"{path}: its config.json lacks the key {error}.") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: {error}.") from None
    check_fit(path, model, {name: tuple(t.shape) for name, t in model_tensors(module, config, found.read(True))})
    raw = {key: value for key, value in found.config.items() if key != "torch_dtype"}  # since v5: `dtype`
    names = parameter_names(model)
    if not found.ties and (untied := _untied(names, module, config, found)):
        raw["tie_word_embeddings"] = False
        names |= {name: [name] for name in untied}

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model_tensors(module, config, found.read(False)):
            if name in names:  # no second name of a tied weight, no buffer of old files
                yield name, tensor if dtype is None else tensor.to(dtype)

    with write_aside(target) as aside:
        ensure_tokenizer(path if path.is_dir() else path.parent, aside)  # before the weights: it may be refused
        save_model(aside, raw, disk_tensors(module, config, stream()), max_shard_bytes=max_shard_bytes)
        copy_side_files(path if path.is_dir() else path.parent, aside, replace=False)
        write_json(aside / "source.json", {"source": str(path), "format": found.kind})
    return target


def _untied(names: dict[str, list[str]], module: Any, config: Any, found: Source) -> list[str]:
    """Further names of tied parameters whose numbers are others: they were trained apart."""
    pairs = {copy: first for first, *copies in names.values() for copy in copies}
    kept = {
        name: tensor
        for name, tensor in model_tensors(module, config, found.read(False))
        if name in pairs or name in pairs.values()
    }
    return [copy for copy, first in pairs.items() if copy in kept and not torch.equal(kept[copy], kept[first])]


def _find(path: Path) -> Source:
    """What is at `path`, opened."""
    from litmini.convert_layouts import read_litgpt, read_meta

    directory = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"{path} is not there; expected {KINDS}.")
    if path.is_file() and path.name not in ("lit_model.pth", "consolidated.00.pth", BIN):
        raise UserError(f"{path} is of no kind that is read here; expected {KINDS}.")
    if (directory / "model.safetensors").is_file() or (directory / "model.safetensors.index.json").is_file():
        return _safetensors(directory)
    if (directory / BIN).is_file() or (directory / BIN_INDEX).is_file():
        return _bin(directory)
    if (directory / "lit_model.pth").is_file():
        raw = read_json(directory / "config.json")
        file = directory / "lit_model.pth"
        state = load_pickle(file)
        read = read_litgpt(file, raw, state)
        return Source("litgpt", raw, read, ties=False)
    if parts := sorted(directory.glob("consolidated.*.pth")):
        states = [load_pickle(part) for part in parts]
        raw, read = read_meta(directory, read_json(directory / "params.json"), states)
        return Source("Meta", raw, read, ties=False)
    raise UserError(f"{directory} holds no weights that are read here; expected {KINDS}.")


def _safetensors(directory: Path) -> Source:
    files = shards(directory)

    def read(meta: bool) -> Tensors:
        if meta:
            return ((name, torch.empty(shape, device="meta")) for name, shape in read_shapes(files).items())
        return read_tensors(files)

    return Source("safetensors", read_json(directory / "config.json"), read)


def _bin(directory: Path) -> Source:
    files = [directory / BIN]
    if (index := directory / BIN_INDEX).is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map of file names.")
        shard_names = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in shard_names if Path(name).name != name]:
            raise UserError(f"{index} names a file outside its directory: {outside[0]}")
        files = [directory / name for name in shard_names]
        if lacking := [name for name in shard_names if not (directory / name).is_file()]:
            raise UserError(f"{directory} lacks {', '.join(lacking)}, which {index.name} names. Download it again.")

    def read(meta: bool) -> Tensors:
        for file in files:
            for name, tensor in load_pickle(file).items():
                yield name, tensor.to("meta") if meta else tensor

    return Source("pytorch_model.bin", read_json(directory / "config.json"), read)


def load_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch saved, memory-mapped.

    Raises:
        UserError: it is damaged, or holds anything but tensors by name.
    """
    if not file.is_file():
        raise UserError(f"weight file not found: {file}")
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)  # of torch before 1.6: read as a whole
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles and archives raise any class
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "Cannot allocate memory" in str(error):
            raise UserError(f"{file} does not fit into the memory that is left.") from None
        if "Weights only load failed" in str(error):
            raise UserError(
                f"{file} is refused: it holds more than tensors, and opening that could run any code. Ask its author "
                f"for safetensors. ({reason})"
            ) from None
        raise UserError(f"weight file {file} is truncated or damaged ({reason}). Get it again.") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # litgpt's pretraining
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{file} holds no tensors by name; expected a state dict of {', '.join(sorted(FAMILIES))}.")
    return state
