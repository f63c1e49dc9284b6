"""What is kept of a step whose loss or gradients were not finite: which data it was, to be looked at."""

import math
from pathlib import Path

from litmini.files import write_json
from litmini.packing import Batch
from litmini.tokenizer import Tokenizer


def save_bad_step(
    directory: Path, step: int, micro_batches: list[Batch], losses: list[float], tokenizer: Tokenizer, rank: int = 0
) -> Path:
    """Write `bad-step-NNNNNN.json`: each example of the step, as text, tokens and labels, by micro-batch and row.

    Args:
        losses: the summed loss of each micro-batch; the first that is not finite points at the data that did it. Where all
            are finite, the gradients were not.
        rank: of this process; all but the first put it into the file's name.
    """
    file = directory / f"bad-step-{step:06d}{f'-rank-{rank}' if rank else ''}.json"
    parts = []
    for loss, batch in zip(losses, micro_batches, strict=True):
        rows = []
        for tokens, labels, documents in zip(batch["tokens"], batch["labels"], batch["documents"], strict=True):
            examples = []
            for document in range(1, int(documents.max()) + 1):
                ids, targets = tokens[documents == document].tolist(), labels[documents == document].tolist()
                text = tokenizer.decode(ids, skip_special=False)
                examples.append({"text": text, "tokens": ids, "labels": targets})
            rows.append(examples)
        parts.append({"loss_sum": loss if math.isfinite(loss) else str(loss), "rows": rows})
    write_json(file, {"step": step, "micro_batches": parts})
    return file
