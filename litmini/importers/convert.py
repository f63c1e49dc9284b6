"""Conversion of pickled shards, Meta's files, GGUF files and quantised checkpoints into Hugging Face directories.

Tensors are read and written one by one: memory depends on the largest of them, not on the model, its files or the shards.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litmini.checkpoints.config import (
    changed_config,
    disk_tensors,
    model_tensors,
    parameter_names,
    parse_model,
    untied,
)
from litmini.checkpoints.hf import check_fit, save_model, wrong_dtype
from litmini.checkpoints.safetensors_io import check_one_format, give_memory_back, read_empty, read_tensors, weight_map
from litmini.errors import UserError
from litmini.files import check_no_pointer, read_json, write_atomically, write_json
from litmini.importers.gguf.convert import import_gguf
from litmini.importers.meta import read_meta
from litmini.importers.pickles import Pickle
from litmini.importers.quantized import Dequantized, quantization
from litmini.importers.vocabulary import ensure_tokenizer
from litmini.side_files import copy_side_files

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
    config_file: Path
    config: dict[str, Any]
    """The content of `config.json`, or what the settings of another kind mean."""
    read: Callable[[bool], Tensors]
    """meta -> the tensors under Hugging Face's names; with meta True, only their shapes and dtypes."""
    files: tuple[Path, ...] = ()
    """Of safetensors."""


def convert(
    source: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write the checkpoint `source` as a Hugging Face directory, whole or not at all.

    Args:
        dtype: of the result; None keeps each tensor's own, and means bf16 for a GGUF file and what is quantised.
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
    if quantization(opened.config) is not None:
        plain = Dequantized(opened.config_file, opened.config, opened.files, dtype or torch.bfloat16)
        kind = f"{opened.kind}, {plain.kind}"
        opened = opened._replace(kind=kind, config=plain.config, read=plain.read)
    raw = {key: value for key, value in opened.config.items() if key != "torch_dtype"}  # since v5: `dtype`
    existing = list(opened.read(True))
    all_names = [name for name, _ in existing]
    module, model = parse_model(raw, opened.config_file, all_names)
    if untied(module, model, opened.read, path):
        raw = changed_config(raw, tie_word_embeddings=False)
        module, model = parse_model(raw, opened.config_file, all_names)
    config = model.config
    beside: tuple[Tensors, Tensors] | None = None
    if hasattr(module, "owns"):
        parts = [(name, like) for name, like in existing if not module.owns(name)]
        beside = parts, ((name, tensor) for name, tensor in opened.read(False) if not module.owns(name))
        existing = [(name, like) for name, like in existing if module.owns(name)]
    inside = list(model_tensors(module, config, existing))
    problems = [text for pair in inside for text in wrong_dtype(*pair)]
    check_fit(path, model, {name: tuple(t.shape) for name, t in inside}, problems)
    names = parameter_names(model)

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
        save_model(partial, raw, stream, max_shard_bytes=max_shard_bytes, empty=empty, beside=beside)
        copy_side_files(path if path.is_dir() else path.parent, partial, replace=False)
        write_json(partial / "source.json", {"source": str(path), "format": opened.kind})
    return target


def _open(path: Path) -> Source:
    """Open whatever checkpoint is at `path`: a directory with weights of one kind, or one of its weight files."""
    directory = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"{path} does not exist; expected {KINDS}.")
    name = None if path.is_dir() else path.name
    kinds = {
        "model.safetensors": _safetensors,
        "model.safetensors.index.json": _safetensors,
        BIN: _bin,
        BIN_INDEX: _bin,
        LITGPT: _litgpt,
        "lit_model.pth": _refuse_litgpt,
        "consolidated.00.pth": _meta,
    }
    if name is None:
        check_one_format(directory)
        name = next((known for known in kinds if (directory / known).is_file()), None)
    elif name not in kinds:
        raise UserError(f"{path} is of no supported kind; expected {KINDS}.")
    if name is None:
        raise UserError(f"{directory} holds no weights of a supported kind; expected {KINDS}.")
    return kinds[name](directory / name)


def _config(file: Path) -> tuple[Path, dict[str, Any]]:
    """Return config.json beside a weight file: its path and content."""
    return (config := file.parent / "config.json"), read_json(config)


def _safetensors(file: Path) -> Source:
    files = (
        [file] if file.suffix == ".safetensors" else [file.parent / n for n in sorted(set(weight_map(file).values()))]
    )

    def read(meta: bool) -> Tensors:
        return read_empty(files) if meta else read_tensors(files, copied=True)

    return Source("safetensors", *_config(file), read, tuple(files))


def _bin(file: Path) -> Source:
    files = [file]
    if file.name == BIN_INDEX:
        files = [file.parent / name for name in sorted(set(weight_map(file).values()))]
        if missing := [part.name for part in files if not part.is_file()]:
            raise UserError(f"{file.parent} lacks {', '.join(missing)}, which {file.name} names. Download it again.")

    def read(meta: bool) -> Tensors:
        for part in map(Pickle, files):
            yield from ((name, part.get(name, meta)) for name in part.tensors)

    return Source("pytorch_model.bin", *_config(file), read)


def _litgpt(file: Path) -> Source:
    weights = Pickle(file)
    return Source("litgpt", *_config(file), lambda meta: ((n, weights.get(n, meta)) for n in weights.tensors))


def _refuse_litgpt(file: Path) -> Source:
    check_no_pointer(file)
    raise UserError(
        f"{file.parent} holds a checkpoint in litgpt's own layout. Convert it with litgpt first, then run this command "
        f"again: litgpt convert_from_litgpt {file.parent} {file.parent}"
    )


def _meta(file: Path) -> Source:
    states = [Pickle(part) for part in sorted(file.parent.glob("consolidated.*.pth"))]
    params = file.parent / "params.json"
    return Source("Meta", params, *read_meta(file.parent, read_json(params), states))
