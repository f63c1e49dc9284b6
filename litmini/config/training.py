"""The settings that all training scripts share. Nothing heavy is imported here."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from litmini.errors import UserError, check


@dataclass
class TrainConfig:
    """Training: its length, its batches, and when it reports and saves."""

    epochs: float = 1.0
    """Passes over the training sequences; ignored if max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps."""
    global_batch_size: int | None = None
    """Sequences in one optimizer step, over all devices. Default (null): as many as hold about 8 examples for each device,
    each sequence as short as that allows; in pretraining 16."""
    micro_batch_size: int = 4
    """Sequences in one forward pass on one device."""
    checkpoint_activations: bool = False
    """Keep only each block's input for the backward pass and recompute the rest: less memory, a third more time."""
    offload_activations: bool = False
    """Keep the activations of blocks in CPU memory until the backward pass, copied while others compute. For GPUs."""
    log_every: int = 1
    """Steps between lines of metrics.csv."""
    eval_every: int | None = None
    """Steps between evaluations on validation data; none: only before and after training."""
    save_every: int | None = None
    """Steps between checkpoints; none: only at the end, or when the run is interrupted."""
    patience: int | None = None
    """Stop after this many evaluations without a lower validation loss; none: never stop early."""
    sample_every: int | None = None
    """Steps between completions of the first validation prompts (`eval.samples`), written to samples.jsonl; none: never."""
    keep_last: int = 2
    """Number of step-* checkpoints to keep."""
    keep_best: bool = False
    """Save at each evaluation that finds a lower validation loss, and keep that checkpoint as well."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If loss or gradients are NaN or infinite: stop the run, or skip the step. The batch is saved in both cases."""

    def __post_init__(self) -> None:
        numbers = {k: v for k, v in vars(self).items() if v is not None and not isinstance(v, (bool, str))}
        check("train.", self, **{name: 0 < value < math.inf for name, value in numbers.items()})


@dataclass
class OptimConfig:
    """Optimizer and learning rate schedule. The learning rate is a pure function of the step."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "muon", "sgd"] = "adamw"
    """adamw8bit keeps its moments in 8 bits (bitsandbytes); the paged version moves them to the CPU when a GPU is full.
    muon: Muon for the matrices of blocks, AdamW for all other parameters."""
    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Schedule after the warm-up. wsd: constant, then a linear decay."""
    decay_fraction: float = 0.2
    """With wsd, the fraction of all steps, at the end, in which the learning rate decays."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the learning rate of the first step is above zero."""
    weight_decay: float = 0.0
    """Weight decay of matrices, embeddings included; vectors (norms, biases) have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this value; none: do not clip."""
    stochastic_rounding: bool = False
    """Update bf16 weights (--precision bf16-true) in fp32 with stochastic rounding, so that small updates are not lost."""
    in_backward: bool = False
    """Update each parameter in the backward pass and drop its gradient: gradients need no memory. Needs one
    micro-batch in a step, one device, max_grad_norm null, and another precision than 16-mixed."""
    offload: bool = False
    """Keep the optimizer state in CPU memory. For GPUs; slower."""

    def __post_init__(self) -> None:
        check(
            "optim.",
            self,
            lr=0 <= self.lr < math.inf,
            min_lr=0 <= self.min_lr < math.inf,
            decay_fraction=0 < self.decay_fraction <= 1,
            warmup_steps=self.warmup_steps >= 0,
            weight_decay=0 <= self.weight_decay < math.inf,
            betas=all(0 <= beta < 1 for beta in self.betas),
            max_grad_norm=self.max_grad_norm is None or self.max_grad_norm > 0,
        )


@dataclass
class EvalConfig:
    """Evaluation by generated completions, before and after training."""

    exact_match: bool = False
    """Complete each validation conversation greedily and count the completions equal to its last turn."""
    max_new_tokens: int = 64
    """Longest completion in tokens."""
    samples: int = 2
    """Number of completions to print."""

    def __post_init__(self) -> None:
        check("eval.", self, max_new_tokens=self.max_new_tokens > 0, samples=self.samples >= 0)


@dataclass(kw_only=True)
class RunConfig(ABC):
    """The settings of every training script."""

    out_dir: str
    """Directory of the run. A directory that already holds a run is never overwritten."""
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"] = "bf16-true"
    """bf16-true: frozen weights in bf16, adapters in fp32. bf16-mixed: fp32 master weights, bf16 compute.
    16-mixed: fp16 compute and loss scaling, for GPUs without bf16."""
    devices: int = 1
    """Processes on each node, one per GPU."""
    num_nodes: int = 1
    """Number of nodes (machines)."""
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several processes train one model. ddp: each holds the whole model; fsdp: each holds a shard of it; hsdp: the
    model is sharded over the processes of a node, and every node has a replica."""
    compile: bool | Literal["auto"] | None = None
    """torch.compile for each block: it takes a minute or more at first. auto: if the run is long enough to save time.
    Default (null): auto on a GPU, false on a CPU, where it needs a C++ compiler."""
    attention: Literal["auto", "varlen", "flex", "sdpa"] = "auto"
    """Attention kernel on a GPU. auto: varlen where it can compute the attention (FlashAttention, of version 3 on
    Hopper and 4 on Blackwell if that is installed; asked for, 2), flex (FlexAttention) for softcap, ALiBi and sinks,
    else sdpa. On a CPU: document by document."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of matmuls of fp32 tensors. high: TF32 on a GPU; medium: bf16."""
    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Loggers beside metrics.csv; wandb sends the metrics to its service unless WANDB_MODE=offline is set."""
    seed: int = 1337
    """Seed of the data order, initial weights and dropout."""
    resume: bool | str = False
    """auto: resume from the last checkpoint in out_dir, if it has one; or the directory of a checkpoint."""
    resume_changed: bool = False
    """Resume with another number of epochs or steps, another learning rate, other settings of the optimizer, or adapter
    dropout; also a run that is finished. The result is not that of a run which had them from the start."""
    dry_run: bool = False
    """Check everything and print the statistics of the data; train nothing and write nothing but the token cache."""
    show_masks: int = 0
    """Print this many training examples, with the supervised tokens coloured, and stop."""

    def __post_init__(self) -> None:
        check(
            "",
            self,
            out_dir=bool(self.out_dir),
            devices=self.devices > 0,
            num_nodes=self.num_nodes > 0,
            seed=0 <= self.seed < 2**32,
            show_masks=self.show_masks >= 0,
        )
        clash = {
            "train.global_batch_size above micro_batch_size": (self.train.global_batch_size or 1)
            > self.train.micro_batch_size,
            "optim.max_grad_norm (null is none)": self.optim.max_grad_norm is not None,
            "several devices": self.devices * self.num_nodes > 1,
            "train.on_nonfinite skip": self.train.on_nonfinite == "skip",
            "precision 16-mixed, whose loss is scaled": self.precision == "16-mixed",
        }
        if self.optim.in_backward and any(clash.values()):
            raise UserError(
                f"optim.in_backward does not go with {', '.join(k for k, is_set in clash.items() if is_set)}."
            )

    @property
    def own_file(self) -> str | None:
        """The user's model file, which whoever uses the result needs, too; None: the family is in litmini/models/."""
        return None

    @property
    def method(self) -> str:
        """What is trained, in a few words."""
        return "all weights"

    @property
    @abstractmethod
    def base(self) -> str:
        """The checkpoint that the run begins with, or another source of its model."""
