"""The settings that scripts share, and the error for what a user can mend. Nothing heavy is imported here."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from litmini.errors import UserError, check


@dataclass
class TrainConfig:
    """Training: how long, in what batches, and what is reported and saved when."""

    epochs: float = 1.0
    """Passes over the training rows; ignored where max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps."""
    global_batch_size: int = 16
    """Rows in one optimizer step, over all devices."""
    micro_batch_size: int = 4
    """Rows in one forward pass on one device."""
    checkpoint_activations: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more time."""
    offload_activations: bool = False
    """Keep what blocks need for the backward pass in CPU memory. For GPUs; slower."""
    log_every: int = 1
    """Steps between lines of metrics.csv."""
    eval_every: int | None = None
    """Steps between evaluations on validation data; none: only before and after."""
    save_every: int | None = None
    """Steps between checkpoints; none: only at the end, or when interrupted."""
    patience: int | None = None
    """Stop after this many evaluations without a lower validation loss; none: never."""
    sample_every: int | None = None
    """Steps between completions of the first validation prompts (`eval.samples`), kept in samples.jsonl; none: no answers."""
    keep_last: int = 2
    """How many step-* checkpoints to keep."""
    keep_best: bool = False
    """Save at each evaluation that finds a lower validation loss, and keep that checkpoint, too."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When loss or gradients are NaN or infinite: stop the run, or leave out this step. The batch is saved either way."""

    def __post_init__(self) -> None:
        numbers = {k: v for k, v in vars(self).items() if v is not None and not isinstance(v, (bool, str))}
        check("train.", self, **{name: 0 < value < math.inf for name, value in numbers.items()})


@dataclass
class OptimConfig:
    """Optimizer: AdamW, with its learning rate a pure function of the step."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "muon", "sgd"] = "adamw"
    """adamw8bit keeps its moments in 8 bits (bitsandbytes); paged, they move to the CPU when a GPU is full. muon: for the
    blocks' matrices, and AdamW for all the rest."""
    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """What follows the warm-up. wsd: constant, then a linear fall."""
    decay_fraction: float = 0.2
    """With wsd, the last share of all steps, in which the learning rate falls."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the first one is above zero already."""
    weight_decay: float = 0.0
    """Decay of matrices, embeddings included; vectors (norms, biases) have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; none: do not."""
    stochastic_rounding: bool = False
    """Weights in bf16 (--precision bf16-true) take AdamW's step in fp32 and are rounded by chance: small updates count."""
    in_backward: bool = False
    """Take each parameter's step in the backward pass and drop its gradient: no memory for gradients. Needs one
    micro-batch in a step, one device, and max_grad_norm null."""
    offload: bool = False
    """Keep the optimizer's averages in CPU memory. For GPUs; slower."""

    def __post_init__(self) -> None:
        check(
            "optim.",
            self,
            lr=0 <= self.lr < math.inf,
            min_lr=self.min_lr >= 0,
            decay_fraction=0 < self.decay_fraction <= 1,
            warmup_steps=self.warmup_steps >= 0,
            weight_decay=self.weight_decay >= 0,
            betas=all(0 <= beta < 1 for beta in self.betas),
            max_grad_norm=self.max_grad_norm is None or self.max_grad_norm > 0,
        )


@dataclass
class EvalConfig:
    """Evaluation by generated answers, before and after training."""

    exact_match: bool = False
    """Answer each validation conversation greedily and count those equal to its last turn."""
    max_new_tokens: int = 64
    """Longest answer."""
    samples: int = 2
    """How many answers to print."""

    def __post_init__(self) -> None:
        check("eval.", self, max_new_tokens=self.max_new_tokens > 0, samples=self.samples >= 0)


@dataclass(kw_only=True)
class RunConfig(ABC):
    """What every training script takes."""

    out_dir: str
    """Where the run is written. One that holds a run already is never overwritten."""
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"] = "bf16-true"
    """bf16-true: frozen weights in bf16, adapters in fp32. bf16-mixed: weights in fp32, products in bf16.
    16-mixed: products in fp16 and the loss scaled, for GPUs without bf16."""
    devices: int = 1
    """Processes on each node, one for each GPU."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several processes share the work. ddp: each holds the whole model; fsdp: each holds its share of it; hsdp: the
    processes of a node share a model, and every node has a copy."""
    compile: bool | Literal["auto"] = False
    """torch.compile for each block: it takes a minute or more at first. auto: where the run is so long that it pays.
    Needs a C++ compiler on a CPU."""
    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Where metrics go beside metrics.csv; wandb sends them to its service, unless WANDB_MODE=offline is set."""
    seed: int = 1337
    """Of the data order, initial weights and dropout."""
    resume: bool | str = False
    """auto: go on from the last checkpoint in out_dir, if any; or the directory of one."""
    dry_run: bool = False
    """Check everything, print the statistics of the data, train nothing, write nothing but the token cache."""
    show_masks: int = 0
    """Print this many training examples, coloured by what is trained, and stop."""

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
            "train.global_batch_size above micro_batch_size": self.train.global_batch_size
            > self.train.micro_batch_size,
            "optim.max_grad_norm (null is none)": self.optim.max_grad_norm is not None,
            "several devices": self.devices * self.num_nodes > 1,
            "train.on_nonfinite skip": self.train.on_nonfinite == "skip",
        }
        if self.optim.in_backward and any(clash.values()):
            raise UserError(
                f"optim.in_backward does not go with {', '.join(k for k, found in clash.items() if found)}."
            )

    @property
    @abstractmethod
    def base(self) -> str:
        """The checkpoint that the run begins with, or where else its model comes from."""
