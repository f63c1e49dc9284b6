"""What the teacher of offline distillation expects at each supervised token: computed once, and kept beside the token cache.

A row has the teacher's most probable tokens, their log-probabilities and that of all other tokens together. Rows are written
as they are computed, and a run that is interrupted resumes after the last of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from litmini.checkpoints.load import load
from litmini.config.distill import FinetuneDistillConfig
from litmini.data.distill import TaughtSequences, row_starts, row_type, tokens_hash
from litmini.data.packing import Batch, PackedDataset
from litmini.data.token_cache import cache_directory
from litmini.errors import UserError, counted
from litmini.files import read_json, write_json
from litmini.methods.teacher_head import HiddenHead, use_hidden_head
from litmini.ops.cross_entropy import CHUNK
from litmini.ops.divergence import top_k_log_probs
from litmini.runs.manifest import weights_hash
from litmini.system import check_disk_space, try_lock
from litmini.tasks.preference import INPUTS
from litmini.training.setup import on_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric

FORMAT = 1  # raise it with each change of what is computed, or of how it is stored
SAVE_EVERY = 32  # micro-batches after which rows are flushed to disk
LEAST = -6e4  # log-probabilities below it are beyond fp16
SHARE = "let all processes share a directory, and name it with the environment variable LITMINI_CACHE."


def load_teacher(config: FinetuneDistillConfig, fabric: Fabric) -> tuple[nn.Module, HiddenHead]:
    """Return the teacher, frozen and in evaluation mode on this process's device, and its head."""
    d = config.distill
    dtype = "fp32" if config.precision == "32-true" else "bf16"
    model, _ = load(d.teacher_dir, d.teacher_adapter_dir, dtype, str(fabric.device), d.teacher_bits)
    return model.requires_grad_(False).eval(), use_hidden_head(model)


def remember_teacher(fabric: Fabric, sequences: TaughtSequences, config: FinetuneDistillConfig, vocab: int) -> None:
    """Give `sequences` the teacher's rows, from the cache or computed now. Every rank calls this.

    Args:
        vocab: rows of the vocabulary that both models have.

    Raises:
        UserError: the disk has too little space, or the processes have no cache directory in common.
    """
    cache = _Rows(fabric, sequences, config, vocab)
    done = fabric.broadcast(cache.is_complete())
    what = f"the teacher's {cache.k} most probable tokens at each of {counted(cache.total, 'supervised token')}"
    size = f"{cache.size / 1e9:.2f} GB" if cache.size >= 1e8 else f"{cache.size / 1e6:.2f} MB"
    fabric.print(f"{what}: {size} in {cache.directory}{', computed already' * done}")
    if config.dry_run or config.show_masks:
        return sequences.use(None, cache.k)
    if not done:
        cache.compute()
    if not cache.is_complete():
        raise UserError(f"{cache.directory}, which rank 0 has written, is not here: {SHARE}")
    sequences.use(np.memmap(cache.file, cache.kind, "r"), cache.k)


class _Rows:
    """The rows of some examples on disk: `rows.bin`, one for each supervised token, and `progress.json`."""

    def __init__(self, fabric: Fabric, sequences: TaughtSequences, config: FinetuneDistillConfig, vocab: int) -> None:
        self.fabric, self.config, self.vocab = fabric, config, vocab
        data = config.data
        self.plain = PackedDataset(sequences.examples, data.most_tokens, data.pack, config.seed, shuffle=False)
        self.starts = row_starts(sequences.examples)
        self.k = min(config.distill.top_k, vocab)
        self.kind, self.total = row_type(self.k, vocab), int(self.starts[-1])
        self.size = self.total * self.kind.itemsize
        self.directory = cache_directory() / f"teacher-{self._key()}"
        self.file = self.directory / "rows.bin"

    def _key(self) -> str:
        """Return a hash of everything that decides the rows: the teacher, how it computes, and the tokens."""
        config, d = self.config, self.config.distill
        settings: list[Any] = [FORMAT, self.k, self.vocab, d.temperature, d.teacher_bits, config.precision == "32-true"]
        settings += [config.float32_matmul_precision, config.data.pack, self.plain.length]  # sums round by them
        settings.append(tokens_hash(self.plain.examples))
        for directory in map(Path, filter(None, (d.teacher_dir, d.teacher_adapter_dir))):
            settings.append(weights_hash(directory))
            files = [directory / name for name in ("config.json", "adapter_config.json")]
            settings += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    def done(self) -> int:
        """Return how many sequences are on disk; 0 if they are damaged, or none is."""
        try:
            whole = self.file.stat().st_size == self.size
            return int(read_json(self.directory / "progress.json")["sequences"]) if whole else 0
        except (UserError, OSError, ValueError, KeyError, TypeError):
            return 0

    def is_complete(self) -> bool:
        return self.done() >= len(self.plain)

    def compute(self) -> None:
        """Write the rows that are missing; each rank writes those of its sequences into the same file."""
        fabric, unlock, failed = self.fabric, None, None
        if fabric.is_global_zero:
            try:
                unlock = self._prepare()
            except UserError as error:
                failed = error
            except OSError as error:
                failed = UserError(
                    f"the cache {self.directory} cannot be written: {error.strerror}. Name another directory with the "
                    f"environment variable LITMINI_CACHE."
                )
        if failed := fabric.broadcast(failed):
            raise failed
        try:
            done = fabric.broadcast(self.done())
            if done < len(self.plain):
                self._compute_from(done)
        finally:
            if unlock:
                unlock()

    def _prepare(self) -> Any:
        """Lock the directory, make the file unless it is there, and return what unlocks."""
        if not self.file.exists():
            check_disk_space(self.directory, self.size)
        self.directory.mkdir(parents=True, exist_ok=True)
        unlock = try_lock(self.directory, wait=True)  # another run may be computing them
        if self.done() == 0:
            write_json(self.directory / "progress.json", {"sequences": 0})
            with self.file.open("wb") as file:
                file.truncate(self.size)
        return unlock

    def _compute_from(self, done: int) -> None:
        if not self.file.is_file():
            raise UserError(f"{self.directory} is not here: {SHARE}")
        fabric, plain, starts = self.fabric, self.plain, self.starts
        model, head = load_teacher(self.config, fabric)
        rank, world, micro = fabric.global_rank, fabric.world_size, self.config.train.micro_batch_size
        silent = None if rank == 0 else True
        with (
            self.file.open("r+b") as out,
            tqdm(desc="teacher", unit="seq", total=len(plain), initial=done, disable=silent) as bar,
        ):
            for number, first in enumerate(range(done, len(plain), micro * world), 1):
                last = min(first + micro * world, len(plain))
                members = [plain.sequence(n) for n in range(first, last)[rank::world]]
                found = self._rows(model, head, plain.batch(members)) if members else np.zeros(0, self.kind)
                for i in (i for sequence in members for i in sequence):
                    n = int(starts[i + 1] - starts[i])
                    out.seek(int(starts[i]) * self.kind.itemsize)
                    out.write(found[:n].tobytes())
                    found = found[n:]
                bar.update(last - first)
                if number % SAVE_EVERY == 0 or last == len(plain):
                    out.flush()
                    os.fsync(out.fileno())
                    fabric.barrier()  # all have written theirs
                    if fabric.is_global_zero:
                        write_json(self.directory / "progress.json", {"sequences": last})
        fabric.barrier()

    @torch.no_grad()
    def _rows(self, model: nn.Module, head: HiddenHead, batch: Batch) -> np.ndarray:
        """Return what the teacher expects at the n supervised tokens of a batch, (n,) of `kind`."""
        ready = on_device(batch, self.fabric.device)
        hidden, _ = model(**{name: ready[name] for name in INPUTS})
        found = np.zeros(len(hidden), self.kind)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = head.logits(hidden[part], self.vocab)
            ids, log_probs = top_k_log_probs(logits, self.k, self.config.distill.temperature)
            found["ids"][part] = ids.cpu().numpy()  # CPU-GPU sync point
            found["log_probs"][part] = log_probs.clamp(min=LEAST).cpu().numpy()
        return found
