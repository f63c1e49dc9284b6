"""The log-probabilities of the reference where all weights are trained: computed once, with the model as it starts, and kept
on disk. With adapters there is nothing to keep: the model without them is the reference.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from litmini.config.preference import FinetunePreferenceConfig
from litmini.data.preferences import PreferenceSequences
from litmini.data.token_cache import cache_directory
from litmini.distributed.host_arrays import broadcast_on_host, sum_array_on_host
from litmini.runs.manifest import weights_hash
from litmini.tasks.preference import INPUTS, PreferenceData
from litmini.training.objective import Batch
from litmini.training.setup import on_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric

ALONE = -1  # the number of a sequence that is not one of an epoch
FORMAT = 1  # raise it with each change of what is computed, or of how it is stored


def remember_reference(fabric: Fabric, model: Any, data: PreferenceData, config: FinetunePreferenceConfig) -> None:
    """Give the sequences of `data` the log-probability of each label under `model`, from the cache or computed now.

    Do nothing with adapters, or where the loss has no reference. Every rank calls this, and gets the same values.

    Args:
        model: as Fabric wrapped it, with a `LogProbHead`, and as the run began with it.
    """
    if config.lora is not None or not config.preference.has_reference:
        return
    for sequences in (data.train, data.val):
        if isinstance(sequences, PreferenceSequences):
            sizes = [len(inputs) for inputs, _ in sequences.examples.arrays]
            file = cache_directory() / f"reference-{_key(sequences, config)}.npy"
            known = _read(file, sum(sizes)) if fabric.is_global_zero else None
            if fabric.broadcast(known is not None):
                values = broadcast_on_host(fabric, np.zeros(sum(sizes), np.float32) if known is None else known)
            else:
                values = sum_array_on_host(fabric, _compute(fabric, model, sequences, data))
                if fabric.is_global_zero:
                    _write(file, values)
            sequences.use_reference(np.split(values, np.cumsum(sizes)[:-1]))


def _key(sequences: PreferenceSequences, config: FinetunePreferenceConfig) -> str:
    """Return a hash of everything that decides the values: weights, configuration, tokens, and precision."""
    digest = hashlib.sha256()
    directory = Path(config.base)
    settings = [FORMAT, weights_hash(directory), config.precision, config.float32_matmul_precision]
    settings += [config.seed] if config.precision.endswith("mixed") else []  # weights are dithered by it
    for file in (directory / "config.json", config.model_file and Path(config.model_file)):
        settings.append(hashlib.sha256(file.read_bytes()).hexdigest() if file else None)
    digest.update(json.dumps(settings).encode())
    for inputs, labels in sequences.examples.arrays:
        digest.update(inputs.tobytes() + labels.tobytes())
    digest.update(np.ascontiguousarray(sequences.examples.table).tobytes())  # which of them are used
    return digest.hexdigest()[:32]


def _read(file: Path, size: int) -> np.ndarray | None:
    """Return the values of a cache; None if there is none, or it is damaged."""
    try:
        values = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == (size,) and values.dtype == np.float32 and np.isfinite(values).all() else None


def _write(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            np.save(out, values)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


@torch.no_grad()
def _compute(fabric: Fabric, model: Any, sequences: PreferenceSequences, data: PreferenceData) -> np.ndarray:
    """Return the log-probability of each label of this rank's part of the sequences, 0 elsewhere; (tokens,) fp32.

    The batches are those of the first epoch of training: the same sums, rounded in the same order, as in its first steps.
    """
    starts = np.cumsum([0, *(len(inputs) for inputs, _ in sequences.examples.arrays)])
    values = np.zeros(int(starts[-1]), np.float32)
    was_training = model.training
    model.train(sequences is data.train)
    both = (sequences, sequences.mismatched)
    with tqdm(desc="reference", unit="batch", disable=None if fabric.is_global_zero else True) as bar:
        for one in both:
            if one is None:
                continue
            reverse = reversed(range(len(one)))
            firsts = {i: number for number in reverse for i in one.sequence(number)}
            step = data.global_batch_size if sequences is data.train else len(one)
            for members, batch in _batches(one, firsts, step, data.micro_batch_size, fabric):
                ready = on_device(batch, fabric.device)
                found = model(**{name: ready[name] for name in INPUTS})[0].cpu().numpy()  # CPU-GPU sync point
                for row, (number, examples) in zip(found, members, strict=False):
                    at = 0
                    for i in examples:
                        entry = one.examples.table[i]
                        size, first = int(entry["size"]), starts[entry["file"]] + entry["start"]
                        if firsts[i] == number:  # else another sequence, maybe of another rank, has it as well
                            values[first : first + size] = row[at : at + size]
                        at += size
                bar.update()
    model.train(was_training)
    return values


def _batches(
    sequences: PreferenceSequences, firsts: dict[int, int], step: int, micro: int, fabric: Fabric
) -> Iterator[tuple[list[tuple[int, list[int]]], Batch]]:
    """Yield the batches of this rank, with number and examples of each of their sequences.

    Args:
        firsts: example -> the first sequence that it is in; others, of data sets with a weight below 1, follow alone.
        step: sequences in an optimizer step.
    """
    rank, world = fabric.global_rank, fabric.world_size
    for first in range(0, len(sequences), step):
        numbers = range(first, min(first + step, len(sequences)))
        mine = numbers[rank::world]
        for i, batch in enumerate(sequences.batches(numbers, micro, rank, world)):
            yield [(n, sequences.sequence(n)) for n in mine[i * micro : (i + 1) * micro]], batch
    rest = [i for i in range(len(sequences.examples)) if i not in firsts]
    firsts |= dict.fromkeys(rest, ALONE)
    for first in range(0, len(rest), micro * world):
        members = [[i] for i in rest[first + rank * micro : first + (rank + 1) * micro]]
        yield [(ALONE, one) for one in members], sequences.batch(members or [[]])
