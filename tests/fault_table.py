"""Faults of every kind at many moments of whole runs, and what each of them cost.

    python tests/fault_table.py --times 20

Each run is met by a fault, goes on with `--resume auto`, and is then compared, bit by bit, with one that was left alone:
weights, optimizer state, metrics and samples. The moments are counted in calls of Python functions, so they are spread
evenly over every phase of a run, and are the same in every run. Models are tiny; `test_fault_table.py` is the short form.
"""

import argparse
import csv
import inspect
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny import make_family, make_tiny, make_tokenizer
from two import Ended, command, run_two

from litmini.files import CHECKSUMS

SCRIPTS = (
    "finetune_full",
    "finetune_lora",
    "finetune_qlora",
    "finetune_dora",
    "finetune_ia3",
    "finetune_classifier",
    "finetune_preference",
    "finetune_reward",
    "finetune_grpo",
    "finetune_distill",
    "pretrain",
)
PHASES = ("start", "tokenising", "step", "evaluation", "save", "final export", "report")
STEPS, SAVE_EVERY = 6, 2
MOODY = ("tokens_per_second", "mfu", "memory_mib")
EXPECTED: dict[str, tuple[tuple[int, ...], str]] = {  # how a run ends, and what it says once where that is not 0
    "kill": ((-signal.SIGKILL,), ""),
    "SIGTERM": ((128 + signal.SIGTERM,), "Resume it with --resume auto"),
    "Ctrl-C": ((128 + signal.SIGINT,), "Resume it with --resume auto"),
    "full disk": ((0, 1), "error: the disk is full"),
    "new data": ((0,), ""),
}
POISON = "~"  # the base has a copy in which the embedding of this token is NaN


@dataclass(frozen=True)
class Moment:
    """When a fault comes: after so many calls of Python functions in a phase, in the process `rank`."""

    phase: str
    at: int
    what: str
    rank: int = 0


def watch(moment: Moment | None, act: Callable[[], object]) -> dict[str, int]:
    """Count calls by phase once the command line is read, and `act` at `moment`; returns the counts, which will grow."""
    from litmini import cli
    from litmini.data.dataset import load_data
    from litmini.data.labelled import load_labelled
    from litmini.data.preferences import load_preferences
    from litmini.data.prompts import load_prompts
    from litmini.runs.run import Run
    from litmini.tasks import measure, setup
    from litmini.tasks.distill_teacher import remember_teacher
    from litmini.training import loop

    entries = {
        load_data: "tokenising",
        load_labelled: "tokenising",
        load_preferences: "tokenising",
        load_prompts: "tokenising",
        remember_teacher: "tokenising",
        loop.fit: "step",
        loop.evaluate: "evaluation",
        Run.checkpoint: "save",
    }
    entries |= {measure.measure: "evaluation", setup.log_samples: "evaluation", Run.save_final: "final export"}
    entries[measure.finish] = "report"
    phases = {inspect.unwrap(entry).__code__: phase for entry, phase in entries.items()}
    counts = dict.fromkeys(PHASES, 0)
    local = threading.local()

    def profile(frame: Any, event: str, _: Any) -> None:
        if not hasattr(local, "phases"):
            is_saver = threading.current_thread().name.startswith("ThreadPoolExecutor")
            local.phases = ["save" if is_saver else "start"]
        if event == "call" and frame.f_code in phases:
            local.phases.append(phases[frame.f_code])
        elif event == "return" and frame.f_code in phases:
            local.phases.pop()
        phase = local.phases[-1]
        counts[phase] += 1
        if moment and phase == moment.phase and counts[phase] == moment.at:
            act()

    parse = cli.parse

    def parse_and_begin(*args: Any, **kwargs: Any) -> Any:
        config = parse(*args, **kwargs)
        threading.setprofile(profile)
        sys.setprofile(profile)
        return config

    cli.parse = parse_and_begin
    return counts


def play(
    script: str, words: list[str], cache: str, moment: Moment | None = None, late: float = 0, counted: bool = False
) -> dict[str, int]:
    """Run a command line in this process, with a fault; returns the calls of each phase.

    Args:
        late: seconds that the clock is put back.
        counted: count calls also where there is no fault.
    """
    from litmini.runs import report
    from litmini.training import flops

    os.environ["LITMINI_CACHE"] = cache
    now = time.time
    time.time = lambda: now() - late
    report.plot_metrics = lambda directory, _: (directory / "loss.png").touch()
    flops.peak_flops = lambda *_: (1e12, "assumed")  # charts and this take longer than the rest
    mine = moment and moment.rank == int(os.environ.get("RANK", 0))
    if mine and moment.what == "gradients":
        break_gradients(moment.at)
    data = words[len(words) - words[::-1].index("--data.path")]
    act = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "full disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)),
        "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "Ctrl-C": lambda: os.kill(os.getpid(), signal.SIGINT),
        "new data": lambda: Path(data).write_text(Path(data).read_text() + "{}\n"),
    }
    counts = dict[str, int]()
    if mine or counted:
        counts = watch(moment if mine else None, act.get(moment.what, print) if moment else print)
    try:
        command(script, *words)
    except SystemExit as end:
        sys.setprofile(None)
        if end.code:
            raise
    return counts


def break_gradients(step: int) -> None:
    """Let the gradients of the `step`-th optimizer step be NaN."""
    from litmini.training import loop

    take, steps = loop._take_step, iter(range(1, 10**6))

    def broken(setup: Any, *rest: Any) -> Any:
        fabric = setup.fabric
        backward = fabric.backward
        if next(steps) == step:
            fabric.backward = lambda loss: backward(loss * float("nan"))
        taken = take(setup, *rest)
        fabric.backward = backward
        return taken

    loop._take_step = broken


@dataclass
class Row:
    """A line of the table."""

    fault: str
    where: str = ""
    runs: int = 0
    again: int = 0
    """Steps that had to be done again, at most."""
    lost: list[str] = field(default_factory=list)
    """What was not as it should be."""

    def __str__(self) -> str:
        return f"| {self.fault} | {self.where} | {self.runs} | {self.again} | {'; '.join(self.lost) or 'nothing'} |"


class Place:
    """A directory with a tiny model, data and a corpus, and undisturbed runs to compare with."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base, self.data = directory / "base", directory / "data.jsonl"
        make_tiny(self.base, make_tokenizer(directory / "tokenizer"))
        for file, numbers in ((self.data, range(40)), (directory / "held_out.jsonl", range(90, 94))):
            texts = [(f"What is {i} plus {i % 7}?" + " Please." * (i % 3), f"It is {i + i % 7}.") for i in numbers]
            file.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in texts))
        self.whole: dict[str, tuple[Path, list[dict[str, int]]]] = {}
        self.count = 0

    def corpus(self) -> Path:
        """Token shards of the same text, made once."""
        corpus = self.directory / "corpus"
        if not corpus.exists():
            with (text := self.directory / "text.jsonl").open("w") as out:
                for line in self.data.open():
                    out.write(json.dumps({"text": " ".join(json.loads(line).values())}) + "\n")
            words = [text, "--tokenizer", self.base, "--out_dir", corpus, "--val_fraction", 0.1, "--workers", 1]
            (ended,) = run_two(command, "prepare_data", *words, devices=1)
            assert ended.status == 0, ended.err
        return corpus

    def labelled(self) -> Path:
        """The prompts, each with the kind of its sum."""
        file = self.directory / "labelled.jsonl"
        if not file.exists():
            kinds = ("even", "odd")
            texts = [(json.loads(line)["prompt"], kinds[i % 7 % 2]) for i, line in enumerate(self.data.open())]
            file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts))
        return file

    def preferred(self) -> Path:
        """The prompts with their completions, and with another one that is rejected."""
        file = self.directory / "preferred.jsonl"
        if not file.exists():
            rows = [json.loads(line) for line in self.data.open()]
            pairs = [
                {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"Not {i}."}
                for i, row in enumerate(rows)
            ]
            file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        return file

    def teacher(self) -> Path:
        """A model with the same tokenizer and other weights."""
        teacher = self.directory / "teacher"
        return teacher if teacher.exists() else make_family("qwen3", teacher, self.directory / "tokenizer")

    def poisoned(self) -> tuple[Path, Path, int]:
        """A base that gives NaN for one token, and data in which one line has that token: (base, data, line)."""
        base, data, line = self.directory / "poisoned", self.directory / "poisoned.jsonl", 8
        if not base.exists():
            from litmini.tokenizer import Tokenizer

            shutil.copytree(self.base, base)
            tensors = load_file(base / "model.safetensors")
            tensors["model.embed_tokens.weight"][Tokenizer(base).encode(POISON)[0]] = float("nan")
            save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
            texts = [f"{i} plus one?{POISON if i == line else ''}" for i in range(1, 13)]
            data.write_text("".join(json.dumps({"prompt": text, "completion": "yes"}) + "\n" for text in texts))
        return base, data, line

    def words(self, script: str, out_dir: Path, more: Iterable[object] = ()) -> list[str]:
        words: list[object] = ["--out_dir", out_dir, "--precision", "32-true", "--optim.lr", 1e-2]
        words += ["--train.global_batch_size", 4, "--train.micro_batch_size", 1, "--train.max_steps", STEPS]
        words += ["--train.save_every", SAVE_EVERY, "--train.eval_every", 2, "--train.sample_every", 3]
        words += ["--eval.samples", 1, "--eval.max_new_tokens", 2]
        if script == "pretrain":
            words += ["--model", "llama/tiny", "--data.path", self.corpus(), "--data.max_seq_len", 32]
        elif script == "finetune_classifier":
            words += ["--checkpoint_dir", self.base, "--data.path", self.labelled(), "--data.max_seq_len", 128]
            words += ["--data.val_fraction", 0.2]
        elif script in ("finetune_preference", "finetune_reward"):
            words += ["--checkpoint_dir", self.base, "--data.path", self.preferred(), "--data.max_seq_len", 64]
            words += ["--data.val_fraction", 0.2]
            words += ["--lora", "null"] if script == "finetune_preference" else ["--lora.rank", 4]
        elif script == "finetune_grpo":  # two answers to each of two prompts, and three steps on them
            words += [
                "--checkpoint_dir",
                self.base,
                "--data.path",
                self.data,
                "--data.max_seq_len",
                64,
                "--data.val_fraction",
                0.2,
            ]
            words += ["--rewards.functions", "[length]", "--rewards.length", 1, "--grpo.num_generations", 2]
            words += [
                "--grpo.max_completion_length",
                4,
                "--grpo.num_iterations",
                3,
                "--grpo.beta",
                0.1,
                "--lora.rank",
                4,
            ]
        else:
            words += ["--distill.teacher_dir", self.teacher()] * (script == "finetune_distill")
            words += ["--checkpoint_dir", self.base, "--data.path", self.data, "--data.max_seq_len", 128]
            words += ["--data.val_path", self.directory / "held_out.jsonl"]
        if script in ("finetune_lora", "finetune_qlora", "finetune_dora", "finetune_classifier", "finetune_distill"):
            words += ["--lora.dropout", 0.2, "--lora.rank", 4]
        return list(map(str, [*words, *more]))

    def run(
        self, script: str, words: list[str], moment: Moment | None = None, late: float = 0, counted: bool = False
    ) -> list[Ended]:
        """The command in as many processes as it asks for, with an empty token cache."""
        self.count += 1
        processes = int(words[words.index("--devices") + 1]) if "--devices" in words else 1
        cache = str(self.directory / f"cache-{self.count}")
        return run_two(play, script, words, cache, moment, late, counted, devices=processes, timeout=120)

    def undisturbed(self, script: str, more: tuple[object, ...] = ()) -> tuple[Path, list[dict[str, int]]]:
        """(directory, calls of each phase in each process) of a run that was left alone."""
        key = f"{script} {' '.join(map(str, more))}"
        if key not in self.whole:
            out = self.directory / f"whole-{len(self.whole)}"
            ended = self.run(script, self.words(script, out, more), counted=True)
            assert all(end.status == 0 for end in ended), "".join(end.out + end.err for end in ended)
            self.whole[key] = out, [end.value for end in ended]
        return self.whole[key]

    def new(self) -> Path:
        self.count += 1
        return self.directory / f"run-{self.count}"


def differences(found: Path, expected: Path) -> list[str]:
    """What of a run is not, to the bit, what it is in another."""
    wrong = []
    last = f"step-{STEPS:06d}"
    for file in sorted(file for part in ("final", last) for file in (expected / part).rglob("*.safetensors")):
        name = file.relative_to(expected)
        ours, theirs = load_file(file), load_file(found / name) if (found / name).exists() else {}
        if ours.keys() != theirs.keys() or any((ours[k].view(-1) != theirs[k].view(-1)).any() for k in ours):
            wrong.append(str(name))
    wrong += [name for name in ("metrics.csv", "samples.jsonl") if rows(found / name) != rows(expected / name)]
    return wrong + ["report.html"] * (not (found / "report.html").exists())


def rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        read: Any = csv.DictReader(opened) if file.suffix == ".csv" else map(json.loads, opened)
        return [{k: v for k, v in row.items() if k not in MOODY} for row in read]


def go_on(place: Place, row: Row, script: str, words: list[str], whole: Path, late: float = 0) -> None:
    """Resume the run of `words`, compare it with `full_tensor`, and put what it cost into the table's row."""
    out = Path(words[words.index("--out_dir") + 1])
    done = len(rows(out / "metrics.csv"))
    resumed = place.run(script, [*words, "--resume", "auto"], late=late)
    said = "".join(end.out + end.err for end in resumed)
    row.runs += 1
    if "is finished" not in said and any(end.status for end in resumed):
        row.lost.append(f"{out.name} does not go on: {said[-500:]}")
        return
    from_step = re.search(r"resuming from .*, after step (\d+)", said)
    row.again = max(row.again, done - int(from_step[1]) if from_step else 0 if "is finished" in said else done)
    row.lost += [f"{out.name}: {name}" for name in differences(out, whole)]


def sweep(
    place: Place, what: str, script: str, phase: str, times: int, more: tuple[object, ...] = (), rank: int = 0
) -> Row:
    """The fault `what` at `times` moments of a phase, evenly spread."""
    whole, all_counts = place.undisturbed(script, more)
    counts = all_counts[rank]
    row = Row(f"{what}: {phase}" if not more else f"{what}, rank {rank} of 2: {phase}", script)
    for i in range(times if counts[phase] else 0):
        out = place.new()
        words = place.words(script, out, more)
        moment = Moment(phase, 1 + int((i + 0.5) / times * 0.98 * counts[phase]), what, rank)
        started = time.monotonic()
        ended = place.run(script, words, moment)
        said = "".join(end.err for end in ended)
        status = ended[rank if what == "kill" else 0].status  # that of a signal is the first process's
        expected, message = EXPECTED[what]
        if status not in expected or (status and message and said.count(message) != 1):
            row.lost.append(f"{moment}: expected {expected} and '{message}', found {status} and {said[-500:]}")
        if time.monotonic() - started > 60 or any(end.status == 0 for end in ended if len(ended) > 1):
            row.lost.append(f"{moment}: the others did not end")
        if what == "new data":  # it is not read again
            place.data.write_text("".join(place.data.read_text().rpartition("{}\n")[0]))
        go_on(place, row, script, words, whole)
        shutil.rmtree(out, ignore_errors=True)
    return row


def stopped(place: Place, script: str, more: tuple[object, ...] = ()) -> tuple[list[str], Path]:
    """A run that was killed while it saved step 6, so that it has those of steps 2 and 4: its words, its directory."""
    _, (counts, *_) = place.undisturbed(script, more)
    out = place.new()
    words = place.words(script, out, more)
    (ended, *_) = place.run(script, words, Moment("save", counts["save"] * 3 // 4, "kill"))
    assert ended.status == -signal.SIGKILL and (out / "step-000004").exists(), ended.err
    return words, out


def refuse(place: Place, row: Row, script: str, words: list[str], *said: str) -> bool:
    """Whether `--resume auto` is refused with a message that has all of `said`."""
    (ended,) = place.run(script, [*words, "--resume", "auto"])
    fine = ended.status == 1 and "Traceback" not in ended.err and all(part in ended.err for part in said)
    if not fine:
        row.lost.append(f"expected {said}, got {ended.status} {ended.err[-300:]}")
    return fine


def corrupted(place: Place, script: str) -> Row:
    """Every file of the newest checkpoint damaged in three ways: it is refused, and the one before it does."""
    row = Row("corrupted checkpoint", script)
    words, out = stopped(place, script)
    whole, _ = place.undisturbed(script)
    spare = Path(tempfile.mkdtemp(dir=place.directory)) / "run"
    shutil.copytree(out, spare)
    for file in sorted(path for path in (out / "step-000004").rglob("*") if path.is_file()):
        for damage in ("flip", "cut", "delete"):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            {"flip": lambda: file.write_bytes(content), "cut": lambda: file.write_bytes(content[:-3])}.get(  # noqa: B023
                damage, file.unlink
            )()
            named = "is damaged" if file.name == CHECKSUMS else file.name  # a hash that differs names what it is of
            refuse(place, row, script, words, named, "step-000002")
            shutil.rmtree(out)
            shutil.copytree(spare, out)
            row.runs += 1
    shutil.rmtree(out / "step-000004")
    go_on(place, row, script, words, whole)
    return row


def changed_data(place: Place, script: str) -> Row:
    """The training and validation files changed between two parts of a run: refused until they are as they were."""
    row = Row("data file changed while stopped", script)
    words, _ = stopped(place, script)
    for file in (place.data, place.directory / "held_out.jsonl"):
        content = file.read_bytes()
        for other in (content + content.split(b"\n")[0] + b"\n", content.replace(b"a", b"b", 1)):
            file.write_bytes(other)
            refuse(place, row, script, words, file.name, "changed since the run began")
            row.runs += 1
        file.write_bytes(content)
    go_on(place, row, script, words, place.undisturbed(script)[0])
    return row


def clock_back(place: Place, script: str) -> Row:
    """All clocks a year back when the run goes on, and the newest checkpoint has the oldest date."""
    row = Row("clock a year back", script)
    words, out = stopped(place, script)
    for i, step in enumerate(sorted(out.glob("step-*"), reverse=True)):
        os.utime(step, (i, i))
    go_on(place, row, script, words, place.undisturbed(script)[0], late=365 * 86_400)
    return row


def bad_gradients(
    place: Place, script: str, more: tuple[object, ...] = (), steps: Iterable[int] = range(1, STEPS + 1)
) -> Row:
    """NaN in the gradients of each step in turn: the run stops before the step is taken, and goes on from its checkpoint."""
    row = Row("NaN in gradients" + ", 2 processes" * bool(more), script)
    for step in steps:
        words = place.words(script, place.new(), more)
        ended = place.run(script, words, Moment("step", step, "gradients"))
        error = "".join(end.err for end in ended)
        expected = f"error: step {step}: loss "
        if any(end.status != 1 for end in ended) or error.count(expected) != 1 or "bad-step-" not in error:
            row.lost.append(f"step {step}: {error[-300:]}")
        go_on(place, row, script, words, place.undisturbed(script, more)[0])
    return row


def bad_data(place: Place, script: str, more: tuple[object, ...] = ()) -> Row:
    """An example that gives NaN: the run stops and names it, by file and line; skipped, it ends as if skipped at once."""
    row = Row("NaN in data" + ", 2 processes" * bool(more), script)
    base, data, line = place.poisoned()
    poison = ("--checkpoint_dir", base, "--data.path", data, "--data.pack", "false", *more)
    skip = ("--train.on_nonfinite", "skip")
    whole, _ = place.undisturbed(script, (*poison, *skip))
    words = place.words(script, place.new(), poison)
    ended = place.run(script, words)
    error = "".join(end.err for end in ended)
    if any(end.status != 1 for end in ended) or error.count("error: ") != 1 or f"({data}:{line})" not in error:
        row.lost.append(f"expected {data}:{line}, got {error[-500:]}")
    go_on(place, row, script, [*words, *skip], whole)
    return row


def kills(place: Place, scripts: Iterable[str], times: int) -> Iterable[Row]:
    for script in scripts:
        for phase in PHASES:
            yield sweep(place, "kill", script, phase, times)


def deaths(place: Place, scripts: Iterable[str], times: int) -> Iterable[Row]:
    for script, strategy in (
        ("finetune_lora", "ddp"),
        ("finetune_qlora", "fsdp"),
        ("finetune_full", "fsdp"),
        ("pretrain", "ddp"),
    ):
        for rank in (0, 1):
            for phase in ("start", "step", "save", "final export"):
                yield sweep(
                    place, "kill", script, phase, -(-times // 4), ("--devices", 2, "--strategy", strategy), rank
                )


def signals(place: Place, scripts: Iterable[str], times: int) -> Iterable[Row]:
    for what in ("SIGTERM", "Ctrl-C"):
        yield sweep(place, what, "finetune_lora", "step", -(-times // 2))
    for rank in (0, 1):  # a terminal's Ctrl-C reaches all
        yield sweep(
            place, "SIGTERM", "finetune_lora", "step", -(-times // 4), ("--devices", 2, "--strategy", "ddp"), rank
        )


def disks(place: Place, scripts: Iterable[str], times: int) -> Iterable[Row]:
    for phase in PHASES:
        yield sweep(place, "full disk", "finetune_lora", phase, -(-times // 2))


def files(place: Place, scripts: Iterable[str], times: int) -> Iterable[Row]:
    yield sweep(place, "new data", "finetune_lora", "step", -(-times // 4))
    yield changed_data(place, "finetune_lora")
    for script in ("finetune_lora", "pretrain"):
        yield clock_back(place, script)
        yield corrupted(place, script)


def numbers(place: Place, scripts: Iterable[str], times: int) -> Iterable[Row]:
    for more in ((), ("--devices", 2, "--strategy", "ddp"), ("--devices", 2, "--strategy", "fsdp")):
        yield bad_data(place, "finetune_lora", more)
        yield bad_gradients(place, "finetune_lora", more)
    yield bad_gradients(place, "pretrain")


GROUPS = {group.__name__: group for group in (kills, deaths, signals, disks, files, numbers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="moments in each phase of a run of one process")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS, help="which are killed in each phase")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS, help="of faults")
    settings = parser.parse_args()
    print("| fault | where | runs | steps done again, at most | lost |\n|---|---|---|---|---|", flush=True)
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        place = Place(Path(directory))
        for group in settings.groups:
            for row in GROUPS[group](place, settings.scripts, settings.times):
                print(row, flush=True)
                found.append(row)
    print(f"\n{sum(row.runs for row in found)} runs, {sum(bool(row.lost) for row in found)} rows with a loss")
    sys.exit(any(row.lost for row in found))


if __name__ == "__main__":
    main()
