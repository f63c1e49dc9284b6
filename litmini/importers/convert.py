"""Conversion of pickled shards, Meta's files and GGUF files into Hugging Face directories.

Tensors are read and written one by one: memory depends on the largest of them, not on the model, its files or the shards.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litmini.checkpoints.hf import check_fit, disk_tensors, model_tensors, parameter_names, save_model
from litmini.checkpoints.safetensors_io import give_memory_back, read_empty, read_tensors, shards
from litmini.errors import UserError
from litmini.files import check_no_pointer, read_json, write_atomically, write_json
from litmini.importers.gguf.convert import import_gguf
from litmini.importers.meta import read_meta
from litmini.importers.pickles import Pickle
from litmini.importers.vocabulary import ensure_tokenizer
from litmini.models import family
from litmini.tokenizer import copy_side_files

Tensors = Iterable[tuple[str, Tensor]]
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LITGPT = "model.pth"  # as `litgpt convert_from_litgpt` writes it, under Hugging Face's names
KINDS = (
    "a GGUF file, or a directory with model*.safetensors or pytorch_model*.bin (and config.json), or with Meta's "
    "consolidated.*.pth (and params.json)"
)


class Source(NamedTuple):
    """A checkpoint to convert."""

    kind: str
    config: dict[str, Any]
    """The content of `config.json`."""
    read: Callable[[bool], Tensors]
    """meta -> the tensors under Hugging Face's names; with meta True, only their shapes and dtypes."""
    ties: bool = True
    """Whether a second name of a tied weight holds the same values by definition; else they are compared."""


def convert(
    source: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write the checkpoint `source` as a Hugging Face directory, whole or not at all.

    Args:
        dtype: of the result; None keeps each tensor's own, and means bf16 for a GGUF file.
        max_shard_bytes: size of a weight file.

    Raises:
        UserError: `source` is of no supported kind, or damaged, or does not fit its own settings; `out_dir` exists.
    """
    path, target = Path(source), Path(out_dir)
    if target.exists():
        raise UserError(f"{target} exists already; choose another --out_dir or remove it.")
    give_memory_back()
    if path.is_file() and path.suffix == ".gguf":
        with write_atomically(target, new=True) as partial:
            facts = import_gguf(path, partial, dtype or torch.bfloat16, max_shard_bytes)
            write_json(partial / "source.json", {"source": str(path), "format": "GGUF", "gguf": facts})
        return target
    opened = _open(path)
    try:
        module = family(str(opened.config.get("model_type", "")))
        config = module.config_from_hf(opened.config)
        with torch.device("meta"):
            model = module.Model(config)
    except KeyError as error:
        raise UserError(f"{path}: its config.json lacks the key {error}.") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: {error}.") from None
    existing = list(opened.read(True))
    shapes = {name: tuple(t.shape) for name, t in model_tensors(module, config, existing)}
    integers = [f"{name} is {t.dtype}, expected floating point" for name, t in existing if not t.is_floating_point()]
    check_fit(path, model, shapes, [text for text in integers if text.split()[0] in shapes])
    raw = {key: value for key, value in opened.config.items() if key != "torch_dtype"}  # since v5: `dtype`
    names = parameter_names(model)
    if not opened.ties and (untied := _untied(names, module, config, opened)):
        raw["tie_word_embeddings"] = False
        names |= {name: [name] for name in untied}

    def to_disk(tensors: Tensors) -> Tensors:
        """Leave out second names of tied weights, and buffers of old files."""
        inside = ((name, t) for name, t in model_tensors(module, config, tensors) if name in names)
        return disk_tensors(module, config, inside)

    empty = [(name, like if dtype is None else like.to(dtype)) for name, like in to_disk(existing)]
    stream = to_disk(opened.read(False))
    final, present = dict(empty), {name: like.shape for name, like in existing}
    if all(present.get(name) == like.shape for name, like in empty):  # Hugging Face's layout already: keep its order
        empty = [(name, final[name]) for name, _ in existing if name in final]
        stream = ((name, tensor) for name, tensor in opened.read(False) if name in final)
    with write_atomically(target, new=True) as partial:
        ensure_tokenizer(path if path.is_dir() else path.parent, partial)  # before the weights: it may be refused
        save_model(partial, raw, stream, max_shard_bytes=max_shard_bytes, empty=empty)
        copy_side_files(path if path.is_dir() else path.parent, partial, replace=False)
        write_json(partial / "source.json", {"source": str(path), "format": opened.kind})
    return target


def _untied(names: dict[str, list[str]], module: Any, config: Any, opened: Source) -> list[str]:
    """Return further names of tied parameters whose values differ: they were trained apart."""
    pairs = {copy: first for first, *copies in names.values() for copy in copies}
    kept = {
        name: tensor
        for name, tensor in model_tensors(module, config, opened.read(False))
        if name in pairs or name in pairs.values()
    }
    return [copy for copy, first in pairs.items() if copy in kept and not torch.equal(kept[copy], kept[first])]


def _open(path: Path) -> Source:
    """Open whatever checkpoint is at `path`."""
    directory = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"{path} does not exist; expected {KINDS}.")
    if path.is_file() and path.name not in (LITGPT, "lit_model.pth", "consolidated.00.pth", BIN):
        raise UserError(f"{path} is of no supported kind; expected {KINDS}.")
    if (directory / "model.safetensors").is_file() or (directory / "model.safetensors.index.json").is_file():
        return _safetensors(directory)
    if (directory / BIN).is_file() or (directory / BIN_INDEX).is_file():
        return _bin(directory)
    if (directory / LITGPT).is_file():
        file = Pickle(directory / LITGPT)
        raw = read_json(directory / "config.json")
        return Source("litgpt", raw, lambda meta: ((n, file.get(n, meta)) for n in file.tensors), ties=False)
    if (directory / "lit_model.pth").is_file():
        check_no_pointer(directory / "lit_model.pth")
        raise UserError(
            f"{directory} holds a checkpoint in litgpt's own layout. Convert it with litgpt first, then run this command "
            f"again: litgpt convert_from_litgpt {directory} {directory}"
        )
    if parts := sorted(directory.glob("consolidated.*.pth")):
        states = [Pickle(part) for part in parts]
        raw, read = read_meta(directory, read_json(directory / "params.json"), states)
        return Source("Meta", raw, read, ties=False)
    raise UserError(f"{directory} holds no weights of a supported kind; expected {KINDS}.")


def _safetensors(directory: Path) -> Source:
    files = shards(directory)

    def read(meta: bool) -> Tensors:
        return read_empty(files) if meta else read_tensors(files, copied=True)

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
        if missing := [name for name in shard_names if not (directory / name).is_file()]:
            raise UserError(f"{directory} lacks {', '.join(missing)}, which {index.name} names. Download it again.")

    def read(meta: bool) -> Tensors:
        for file in map(Pickle, files):
            yield from ((name, file.get(name, meta)) for name in file.tensors)

    return Source("pytorch_model.bin", read_json(directory / "config.json"), read)
