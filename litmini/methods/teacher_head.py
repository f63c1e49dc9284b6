"""A head that compares its logits with those of a teacher, at the labelled positions, in chunks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litmini.methods.heads import head_name
from litmini.ops.cross_entropy import CHUNK, UNFUSED, OutputHead, Targets, linear_cross_entropy, rows_at_once
from litmini.ops.divergence import generalized_jsd, top_k_divergence


@dataclass(frozen=True)
class TopKTargets(Targets):
    """Labels with the teacher's most probable tokens at each of them, as `top_k_log_probs` gives them."""

    ids: Tensor | None = None
    """(n, k) int64."""
    log_probs: Tensor | None = None
    """(n, k + 1)."""
    temperature: float = 1.0

    def divergence(self, logits: Tensor, part: slice) -> Tensor:
        """Return KL(teacher || student) of some of the labels, (c,)."""
        assert self.ids is not None and self.log_probs is not None
        return top_k_divergence(logits, self.ids[part], self.log_probs[part], self.temperature)


@dataclass(frozen=True)
class TeacherTargets(Targets):
    """Labels with the teacher's last hidden states at each of them, from which its logits are made chunk by chunk."""

    hidden: Tensor | None = None
    """(n, the teacher's dim)."""
    teacher_logits: Callable[[Tensor], Tensor] | None = None
    """hidden (c, dim) -> logits (c, rows) fp32; of the student's logits, the first so many are compared with them."""
    beta: float = 0.5
    temperature: float = 1.0

    def divergence(self, logits: Tensor, part: slice) -> Tensor:
        """Return the generalized Jensen-Shannon divergence of some of the labels, (c,)."""
        assert self.hidden is not None and self.teacher_logits is not None
        with torch.no_grad():
            teacher = self.teacher_logits(self.hidden[part])
        return generalized_jsd(logits[:, : teacher.shape[1]], teacher, self.beta, self.temperature)


class StudentHead(OutputHead):
    """Sums of the divergence from a teacher and of the cross entropy; with plain labels, the cross entropy alone."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits, as without labels."""
        return self.original(hidden)  # type: ignore[no-any-return]

    def outputs(self, hidden: Tensor, labels: Tensor | Targets, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Return (2,) fp32, divergence and cross entropy summed over the labels, and the number of labels (int64, 0-d).

        With plain labels, return the cross entropy, 0-d, in place of the two.
        """
        if not isinstance(labels, (TopKTargets, TeacherTargets)):
            return linear_cross_entropy(hidden, self.original, labels, softcap)
        rows = hidden.flatten(0, 1).index_select(0, labels.index)  # (n, dim)
        wanted = labels.labels.flatten().index_select(0, labels.index)  # (n,)
        chunk = rows_at_once(self.original, labels, rows.shape[-1], 2 * UNFUSED, CHUNK)
        sums = torch.zeros(2, dtype=torch.float32, device=rows.device)
        for start in range(0, max(1, len(rows)), chunk):  # no label: one empty chunk, for a graph
            part = slice(start, start + chunk)
            args = (rows[part], wanted[part], labels, part, softcap)
            sums = sums + checkpoint(self._sums, *args, use_reentrant=False)
        return sums, labels.count()

    def _sums(
        self, rows: Tensor, wanted: Tensor, labels: TopKTargets | TeacherTargets, part: slice, softcap: float | None
    ) -> Tensor:
        logits = self.original(rows).float()  # (c, vocab)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.stack([labels.divergence(logits, part).sum(), F.cross_entropy(logits, wanted, reduction="sum")])


class HiddenHead(OutputHead):
    """The last hidden states at labelled positions, and the logits that the original head makes of them."""

    softcap: float | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits, as without labels."""
        return self.original(hidden)  # type: ignore[no-any-return]

    def outputs(self, hidden: Tensor, labels: Tensor | Targets, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Return (n, dim), the hidden states at the labels row by row, and their number (int64, 0-d)."""
        targets = Targets.of(labels)
        self.softcap = softcap
        return hidden.flatten(0, 1).index_select(0, targets.index), targets.count()

    def logits(self, rows: Tensor, count: int) -> Tensor:
        """Return the first `count` logits of hidden states as `outputs` returned them, (n, count) fp32."""
        logits = self.original(rows)[:, :count].float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def use_student_head(model: nn.Module) -> StudentHead:
    """Let `model(..., labels=labels)` compare with a teacher; see `StudentHead.outputs`. Call it after adapters were added."""
    name = head_name(model)
    head = StudentHead(getattr(model, name))
    setattr(model, name, head)
    return head


def use_hidden_head(model: nn.Module) -> HiddenHead:
    """Let `model(..., labels=labels)` return hidden states; see `HiddenHead.outputs`."""
    name = head_name(model)
    head = HiddenHead(getattr(model, name))
    setattr(model, name, head)
    return head


def with_teacher(kind: Any, labels: Tensor | Targets, **teacher: Any) -> Any:
    """Return labels as `TopKTargets` or `TeacherTargets`."""
    targets = Targets.of(labels)
    return kind(targets.labels, targets.index, targets.gpu_memory, **teacher)
