"""Classification: texts with a label, and scores for the classes at the last token of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.checkpoints.classifier import check_scored, classifier_config
from litmini.checkpoints.config import changed_config
from litmini.checkpoints.hf import save_trained
from litmini.checkpoints.peft import save_adapter
from litmini.config.classify import FinetuneClassifierConfig, LabelledDataConfig
from litmini.config.finetune import LoraConfig
from litmini.data.labelled import LabelledExamples, LabelledSequences, listed, load_labelled, model_inputs
from litmini.data.labels import MULTI, REGRESSION, SINGLE
from litmini.errors import UserError
from litmini.files import read_json, write_json
from litmini.ops.cross_entropy import IGNORE, Targets
from litmini.tasks.plan import open_base, plan
from litmini.tasks.setup import Data, warn
from litmini.tokenizer import Tokenizer
from litmini.training.objective import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from litmini.config.preference import FinetuneRewardConfig


class Classification:
    """The loss of transformers' `...ForSequenceClassification`, summed over documents. The model has a `ScoreHead`.

    Of one label it is the cross entropy of the class; of several, the mean over labels of each one's binary cross entropy; of
    a regression, the squared error. With weights, the sum is still divided by the number of documents, not by their weights:
    so an example counts as much whatever others share its step. Its metric is the accuracy, of several labels the share of
    texts with all labels right, and of a regression the mean absolute error.
    """

    unit = "texts"

    def __init__(self, problem_type: str = SINGLE, weights: Tensor | None = None) -> None:
        """
        Args:
            weights: of each class, (classes,) fp32; of several labels, of examples that have them.
        """
        self.problem_type, self.weights = problem_type, weights
        self.names = ("mae",) if problem_type == REGRESSION else ("accuracy",)
        self.shown = {} if problem_type == REGRESSION else {"accuracy": ".0%"}
        self._sums: Tensor | None = None

    def count(self, batch: Batch) -> int:
        """Return the number of documents."""
        return int((batch["labels"] != IGNORE).sum())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the summed loss."""
        scores, _ = model(**model_inputs(batch))  # (n, classes)
        if self.weights is not None:
            self.weights = self.weights.to(scores.device)
        if self.problem_type == SINGLE:
            labels = Targets.of(batch["labels"])  # on a GPU, they are Targets already
            classes = labels.labels.flatten().index_select(0, labels.index)
            self._add(scores.argmax(1) == classes)
            return F.cross_entropy(scores, classes, self.weights, reduction="sum")
        if self.problem_type == REGRESSION:
            self._add((scores[:, 0] - batch["targets"]).abs())
            return F.mse_loss(scores[:, 0], batch["targets"], reduction="sum")
        self._add(((scores > 0) == (batch["targets"] > 0)).all(1))
        losses = F.binary_cross_entropy_with_logits(scores, batch["targets"], reduction="none", pos_weight=self.weights)
        return losses.mean(1).sum()

    def _add(self, each: Tensor) -> None:
        """Add a value of each document to the metric, (n,)."""
        values = each.detach().float()
        found = torch.stack([values.sum(), values.new_full((), len(values))])
        self._sums = found if self._sums is None else self._sums + found

    def take_sums(self) -> Tensor:
        """Return the sums of the metric since the last call, and begin again."""
        sums, self._sums = self._sums, None
        return torch.zeros(2) if sums is None else sums

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Return the mean over documents."""
        total, n = sums
        return {name: total / max(1.0, n) for name in self.names}


@dataclass(frozen=True)
class ClassificationData(Data):
    """The sequences of a run. Both have their texts, labels and names of classes (`examples`)."""

    train: LabelledSequences
    val: LabelledSequences | None

    @property
    def names(self) -> list[str]:
        """In the order of the scores."""
        return self.train.examples.names

    @property
    def problem_type(self) -> str:
        return self.train.examples.problem_type


def prepare_data(fabric: Fabric, config: FinetuneClassifierConfig) -> ClassificationData:
    """Download the checkpoint if it is missing, tokenise the data, and plan the run.

    Raises:
        UserError: the sequences are longer than the model's context, or the data cannot be read.
    """
    tokenizer, base = open_base(fabric, config, None)
    check_scored(Path(config.base))
    train, val = load_labelled(config.data, tokenizer, config.seed, config.classes.problem_type)
    plain = {f.name: f.default for f in dataclasses.fields(LabelledDataConfig)}
    unused = ["train_on", "max_dropped"]
    if all(text.messages is None for text in train.records()):
        unused = ["chat_template", "template_kwargs", "special_tokens_in_text", *unused]
    warn(fabric, {f"data.{name}": getattr(config.data, name) != plain[name] for name in unused})
    fabric.print(f"labels: {train.problem_type}")
    if train.problem_type == REGRESSION and (train.targets.std() > 10 or abs(train.targets.mean()) > 10):
        fabric.print(
            "warning: the scores begin near 0, far from these values: divide them, so that they are around -3 to 3."
        )
    data = plan(fabric, config, tokenizer, base, train, val, [], LabelledSequences)
    return ClassificationData(**vars(data))


def label_weights(examples: LabelledExamples, weights: str | dict[str, float] | None) -> Tensor | None:
    """Return the weight of each class, (classes,) fp32; of several labels, of examples that have them. None: all are 1.

    Balanced are n / (classes x examples of the class), whose mean over examples is 1; of several labels, the examples without
    a label divided by those with it.

    Raises:
        UserError: a class that does not exist, or a regression.
    """
    if weights is None:
        return None
    if examples.problem_type == REGRESSION:
        raise UserError("classes.weights weigh classes, and these labels are numbers (a regression): leave them out.")
    counts, n = examples.counts(), len(examples)
    if isinstance(weights, str):
        several = examples.problem_type == MULTI
        return torch.from_numpy(
            np.maximum(n - counts, 1) / np.maximum(counts, 1) if several else n / (len(counts) * counts)
        ).float()
    if unknown := sorted(weights.keys() - set(examples.names)):
        raise UserError(
            f"classes.weights: there is no class {listed(unknown)}; the classes are {listed(examples.names)}."
        )
    return torch.tensor([weights.get(name, 1.0) for name in examples.names])


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
    model: nn.Module,
    directory: Path | None,
    config: FinetuneClassifierConfig | FinetuneRewardConfig,
    data: Named,
    problem_type: str | None = None,
) -> None:
    """Write the result into `directory`: a Hugging Face `...ForSequenceClassification`, or an adapter in PEFT's format.

    Beside an adapter stands the `config.json` of its base as a classifier, with the names of the classes:
    `AutoModelForSequenceClassification.from_pretrained(base, config=AutoConfig.from_pretrained(directory))` is the model that
    PEFT puts the adapter over. Every rank calls this, to gather a sharded model; ranks other than 0 pass None.

    Args:
        problem_type: None: a regression of one score, one label of several scores.
    """
    changes = classifier_config(config.base, data.names, data.tokenizer, problem_type)
    if config.lora is None:
        return save_trained(model, directory, config.base, **changes)
    save_adapter(model, directory, config.base, quantize=config.quantize)
    if directory is not None:
        base = read_json(Path(config.base) / "config.json")
        write_json(directory / "config.json", changed_config(base, **changes))
