"""The settings of finetune_classifier.py. Nothing heavy is imported here."""

from dataclasses import dataclass, field

from litmini.config.finetune import DataConfig, FinetuneConfig, LoraConfig, QuantizeConfig, describe_adapters
from litmini.errors import UserError


@dataclass
class LabelledDataConfig(DataConfig):
    """Data: which files, and how they become sequences of tokens."""

    path: list[str] | str
    """Training file: .jsonl, .json, .csv or .parquet with text and label; or hub:ORG/NAME[/FOLDER][@REVISION][:SPLIT], a
    data set of the hub; or a list of these. The classes are the labels that occur."""
    val_path: str | None = None
    """Validation file, in any of the same forms. It has no other labels than the training file."""


@dataclass(kw_only=True)
class FinetuneClassifierConfig(FinetuneConfig):
    """Settings of finetune_classifier.py."""

    data: LabelledDataConfig
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """Adapters beside the score; null: all weights are trained."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    @property
    def method(self) -> str:
        return f"classifier, {describe_adapters(self.lora, self.quantize)}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is None and self.quantize.bits == 4:
            raise UserError(
                "quantize.bits 4 needs adapters, since weights in 4 bits are not trained: leave out lora null."
            )
