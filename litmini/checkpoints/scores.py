"""Classifiers and reward models on disk: checkpoints and adapters that give scores in place of logits."""

from pathlib import Path
from typing import Any

from torch import nn

from litmini.checkpoints.adapter import Adapter
from litmini.errors import UserError
from litmini.files import read_json
from litmini.methods.heads import ScoreHead, use_scores


def score_count(raw: dict[str, Any]) -> int:
    """Return the scores of a `...ForSequenceClassification` with this config.json; 0 of a language model."""
    names = raw.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    if not str(first).endswith("ForSequenceClassification"):
        return 0
    labels = raw.get("id2label")
    return len(labels) if isinstance(labels, dict) else int(raw.get("num_labels") or 2)  # as transformers has it


def give_scores(model: nn.Module, raw: dict[str, Any]) -> None:
    """Put the head of a `...ForSequenceClassification` onto a model."""
    use_scores(model, score_count(raw))


def give_scores_of_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Put a head for the scores of `adapter` onto its base, if it is one of a classifier or a reward model.

    Raises:
        UserError: its scores are missing.
    """
    if adapter.config.get("task_type") != "SEQ_CLS":
        return
    if "score" not in adapter.full:
        raise UserError(f"{adapter.directory} is an adapter of a classifier (SEQ_CLS), but has no score.weight.")
    use_scores(model, len(adapter.full["score"]["weight"]))


def refuse_scores(checkpoint_dir: str | Path, adapter_dir: str | Path | None) -> None:
    """Raise UserError if a checkpoint or its adapter gives scores, and so neither generates nor learns text."""
    for directory, name in ((checkpoint_dir, "config.json"), (adapter_dir, "adapter_config.json")):
        file = Path(directory or "") / name
        raw = read_json(file) if directory is not None and file.is_file() else {}
        if score_count(raw) or raw.get("task_type") == "SEQ_CLS":
            raise UserError(
                f"{directory} is a classifier or a reward model: it gives scores, so it neither generates nor learns text. "
                f"scripts/evaluate.py --classify FILE measures a classifier, --reward FILE ranks pairs with a reward model."
            )


def gives_scores(model: nn.Module) -> bool:
    """Return whether a model gives scores, not logits of tokens."""
    return any(isinstance(child, ScoreHead) for child in model.children())


def count_scores(model: Any) -> int:
    """Return the number of scores of a model that gives them."""
    return len(next(model.score.parameters()))  # trained beside adapters or not
