"""Exports checkpoints as Hugging Face directories: merges an adapter, and changes dtype and shard size."""

import gc
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from litmini.checkpoints.adapter import Adapter
from litmini.checkpoints.classifier import put_scores_of_adapter, with_scores
from litmini.checkpoints.config import (
    changed_config,
    disk_tensors,
    dtype_of,
    empty_model,
    model_tensors,
    parameter_names,
    parts_beside,
    read_raw_config,
)
from litmini.checkpoints.hf import check_checkpoint_dir, check_fit, save_model, wrong_dtype
from litmini.checkpoints.load import load
from litmini.checkpoints.peft import check_adapter, grow_for, name_as_in, read_adapter
from litmini.checkpoints.peft_tokens import has_vocabulary, with_rows
from litmini.checkpoints.safetensors_io import give_memory_back, read_empty, read_tensors, shards
from litmini.checkpoints.scores import gives_scores
from litmini.errors import UserError
from litmini.files import write_atomically
from litmini.methods.base_layer import dense, linears
from litmini.methods.nf4 import NF4Linear, quantizable
from litmini.ops.rounding import stochastic_round
from litmini.tokenizer import Tokenizer

SUMS = 1e-4  # what sums in another order change in log-probabilities, in any dtype
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village by the sea,")


def export(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    adapter_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    base: Literal["trained", "original"] = "trained",
) -> Path:
    """Write `checkpoint_dir` to `out_dir`, tensor by tensor, with the adapter of `adapter_dir` added to its weights.

    The delta is added in fp32, and the sum is rounded once. A head with an adapter that was tied to the embedding gets its
    own weights.

    Args:
        dtype: of the result; None keeps the dtype of each tensor.
        max_shard_bytes: maximum size of a weight file.
        base: for an adapter that was trained on a 4-bit base: add it to the dequantized weights, or to the original ones.

    Raises:
        UserError: `out_dir` exists, or the checkpoint or adapter is incomplete, damaged or does not fit.
    """
    source, target = check_checkpoint_dir(checkpoint_dir), Path(out_dir)
    if target.exists():
        raise UserError(f"{target} exists already; choose another --out_dir or remove it.")
    give_memory_back()
    module, model = empty_model(source)  # refuses what is not implemented
    own = module.owns if hasattr(module, "owns") else None
    empty = list(read_empty(shards(source), own))
    inside = list(model_tensors(module, model.config, empty))
    problems = [text for pair in inside for text in wrong_dtype(*pair)]
    check_fit(source, model, {name: tuple(t.shape) for name, t in inside}, problems)
    raw = {k: v for k, v in read_raw_config(source).items() if k != "torch_dtype"}  # since transformers 5: `dtype`
    tensors: Iterable[tuple[str, Tensor]] = read_tensors(shards(source), copied=True, only=own)
    tokenizer = Tokenizer(source)
    if adapter_dir is not None:
        adapter, old = read_adapter(adapter_dir), None
        if adapter.config.get("task_type") == "SEQ_CLS":
            old, changes = put_scores_of_adapter(model, adapter, source, tokenizer)
            raw = changed_config(raw, **changes)
        name_as_in(model, adapter)
        rows_before = model.config.vocab_size  # type: ignore[union-attr]
        grows = has_vocabulary(model, adapter)
        grow_for(model, adapter)
        check_adapter(model, adapter)  # refuses one of another base
        rows = model.config.vocab_size  # type: ignore[union-attr]
        raw = changed_config(raw, vocab_size=rows) if rows != rows_before else raw
        tied = [name for same in parameter_names(model).values() if len(same) > 1 for name in same]
        if any(_changed(adapter, name) for name in tied):
            raw = changed_config(raw, tie_word_embeddings=False)
        quantized = set(quantizable(model)) if adapter.quantize.bits == 4 and base == "trained" else set()

        def with_adapter(stream: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
            inside = model_tensors(module, model.config, stream)
            inside = inside if old is None else with_scores(inside, adapter, old)
            if grows:
                inside = with_rows(model, adapter, inside)
            return disk_tensors(module, model.config, _merged(model, inside, adapter, quantized, dtype))

        empty, tensors = list(with_adapter(empty)), with_adapter(tensors)
        if (Path(adapter_dir) / "tokenizer.json").is_file():  # with the chat template of its training
            tokenizer = Tokenizer(adapter_dir)
    if dtype is not None:
        empty = [(name, like.to(dtype_of(module, name, dtype))) for name, like in empty]
    with write_atomically(target, new=True) as aside:
        beside = parts_beside(module, source)
        save_model(aside, raw, tensors, source, max_shard_bytes, empty=empty, beside=beside)
        tokenizer.save(aside)
    return target


def _changed(adapter: Adapter, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return owner in adapter.full or (owner in adapter.layers and last == "weight")


def _merged(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    adapter: Adapter,
    quantized: set[str],
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of `model`, which is on the meta device, with the deltas of the adapter added in fp32.

    A tied parameter is written under each of its names if the adapter changes one of them.

    Args:
        quantized: linears whose weight is quantized to 4 bits first, since the adapter was trained on those.
        dtype: of the tensors to save; None: each keeps its own.
    """
    names = parameter_names(model)
    for name, tensor in tensors:
        same = names.get(name, [name])
        for own in same if any(_changed(adapter, n) for n in same) else [name]:
            owner, _, last = own.rpartition(".")
            if tensor.is_meta:
                yield own, tensor  # merging changes neither the shape nor the dtype to save
            elif owner in adapter.full:
                yield own, adapter.full[owner][last]
            elif last == "weight" and (owner in adapter.layers or owner in quantized):
                merged = _merge(model.get_submodule(owner), tensor, adapter, owner, owner in quantized)
                if owner not in quantized:  # rounding to the nearest would lose small deltas: see docs/training.md
                    generator = torch.Generator().manual_seed(zlib.crc32(own.encode()))
                    merged = stochastic_round(merged, dtype or tensor.dtype, generator)
                yield own, merged
            elif last == "bias":
                yield own, adapter.merged_bias(owner, tensor)
            else:
                yield own, tensor


def _merge(base: nn.Module, weight: Tensor, adapter: Adapter, name: str, quantized: bool) -> Tensor:
    """Return the weight with the adapter's delta added in fp32."""
    empty = base.weight
    base.weight = nn.Parameter(weight.to(adapter.dtype) if quantized else weight.float(), requires_grad=False)
    layer: Any = NF4Linear(base, adapter.quantize.double) if quantized else base
    adapted = name in adapter.layers
    merged = adapter.load(name, adapter.layer(name, layer)).merged_weight() if adapted else dense(layer)
    base.weight = empty
    return merged.detach()


@dataclass(frozen=True)
class MergeError:
    """How a merged checkpoint differs from the adapter over its base, on a few prompts."""

    difference: float
    """Largest difference of log-probabilities."""
    same: float
    """Fraction of positions with the same most probable token."""
    rounding: float
    """Largest difference that rounding the merged weights once more makes, in the same dtype."""

    @property
    def expected(self) -> bool:
        """Whether the difference is of the size of rounding."""
        return self.difference <= 3 * self.rounding + SUMS


@torch.no_grad()
def merge_error(checkpoint_dir: str | Path, adapter_dir: str | Path, merged_dir: str | Path, dtype: str) -> MergeError:
    """Compare the merged checkpoint with the adapter over its base, in 4 bits if it was trained so, on a few prompts.

    Both run in `dtype`, and one model is in memory at a time.
    """
    bits = read_adapter(adapter_dir).quantize.bits
    outputs = []
    for directory, adapter in ((checkpoint_dir, adapter_dir), (merged_dir, None)):
        model, tokenizer = load(directory, adapter, dtype=dtype, bits=bits if adapter else 16)
        prompts = [torch.tensor([tokenizer.encode(prompt)]) for prompt in PROMPTS]
        outputs.append(_outputs(model, prompts))
        if adapter is None:
            _round_again(model)
            outputs.append(_outputs(model, prompts))
        del model
        gc.collect()
    unmerged, merged, again = outputs
    same = (unmerged.argmax(-1) == merged.argmax(-1)).float().mean()
    return MergeError(float((unmerged - merged).abs().max()), float(same), float((merged - again).abs().max()))


def _outputs(model: nn.Module, prompts: list[Tensor]) -> Tensor:
    """Return log-probabilities (tokens of all prompts, vocab) in fp32; of a classifier, scores."""
    outputs = torch.cat([model(prompt)[0].float() for prompt in prompts])
    return outputs if gives_scores(model) else outputs.log_softmax(-1)


def _round_again(model: nn.Module) -> None:
    """Move the weight of each linear by up to a ULP of its dtype, at random, as a merge moves it."""
    generator = torch.Generator().manual_seed(0)
    for linear in linears(model).values():
        weight = linear.weight.data
        noise = 2 * torch.rand(weight.shape, generator=generator) - 1
        moved = weight.float() * (1 + torch.finfo(weight.dtype).eps / 2 * noise)
        linear.weight = nn.Parameter(stochastic_round(moved, weight.dtype, generator), requires_grad=False)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 500MB or 5GB (powers of ten).

    Raises:
        UserError: `text` is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * 10 ** {"": 0, "K": 3, "M": 6, "G": 9, "T": 12}[found[2].upper()]) if found else 0
    if size < 1:
        raise UserError(f"size {text!r}; expected a number with KB, MB or GB, such as 5GB")
    return size
