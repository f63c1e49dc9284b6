"""The settings that scripts of other objectives share. Nothing heavy is imported here."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from litmini.config.finetune import FinetuneConfig, LoraConfig, QuantizeConfig
from litmini.errors import UserError


@dataclass(kw_only=True)
class OptionalAdaptersConfig(FinetuneConfig):
    """Settings of the scripts that train adapters or, without them, all weights."""

    trains_tokens: ClassVar[bool] = False
    """The script adds and trains `data.new_tokens`."""
    adapter_dir: str | None = None
    """Adapter over checkpoint_dir to start from, such as the final/ of finetune_lora.py: it is merged in, and the result, in
    OUT_DIR/base, is the base of this run."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """Adapters, and beside them the score of classifiers and reward models; null: all weights are trained."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    @property
    @abstractmethod
    def task(self) -> str:
        """What is learned, in a few words."""

    @property
    def starts_from(self) -> str | None:
        return self.adapter_dir

    @property
    def method(self) -> str:
        adapters = "all weights" if self.lora is None else f"LoRA, rank {self.lora.rank}, alpha {self.lora.alpha:g}"
        return f"{self.task}, {adapters}" + ", 4-bit base" * (self.quantize.bits == 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.new_tokens and not self.trains_tokens:
            raise UserError(
                "data.new_tokens is for supervised finetuning; extend the checkpoint first: scripts/extend_vocabulary.py."
            )
        if self.lora is None and self.quantize.bits == 4:
            raise UserError(
                "quantize.bits 4 needs adapters, since weights in 4 bits are not trained: leave out lora null."
            )
