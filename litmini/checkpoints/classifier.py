"""What `config.json` says of a classifier: names of classes, problem type; and the tensors of a merged one."""

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from litmini.checkpoints.adapter import Adapter
from litmini.checkpoints.config import is_multimodal, read_config
from litmini.checkpoints.scores import give_scores_of_adapter
from litmini.errors import UserError
from litmini.files import read_json
from litmini.methods.heads import head_name
from litmini.tokenizer import Tokenizer

SCORED = ("gemma3", "qwen3_5")
"""Multimodal checkpoints of which transformers has a `...ForSequenceClassification`."""
UNSCORED = ("gemma4_text", "glm4_moe_lite", "granitemoehybrid", "lfm2", "mamba2", "qwen3_5_moe_text")
"""Families of which it has none."""


def check_scored(directory: Path) -> None:
    """Check that transformers could load the classifier, or the reward model, that a checkpoint becomes.

    Raises:
        UserError: it could not.
    """
    raw = read_json(directory / "config.json")
    kind, what, expected = str(raw.get("model_type")), "model", "one of another family"
    refused = kind in UNSCORED
    if is_multimodal(raw):
        what, expected = "multimodal model", f"a text model, or one of: {', '.join(SCORED)}"
        refused = kind not in SCORED
    if refused:
        raise UserError(
            f"{directory} is a {what} of model_type '{kind}', of which transformers has no sequence classifier, so the result "
            f"could not be loaded; expected {expected}."
        )


def label_names(directory: str | Path, count: int) -> tuple[list[str], str | None]:
    """Return the names of `count` scores and the problem type, as config.json of a classifier, or beside an adapter, has them.

    Without it the names are those that transformers gives: LABEL_0 and so on.
    """
    file = Path(directory) / "config.json"
    raw = read_json(file) if file.is_file() else {}
    labels = raw.get("id2label")
    if not isinstance(labels, dict):
        return [f"LABEL_{number}" for number in range(count)], raw.get("problem_type")
    names = [labels.get(str(number)) for number in range(count)]
    if len(labels) != count or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: id2label has {len(labels)} names, expected one for each score, 0 to {count - 1}.")
    return names, raw.get("problem_type")  # type: ignore[return-value]


def put_scores_of_adapter(
    model: nn.Module, adapter: Adapter, base: Path, tokenizer: Tokenizer
) -> tuple[str, dict[str, Any]]:
    """Put the head of a classifier's adapter onto a model on the meta device; return the name of the old head, whose weights
    are left out, and what changes in the base's config.json."""
    old = head_name(model)
    give_scores_of_adapter(model, adapter)
    names, problem_type = label_names(adapter.directory, len(adapter.full["score"]["weight"]))
    return old, classifier_config(str(base), names, tokenizer, problem_type)


def with_scores(tensors: Iterable[tuple[str, Tensor]], adapter: Adapter, old: str) -> Iterable[tuple[str, Tensor]]:
    """Return the tensors of a base without those of its head `old`, and with the adapter's scores."""
    kept = ((name, tensor) for name, tensor in tensors if name.partition(".")[0] not in (old, "score"))
    return itertools.chain(kept, [("score.weight", adapter.full["score"]["weight"])])


def classifier_config(
    checkpoint_dir: str, names: Sequence[str], tokenizer: Tokenizer, problem_type: str | None = None
) -> dict[str, Any]:
    """Return the keys of `config.json` in which a sequence classifier differs from its base."""
    module, config = read_config(Path(checkpoint_dir))
    own = read_json(Path(checkpoint_dir) / "config.json")
    raw = {**module.config_to_hf(config), **(own.get("text_config") or {}), **own}
    family = re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", (raw.get("architectures") or [""])[0])
    if raw["model_type"].endswith("_text") and not family.endswith("Text"):
        family += "Text"  # transformers has Gemma3ForCausalLM, but Gemma3TextForSequenceClassification
    pad = raw.get("pad_token_id")
    if pad is None:  # transformers pools at the last token that is not padding
        pad = tokenizer.special_id("pad_token")
    return {
        "architectures": [f"{family}ForSequenceClassification"],
        "num_labels": len(names),
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": problem_type or ("single_label_classification" if len(names) > 1 else "regression"),
        "pad_token_id": tokenizer.stop_ids[0] if pad is None else pad,
    }
