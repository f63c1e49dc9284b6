"""What is kept of a step whose loss or gradients were not finite: which data it was, to be looked at."""

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
    """Write `bad-step-NNNNNN.json`: each example of the step, as place, text, tokens and labels, by micro-batch and row.

    Ranks whose losses are all finite write none, unless all ranks' are: then it was the gradients. Every rank calls this.

    Args:
        losses: the summed loss of each micro-batch; the first that is not finite points at the data that did it.
        places: where the examples of each row are, file:line, of all rows of the micro-batches in a row.

    Returns:
        The files of all ranks, and the places of the examples whose loss was not finite.
    """
    finite = all(map(math.isfinite, losses))
    innocent: Any = fabric.all_reduce(torch.tensor(int(finite), device=fabric.device), reduce_op="sum")
    mine = ""
    if not finite or int(innocent) == fabric.world_size:
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
    left, parts, suspects = iter(locations), [], []
    for loss, batch in zip(losses, micro_batches, strict=True):
        rows = [_examples(batch, row, next(left, []), tokenizer) for row in range(len(batch["tokens"]))]
        parts.append({"loss_sum": loss if math.isfinite(loss) else str(loss), "rows": rows})
        if not math.isfinite(loss):
            suspects += [example["place"] for row in rows for example in row]
    write_json(file, {"step": step, "micro_batches": parts})
    more = f" and {len(suspects) - NAMED} more" if len(suspects) > NAMED else ""
    return f"{file} ({', '.join(suspects[:NAMED])}{more})" if suspects else str(file)


def _examples(batch: Batch, row: int, locations: list[str], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The examples of a row; a row of a corpus is one, whatever documents it has."""
    tokens, labels = batch["tokens"][row], batch["labels"][row]
    documents = batch["documents"][row] if "documents" in batch else torch.ones_like(tokens)
    if len(locations) == 1:
        documents = documents.clamp(max=1)
    found = []
    for document, place in enumerate(locations, 1):
        ids = tokens[documents == document].tolist()
        text = tokenizer.decode(ids, skip_special=False)
        found.append({"place": place, "text": text, "tokens": ids, "labels": labels[documents == document].tolist()})
    return found
