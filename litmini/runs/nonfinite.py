"""Saves the data of non-finite steps, whose loss or gradients are NaN or infinite, so that a user can look at them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from litmini.files import write_json
from litmini.tokenizer import Tokenizer
from litmini.training.objective import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

NAMED = 5  # examples in the message; the file has all


def save_nonfinite_step(
    fabric: Fabric,
    directory: Path,
    step: int,
    micro_batches: list[Batch],
    losses: list[float],
    tokenizer: Tokenizer,
    locations: Callable[[], list[list[str]]],
) -> str:
    """Write `bad-step-NNNNNN.json`: location, text, tokens and labels of each example, by micro-batch and sequence.

    Ranks whose losses are all finite write nothing, unless those of all ranks are: then the gradients were not. Every rank
    calls this.

    Args:
        losses: the summed loss of each micro-batch; a non-finite one points at the data that caused it.
        locations: returns the locations (file:line) of the examples of each sequence, over all micro-batches.

    Returns:
        The files of all ranks, and the locations of the examples whose loss was not finite.
    """
    finite = all(map(math.isfinite, losses))
    finite_ranks: Any = fabric.all_reduce(torch.tensor(int(finite), device=fabric.device), reduce_op="sum")
    mine = ""
    if not finite or int(finite_ranks) == fabric.world_size:
        rank = f"-rank-{fabric.global_rank}" if fabric.global_rank else ""
        mine = _write(
            directory / f"bad-step-{step:06d}{rank}.json", step, micro_batches, losses, tokenizer, locations()
        )
    return ", ".join(filter(None, (fabric.broadcast(mine, src=rank) for rank in range(fabric.world_size))))


def _write(
    file: Path,
    step: int,
    micro_batches: list[Batch],
    losses: list[float],
    tokenizer: Tokenizer,
    locations: list[list[str]],
) -> str:
    remaining, parts, suspects = iter(locations), [], []
    for loss, batch in zip(losses, micro_batches, strict=True):
        rows = [_examples(batch, row, next(remaining, []), tokenizer) for row in range(len(batch["tokens"]))]
        parts.append({"loss_sum": loss if math.isfinite(loss) else str(loss), "rows": rows})
        if not math.isfinite(loss):
            suspects += [example["place"] for row in rows for example in row]
    write_json(file, {"step": step, "micro_batches": parts})
    more = f" and {len(suspects) - NAMED} more" if len(suspects) > NAMED else ""
    return f"{file} ({', '.join(suspects[:NAMED])}{more})" if suspects else str(file)


def _examples(batch: Batch, row: int, locations: list[str], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the examples of a sequence; a sequence of a corpus is one example, whatever documents it has."""
    tokens, labels = batch["tokens"][row], batch["labels"][row]
    documents = batch["documents"][row] if "documents" in batch else torch.ones_like(tokens)
    if len(locations) == 1:
        documents = documents.clamp(max=1)
    examples = []
    for document, location in enumerate(locations, 1):
        inside = documents == document
        ids = tokens[inside].tolist()
        text = tokenizer.decode(ids, skip_special=False)
        examples.append({"place": location, "text": text, "tokens": ids, "labels": labels[inside].tolist()})
    return examples
