"""Distillation: its data, its objective, and what it reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from litmini.checkpoints.config import empty_model, read_config
from litmini.checkpoints.scores import refuse_scores
from litmini.config.distill import FinetuneDistillConfig
from litmini.data.dataset import Example, Examples
from litmini.data.distill import PromptSequences, TaughtSequences, prompt_size
from litmini.errors import UserError, counted
from litmini.generation.rollouts import Rollout
from litmini.methods.teacher_head import HiddenHead, TeacherTargets, TopKTargets, with_teacher
from litmini.ops.cross_entropy import IGNORE, Targets
from litmini.runs.manifest import weights_hash
from litmini.tasks import sft
from litmini.tasks.distill_sampling import StudentSampling
from litmini.tasks.plan import plan
from litmini.tasks.preference import INPUTS
from litmini.tasks.setup import Data
from litmini.tokenizer import Tokenizer
from litmini.training.objective import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, kw_only=True)
class DistillData(Data):
    """The sequences of a run; of on-policy distillation, `sampling` makes the batches of most steps."""

    vocab: int
    """Rows of the vocabulary that teacher and student have in common."""
    sampling: StudentSampling | None = None

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        if self.sampling is not None and self.sampling.is_due(step):
            return self.sampling.batches(step, self._numbers(step))
        return super().batches(step, rank, world)

    def locations(self, step: int, rank: int, world: int) -> list[list[str]]:
        if self.sampling is not None and self.sampling.is_due(step):
            return self.train.locations(self.sampling.numbers)
        return super().locations(step, rank, world)


class Distillation:
    """The loss against a teacher, summed over target tokens; in evaluation mode the cross entropy on the data.

    So the validation loss is that of plain finetuning. The student has a `StudentHead`.

    Args:
        model: without Fabric's wrapper.
    """

    unit = "target_tokens"

    def __init__(self, config: FinetuneDistillConfig, model: nn.Module, vocab: int) -> None:
        self.config, self._model, self._vocab = config.distill, model, vocab
        self.names: tuple[str, ...] = ("divergence", "cross_entropy")
        self.names += ("length", "truncated") if self.config.mode == "on_policy" else ()
        self.shown = {"divergence": ".3f"}
        self._sampled = torch.zeros(3)
        self._teacher: tuple[nn.Module, HiddenHead] | None = None
        self._sums: Tensor | None = None

    def use_teacher(self, model: nn.Module, head: HiddenHead) -> None:
        """Compare with this model, on the student's device, from now on."""
        self._teacher = model, head

    def count(self, batch: Batch) -> int:
        """Return the number of target tokens."""
        return int((batch["labels"] != IGNORE).sum())

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the summed loss: that of `distill.kl_weight`, or the divergence alone on the student's completions."""
        inputs = {name: batch[name] for name in INPUTS}
        if not model.training:
            return model(**inputs)[0]  # type: ignore[no-any-return]
        d = self.config
        if d.mode == "offline":
            inputs["labels"] = with_teacher(
                TopKTargets,
                batch["labels"],
                ids=batch["teacher_ids"],
                log_probs=batch["teacher_log_probs"],
                temperature=d.temperature,
            )
        else:
            inputs["labels"] = self._with_hidden(inputs)
        sums, _ = model(**inputs)  # (2,)
        found = torch.cat([sums.detach(), (Targets.of(inputs["labels"]).labels != IGNORE).sum()[None]])
        self._sums = found if self._sums is None else self._sums + found
        if d.mode == "on_policy":
            return sums[0]  # type: ignore[no-any-return]
        return d.kl_weight * d.temperature**2 * sums[0] + (1 - d.kl_weight) * sums[1]  # type: ignore[no-any-return]

    @torch.no_grad()
    def _with_hidden(self, inputs: dict[str, Any]) -> TeacherTargets:
        """Return the labels with the teacher's hidden states."""
        targets, d = Targets.of(inputs["labels"]), self.config
        logits: Callable[[Tensor], Tensor]
        if self._teacher is None:  # a dry run: nothing is compared, in as much memory
            hidden = torch.zeros(len(targets.index), 1, device=targets.index.device)
            logits = partial(_equal_logits, count=self._vocab)
        else:
            teacher, head = self._teacher
            hidden, _ = teacher(**{**inputs, "labels": targets})
            logits = partial(head.logits, count=self._vocab)
        return with_teacher(  # type: ignore[no-any-return]
            TeacherTargets, targets, hidden=hidden, teacher_logits=logits, beta=d.beta, temperature=d.temperature
        )

    def add_completions(self, rollouts: list[Rollout]) -> None:
        """Add what the metrics of the student's completions are made of."""
        sums = [len(rollouts), sum(len(one.ids) for one in rollouts), sum(one.truncated for one in rollouts)]
        self._sampled = self._sampled + torch.tensor(sums, dtype=torch.float32)

    def take_sums(self) -> Tensor:
        """Return the sums since the last call, and begin again."""
        device = next(self._model.parameters()).device
        sums = torch.zeros(3, device=device) if self._sums is None else self._sums
        sampled = self._sampled.to(device)
        self._sums, self._sampled = None, torch.zeros(3)
        return torch.cat([sums, sampled])

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Return means over target tokens and completions; none where nothing was compared, or sampled."""
        divergence, cross_entropy, n, completions, tokens, truncated = sums
        found = {"divergence": divergence / n, "cross_entropy": cross_entropy / n} if n else {}
        return found | ({"length": tokens / completions, "truncated": truncated / completions} if completions else {})


def _equal_logits(rows: Tensor, count: int) -> Tensor:
    return rows.new_zeros(len(rows), count)


def prepare_data(fabric: Fabric, config: FinetuneDistillConfig, began: datetime | None = None) -> DistillData:
    """Download student and teacher if they are missing, compare their vocabularies, tokenise the data, and plan the run.

    Raises:
        UserError: the vocabularies differ, a context is too short, or the data cannot be read.
    """
    data = sft.prepare_data(fabric, config, began, _plan)
    assert isinstance(data, DistillData)
    teacher = filter(None, (config.distill.teacher_dir, config.distill.teacher_adapter_dir))
    return dataclasses.replace(data, hashes=data.hashes | {name: weights_hash(Path(name)) for name in teacher})


def _plan(
    fabric: Fabric,
    config: FinetuneDistillConfig,
    tokenizer: Tokenizer,
    base: Any,
    train: Examples,
    val: Examples | None,
    val_examples: list[Example],
) -> DistillData:
    """`plan`, with the teacher's vocabulary and context."""
    teacher = _open_teacher(fabric, config, tokenizer)
    vocab = min(base.vocab_size, teacher.vocab_size)
    context = min(base.max_positions, teacher.max_positions)
    assert config.data.max_seq_len is not None
    if config.data.max_seq_len > context:
        raise UserError(
            f"data.max_seq_len is {config.data.max_seq_len}, the teacher's context {context} tokens: use "
            f"--data.max_seq_len {context} or less."
        )
    if config.distill.mode == "offline":
        data = plan(fabric, config, tokenizer, base, train, val, val_examples, TaughtSequences)
        return DistillData(**vars(data), vocab=vocab)
    count = sum(p.numel() for p in empty_model(Path(config.distill.teacher_dir))[1].parameters())
    bits = 32 if config.precision == "32-true" and config.distill.teacher_bits == 16 else config.distill.teacher_bits
    fabric.print(f"each process holds the teacher, too: {count:,} parameters, in {bits} bits")
    train = _with_room(fabric, config, train, context)
    data = plan(fabric, config, tokenizer, base, train, val, val_examples, PromptSequences)
    assert isinstance(data.train, PromptSequences)
    data.train.longest_completion = config.distill.max_completion_length
    sampling = StudentSampling(config, tokenizer, data.train)
    return DistillData(**vars(data), vocab=vocab, sampling=sampling)


def _open_teacher(fabric: Fabric, config: FinetuneDistillConfig, tokenizer: Tokenizer) -> Any:
    """Return the teacher's `Config`, downloaded if missing; raise a `UserError` unless its vocabulary is the student's."""
    directory = Path(config.distill.teacher_dir)
    with fabric.rank_zero_first():
        if not directory.is_dir():
            from litmini.importers.download import ensure_checkpoint

            ensure_checkpoint(directory, config.distill.teacher_download_from)
    refuse_scores(directory, config.distill.teacher_adapter_dir)
    other = Tokenizer(directory)
    mine, theirs = (one.fast.get_vocab(with_added_tokens=True) for one in (tokenizer, other))
    if mine != theirs:
        ids = {token: (mine.get(token), theirs.get(token)) for token in mine.keys() | theirs.keys()}
        token, (i, j) = min(((t, both) for t, both in ids.items() if both[0] != both[1]), key=lambda one: str(one))
        differing = sum(a != b for a, b in ids.values())
        names = ["no token" if number is None else f"id {number}" for number in (i, j)]
        raise UserError(
            f"{directory} has another vocabulary than {config.checkpoint_dir}: {counted(differing, 'token')} differ, "
            f"{token!r} is {names[0]} of the student and {names[1]} of the teacher. Expected a teacher with the student's "
            f"tokenizer, as models of one series have it."
        )
    if tokenizer.chat_template is not None and other.chat_template not in (None, tokenizer.chat_template):
        fabric.print("note: the teacher's chat template is another; it reads what the student's template writes.")
    _, found = read_config(directory)
    if tokenizer.fast.get_vocab_size() > found.vocab_size:
        raise UserError(
            f"{directory} has {found.vocab_size} rows, and its tokenizer {tokenizer.fast.get_vocab_size()} tokens; expected a "
            f"teacher with a row for each token: choose another --distill.teacher_dir."
        )
    return found


def _with_room(fabric: Fabric, config: FinetuneDistillConfig, examples: Examples, context: int) -> Examples:
    """Return the examples whose prompts leave room for a completion; raise a `UserError` if too many do not."""
    longest = context - config.distill.max_completion_length
    sizes = np.array([prompt_size(examples[i][1]) for i in range(len(examples))])
    left_out = int((sizes > longest).sum())
    if left_out > config.data.max_dropped * len(examples) or left_out == len(examples):
        raise UserError(
            f"{left_out} of {counted(len(examples), 'prompt')} leave no room for a completion of "
            f"{config.distill.max_completion_length} tokens within the context of {context}: lower "
            f"--distill.max_completion_length, or allow it with --data.max_dropped."
        )
    if left_out:
        fabric.print(f"{counted(left_out, 'prompt')} left out, which leave no room for a completion")
    return dataclasses.replace(examples, table=examples.table[sizes <= longest])
