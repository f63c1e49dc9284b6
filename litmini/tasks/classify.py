"""Classification: texts with a label, and scores for the classes at the last token of each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from litmini.checkpoints.config import changed_config, is_multimodal, read_config
from litmini.checkpoints.hf import save_trained
from litmini.checkpoints.peft import save_adapter
from litmini.config.classify import FinetuneClassifierConfig, LabelledDataConfig
from litmini.config.finetune import LoraConfig
from litmini.data.labelled import load_labelled
from litmini.files import read_json, write_json
from litmini.ops.cross_entropy import IGNORE, Targets
from litmini.tasks.setup import Data, TrainingSetup, warn
from litmini.tasks.sft import open_base, plan
from litmini.tokenizer import Tokenizer
from litmini.training.loop import evaluate
from litmini.training.objective import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from litmini.config.preference import FinetuneRewardConfig


class Classification:
    """Cross entropy of the class, summed over documents. The model has a `ScoreHead` with a score for each class."""

    def count(self, batch: Batch) -> int:
        """Return the number of documents."""
        return int((batch["labels"] != IGNORE).sum())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the summed cross entropy."""
        scores, classes = scores_and_classes(model, batch)
        return F.cross_entropy(scores, classes, reduction="sum")


class Accuracy(Classification):
    """The share of documents whose class has the highest score, for `evaluate`."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the number of such documents."""
        scores, classes = scores_and_classes(model, batch)
        return (scores.argmax(-1) == classes).sum()


def scores_and_classes(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the scores of the documents of a batch, (n, n_classes) fp32, and the numbers of their classes, (n,) int64."""
    scores, _ = model(**batch)
    targets = Targets.of(batch["labels"])  # on a GPU, they are Targets already
    return scores, targets.labels.flatten().index_select(0, targets.index)


@dataclass(frozen=True)
class ClassificationData(Data):
    """The sequences of a run, and the names of their classes."""

    names: list[str] = field(default_factory=list)
    """In the order of the scores."""


def prepare_data(fabric: Fabric, config: FinetuneClassifierConfig) -> ClassificationData:
    """Download the checkpoint if it is missing, tokenise the data, and plan the run.

    Raises:
        UserError: the sequences are longer than the model's context, or the data cannot be read.
    """
    tokenizer, base = open_base(fabric, config, None)
    if is_multimodal(read_json(Path(config.checkpoint_dir) / "config.json")):
        from litmini.checkpoints.text_part import check_scored

        check_scored(Path(config.checkpoint_dir))
    train, val = load_labelled(config.data, tokenizer, config.seed)
    plain = {f.name: f.default for f in dataclasses.fields(LabelledDataConfig)}
    unused = ("chat_template", "template_kwargs", "special_tokens_in_text", "train_on", "max_dropped")
    warn(fabric, {f"data.{name}": getattr(config.data, name) != plain[name] for name in unused})
    data = plan(fabric, config, tokenizer, base, train, val, [])
    return ClassificationData(**vars(data), names=train.names)


def with_score(config: LoraConfig) -> LoraConfig:
    """Return settings of adapters beside which the score is trained, and saved with them."""
    return dataclasses.replace(config, modules_to_save=[*config.modules_to_save, "score"])


class Named(Protocol):
    """Data whose scores have names: those of classes, or one."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


def save_classifier(
    model: nn.Module, directory: Path | None, config: FinetuneClassifierConfig | FinetuneRewardConfig, data: Named
) -> None:
    """Write the result into `directory`: a Hugging Face `...ForSequenceClassification`, or an adapter in PEFT's format.

    Beside an adapter stands the `config.json` of its base as a classifier, with the names of the classes:
    `AutoModelForSequenceClassification.from_pretrained(base, config=AutoConfig.from_pretrained(directory))` is the model that
    PEFT puts the adapter over. Every rank calls this, to gather a sharded model; ranks other than 0 pass None.
    """
    changes = classifier_config(config.checkpoint_dir, data.names, data.tokenizer)
    if config.lora is None:
        return save_trained(model, directory, config.checkpoint_dir, **changes)
    save_adapter(model, directory, config.checkpoint_dir, quantize=config.quantize)
    if directory is not None:
        base = read_json(Path(config.checkpoint_dir) / "config.json")
        write_json(directory / "config.json", changed_config(base, **changes))


def classifier_config(checkpoint_dir: str, names: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
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
        "problem_type": "single_label_classification" if len(names) > 1 else "regression",
        "pad_token_id": tokenizer.stop_ids[0] if pad is None else pad,
    }


def measure_accuracy(setup: TrainingSetup, when: str) -> None:
    """Measure the accuracy on the validation data, and write it to the manifest under a name ending in `when`.

    Do nothing before the training of a run that is resumed.
    """
    fabric, data = setup.fabric, setup.data
    batches = data.validation_batches(fabric.global_rank, fabric.world_size)
    if batches is not None and not (when == "before" and setup.progress.step):
        accuracy = evaluate(fabric, setup.model, Accuracy(), batches, setup.attention)
        setup.recorder.write_manifest(**{f"accuracy_{when}": accuracy})
