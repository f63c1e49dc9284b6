"""The settings of finetune_classifier.py. Nothing heavy is imported here."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from litmini.config.finetune import DataConfig
from litmini.config.optional_adapters import OptionalAdaptersConfig
from litmini.errors import UserError, check

ProblemType = Literal["auto", "single_label_classification", "multi_label_classification", "regression"]


@dataclass
class LabelledDataConfig(DataConfig):
    """Data: which files, and how they become sequences of tokens."""

    keys: ClassVar[tuple[str, ...]] = ("text", "messages", "label")
    path: list[str] | str
    """Training file: .jsonl, .json, .csv or .parquet with text (or messages) and label; or hub:ORG/NAME[/FOLDER][@REVISION]
    [:SPLIT], a data set of the hub; or a list of these. A label is the name or number of a class, a list of these, or a number
    with a decimal point. The classes are the labels that occur."""
    val_path: str | None = None
    """Validation file, in any of the same forms. It has no other labels than the training file."""


@dataclass
class ClassesConfig:
    """Classes: what labels mean, and how much each class counts in the loss."""

    problem_type: ProblemType = "auto"
    """What is learned, in the words of transformers' config.json. auto: a list of labels is multi_label_classification, a
    number with a decimal point regression, all else single_label_classification."""
    weights: str | dict[str, float] | None = None
    """balanced: each class counts as much as any other, however many examples it has; or class -> weight, of classes that are
    left out 1, such as '{spam: 2}'. With several labels, the weight of examples that have the label. None: all count 1."""

    def __post_init__(self) -> None:
        if isinstance(self.weights, str) and self.weights != "balanced":
            raise UserError(f"classes.weights is {self.weights!r}, expected balanced or class: weight in braces.")
        given = self.weights.values() if isinstance(self.weights, dict) else ()
        check("classes.", self, weights=all(0 < weight < math.inf for weight in given))
        if self.weights is not None and self.problem_type == "regression":
            raise UserError("classes.weights weigh classes, and a regression has none: leave them out.")


@dataclass(kw_only=True)
class FinetuneClassifierConfig(OptionalAdaptersConfig):
    """Settings of finetune_classifier.py."""

    trains_tokens: ClassVar[bool] = True
    data: LabelledDataConfig
    classes: ClassesConfig = field(default_factory=ClassesConfig)

    @property
    def task(self) -> str:
        return "classifier"
