"""Heads for objectives other than language modelling. Each takes the place of a model's output head, whatever the family.

With labels, `Model.forward` returns what its head makes of the last hidden states: (outputs, number of labelled positions).
The heads here return other outputs than the summed loss, and never hold whole logits either. A mixture-of-experts model adds
its load-balancing loss to the summed loss only, so not with these heads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litmini.errors import UserError
from litmini.ops.cross_entropy import CHUNK, UNFUSED, OutputHead, Targets, rows_at_once
from litmini.ops.log_probs import frozen_log_probs


class LogProbHead(OutputHead):
    """Log-probabilities of the labels, per token.

    Logits are computed some rows at a time. If the head is trained or adapted, or has a bias, they are computed again in the
    backward pass. Gradients are right for any upstream gradient.
    """

    def __init__(self, head: nn.Module, chunk: int | None = None, temperature: float = 1.0) -> None:
        """
        Args:
            head: gives logits (..., vocab): a linear, an adapted one, or one that is trained beside adapters.
            chunk: rows of logits in memory at once; None: as `rows_at_once` says.
            temperature: logits are divided by it.
        """
        super().__init__(head)
        self.chunk, self.temperature = chunk, temperature
        # Decided here, so that it is the same while an adapted head is replaced by its base
        self._is_frozen = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits, as without labels."""
        return self.original(hidden)  # type: ignore[no-any-return]

    def outputs(self, hidden: Tensor, labels: Tensor | Targets, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Return (B, T) fp32 log-probabilities, 0 where there is no label, and the number of labels (int64, 0-d)."""
        targets = Targets.of(labels)
        rows = hidden.flatten(0, 1).index_select(0, targets.index)  # (n, dim)
        wanted = targets.labels.flatten().index_select(0, targets.index)  # (n,)
        chunk = self.chunk or rows_at_once(self.original, targets, rows.shape[-1], UNFUSED, CHUNK)
        if self._is_frozen:
            found = frozen_log_probs(rows, self.original.weight, wanted, softcap, chunk, self.temperature)
        else:
            parts = zip(rows.split(chunk), wanted.split(chunk), strict=True)
            found = torch.cat(
                [checkpoint(self._log_probs, part, want, softcap, use_reentrant=False) for part, want in parts]
            )
        T, zeros = hidden.shape[1], torch.zeros(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
        log_probs = zeros.index_put((targets.index // T, targets.index % T), found)  # no view: FSDP warns of one
        return log_probs, targets.count()

    def _log_probs(self, rows: Tensor, wanted: Tensor, softcap: float | None) -> Tensor:
        logits = self.original(rows).float()  # (c, vocab)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1)  # (c,)


class ScoreHead(OutputHead):
    """n outputs at each labelled position, from the model's module `score`, as Hugging Face's checkpoints call it.

    The caller chooses which positions are labelled; the value of a label is not used. Without labels, a family that caps its
    logits (Gemma 2) caps these outputs as well: give labels to get those of Hugging Face. `score` is looked up at each call,
    so it may be swapped, for one that is trained beside adapters, say.
    """

    task_type = "SEQ_CLS"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list: it is no module of this one's

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the outputs of every position, (B, T, n_outputs) in fp32; under autocast, too."""
        score: Any = self._model[0].score
        with torch.autocast(hidden.device.type, enabled=False):
            return score(hidden.to(next(score.parameters()).dtype)).float()  # type: ignore[no-any-return]

    def outputs(self, hidden: Tensor, labels: Tensor | Targets, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Return (n, n_outputs) fp32, the labelled positions row by row, and their number (int64, 0-d)."""
        targets = Targets.of(labels)
        return self(hidden.flatten(0, 1).index_select(0, targets.index)), targets.count()


def head_name(model: nn.Module) -> str:
    """Return the name of a model's output head: the one linear, adapted or not, that hangs on the model itself.

    Raises:
        UserError: there is none, or more than one.
    """
    names = possible_heads(model)
    if len(names) != 1:
        raise UserError(
            f"expected one output head on the model itself, found {len(names)}: {', '.join(names) or 'none'}."
        )
    return names[0]


def possible_heads(model: nn.Module) -> list[str]:
    """Return the names of what may be a model's output head: one, except in a user's own model file."""
    children = dict(model.named_children())
    names = [name for name, module in children.items() if isinstance(module, OutputHead)]
    bases: dict[str, Any] = {name: getattr(module, "base", module) for name, module in children.items()}
    return names or [name for name, module in bases.items() if isinstance(module, nn.Linear)]


def use_log_probs(model: nn.Module, chunk: int | None = None, temperature: float = 1.0) -> LogProbHead:
    """Let `model(..., labels=labels)` return per-token log-probabilities; see `LogProbHead.outputs`.

    Call it after adapters were added, which are found by the names that modules have before.
    """
    name = head_name(model)
    head = LogProbHead(getattr(model, name), chunk, temperature)
    setattr(model, name, head)
    return head


def use_scores(model: nn.Module, n_outputs: int, generator: torch.Generator | None = None) -> nn.Linear:
    """Replace the language model head by one with `n_outputs` outputs at labelled positions, and return its linear.

    Its weight, `score.weight` in files, is in fp32 and starts normal with std 0.02. The old head is dropped; an embedding that
    it was tied to stays. With adapters, which freeze all else, call this before they are added and name score in
    `lora.modules_to_save`: it is trained if it is added after them, too, but not saved with them. A model that gives as many
    scores already keeps them.
    """
    config: Any = model.config
    if isinstance(model.get_submodule(head_name(model)), ScoreHead) and len(model.score.weight) == n_outputs:  # type: ignore
        return model.score  # type: ignore[return-value]
    device = next(model.parameters()).device
    score = nn.Linear(config.dim, n_outputs, bias=False, device=device, dtype=torch.float32)
    if device.type != "meta":
        nn.init.normal_(score.weight, std=0.02, generator=generator)
    setattr(model, head_name(model), ScoreHead(model))
    model.score = score
    return score
