"""Checkpoints out: an adapter merged, another dtype, other shards; always as a Hugging Face directory."""

import gc
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import litmini
from litmini.adapters import LoRALinear, load_adapter, read_adapter
from litmini.checkpoint import (
    check_checkpoint_dir,
    check_fit,
    disk_tensors,
    empty_model,
    model_tensors,
    parameter_names,
    read_shapes,
    read_tensors,
    save_model,
    shards,
)
from litmini.config import UserError
from litmini.files import read_json, write_aside
from litmini.tokenizer import Tokenizer

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village by the sea,")


def export(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    adapter_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write `checkpoint_dir` to `out_dir`, tensor by tensor, with the adapter of `adapter_dir` added to its weights.

    The change is added in fp32 and rounded once. An adapted head that was tied to the embedding gets weights of its own.

    Args:
        dtype: of the result; None keeps each tensor's own.
        max_shard_bytes: also bounds the memory that is needed.

    Raises:
        UserError: `out_dir` exists, or the checkpoint or adapter is incomplete, damaged or does not fit.
    """
    source, target = check_checkpoint_dir(checkpoint_dir), Path(out_dir)
    if target.exists():
        raise UserError(f"{target} exists already; choose another --out_dir or remove it.")
    module, model = empty_model(source)  # refuses what is not implemented
    empty = ((name, torch.empty(shape, device="meta")) for name, shape in read_shapes(shards(source)).items())
    check_fit(source, model, {name: tuple(t.shape) for name, t in model_tensors(module, model.config, empty)})
    raw = {k: v for k, v in read_json(source / "config.json").items() if k != "torch_dtype"}  # since v5: `dtype`
    tensors: Iterable[tuple[str, Tensor]] = read_tensors(shards(source))
    tokenizer = Tokenizer(source)
    if adapter_dir is not None:
        ties = {copy: first for first, *copies in parameter_names(model).values() for copy in copies}
        load_adapter(model, adapter_dir)  # refuses one of another base
        config, changes = read_adapter(adapter_dir)
        if any(name.removesuffix(".weight") in changes for name in ties):
            raw["tie_word_embeddings"] = False
        merged = _merged(model_tensors(module, model.config, tensors), config.alpha / config.rank, changes, ties, dtype)
        tensors = disk_tensors(module, model.config, merged)
        if (Path(adapter_dir) / "tokenizer.json").is_file():  # the template of its training
            tokenizer = Tokenizer(adapter_dir)
    if dtype is not None:
        tensors = ((name, tensor.to(dtype)) for name, tensor in tensors)
    with write_aside(target) as aside:
        save_model(aside, raw, tensors, side_files=source, max_shard_bytes=max_shard_bytes)
        tokenizer.save(aside)
    return target


def _merged(
    tensors: Iterable[tuple[str, Tensor]],
    scale: float,
    changes: dict[str, dict[str, Tensor]],
    ties: dict[str, str],
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model with an adapter's changes, by linear, added to those that they cover.

    Args:
        ties: further name -> first name of a parameter; a changed one is written beside the one that it was tied to.
    """
    for name, tensor in tensors:
        for same in [name, *(copy for copy, first in ties.items() if first == name)]:
            change = changes.pop(same.removesuffix(".weight"), None)
            if change is not None:
                yield same, _merge(tensor, change, scale, dtype)
            elif same == name:
                yield name, tensor
    assert not changes, f"no weights for {', '.join(changes)}"


def _merge(weight: Tensor, change: dict[str, Tensor], scale: float, dtype: torch.dtype | None) -> Tensor:
    """The change is added in fp32 and rounded once, to `dtype` or the weight's own."""
    rank = len(change["lora_A"])
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight.float(), requires_grad=False)
    layer = LoRALinear(base, rank, scale * rank)
    layer.lora_A.data, layer.lora_B.data = change["lora_A"], change["lora_B"]
    return layer.merge().weight.detach().to(dtype or weight.dtype)


@torch.no_grad()
def merge_error(
    checkpoint_dir: str | Path, adapter_dir: str | Path, merged_dir: str | Path, dtype: str
) -> tuple[float, float]:
    """(largest difference of log-probabilities between merged and unmerged, share of positions with the same best token).

    Measured on a few prompts, both in `dtype`; one model in memory at a time.
    """
    outputs = []
    for directory, adapter in ((checkpoint_dir, adapter_dir), (merged_dir, None)):
        model, tokenizer = litmini.load(directory, adapter, dtype=dtype)
        rows = [model(torch.tensor([tokenizer.encode(prompt)]))[0].float().log_softmax(-1) for prompt in PROMPTS]
        outputs.append(torch.cat(rows))  # (tokens of all prompts, vocab)
        del model
        gc.collect()
    unmerged, merged = outputs
    same = (unmerged.argmax(-1) == merged.argmax(-1)).float().mean()
    return float((unmerged - merged).abs().max()), float(same)


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB or 5GB (powers of ten).

    Raises:
        UserError: it is no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * 10 ** {"": 0, "K": 3, "M": 6, "G": 9, "T": 12}[found[2].upper()]) if found else 0
    if size < 1:
        raise UserError(f"size {text!r}; expected a number with KB, MB or GB, such as 5GB")
    return size
