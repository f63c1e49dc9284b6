"""The settings of pretrain.py. Nothing heavy is imported here."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from litmini.config.training import RunConfig
from litmini.errors import check


@dataclass
class CorpusConfig:
    """Data: token shards that prepare_data.py wrote."""

    path: list[str] | str
    """Directory of a corpus, or URL of one in object storage, or a list of several."""
    weights: list[float] | None = None
    """The proportion of sequences from each of several corpora; none: every sequence of all of them once in an epoch."""
    max_seq_len: int = 1024
    """Tokens in a sequence."""
    isolate_documents: bool = False
    """Tokens attend to their own document only, in sequences that hold several."""
    val_rows: int | None = 1024
    """Validation sequences in an evaluation, the same in every run; none: all."""

    def __post_init__(self) -> None:
        weights, paths = self.weights, self.paths
        check(
            "data.",
            self,
            path=bool(paths) and all(paths),
            weights=weights is None or (len(weights) == len(paths) and all(0 < w < math.inf for w in weights)),
            max_seq_len=self.max_seq_len > 0,
            val_rows=self.val_rows is None or self.val_rows > 0,
        )

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """Settings of pretrain.py."""

    model: str
    """FAMILY/PRESET, such as llama/tiny; MY_FILE.py:PRESET; or a checkpoint directory, to continue its pretraining."""
    model_fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's Config that differ from the preset; on the command line --model.n_layers 6."""
    model_file: str | None = None
    """With a checkpoint directory: the model file of a family that is not in litmini/models/."""
    data: CorpusConfig
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator, which keeps logits small; 1e-4 is usual, 0 is off."""
    precision: Literal["32-true", "bf16-true", "bf16-mixed"] = "bf16-mixed"
    """bf16-mixed: fp32 master weights, bf16 compute. bf16-true: weights in bf16, which lose small updates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("", self, model=bool(self.model), z_loss=0 <= self.z_loss < math.inf)

    @property
    def base(self) -> str:
        return self.model

    @property
    def own_file(self) -> str | None:
        file = self.model.rpartition(":")[0]
        return file if file.endswith(".py") else self.model_file

    @property
    def method(self) -> str:
        return f"pretraining, {self.model}"
