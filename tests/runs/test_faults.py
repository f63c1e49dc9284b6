"""What goes wrong around a run: deaths in the middle of a save, full disks, damaged files, NaN, two runs in one place."""

import csv
import errno
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from litmini import system
from litmini.checkpoints.hf import save_model
from litmini.checkpoints.safetensors_io import read_tensors, shards
from litmini.config.finetune import DataConfig, FinetuneLoraConfig
from litmini.config.training import TrainConfig
from litmini.errors import UserError
from litmini.files import Background, read_json, write_atomically, write_json
from litmini.models import llama
from litmini.runs import report
from litmini.runs.directory import RunDirectory
from litmini.runs.run import Run, read_metrics, read_samples
from litmini.runs.training_state import load_state
from litmini.tasks import measure
from litmini.tokenizer import Tokenizer
from litmini.training import loop
from litmini.training.setup import Progress

ROOT = Path(__file__).parents[2]
DATA = ROOT / "config_hub/quickstart"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Begin, or go on with, a run that trains one linear; returns (run, model, progress)."""
    fabric = Fabric(accelerator="cpu", devices=1)
    data, no_tokenizer = (
        tmp_path / "data.jsonl",
        SimpleNamespace(chat_template=None, template=SimpleNamespace(began=None), save=lambda _: None),
    )
    data.touch()
    monkeypatch.setattr("litmini.runs.run.describe_run", lambda *_: {})  # there is no base model

    def begin(resume: bool | str = False, **train: object) -> tuple[Run, torch.nn.Module, Progress]:
        settings = {"checkpoint_dir": "base", "out_dir": str(tmp_path / "run"), "data": DataConfig(path=str(data))}
        config = FinetuneLoraConfig(**settings, train=TrainConfig(**train), resume=resume)
        model = torch.nn.Linear(16, 16)
        optimizer = torch.optim.SGD(model.parameters())
        write = lambda d: (d / "adapter.bin").write_bytes(b"%d" % int(model.bias[0]))  # noqa: E731
        run = Run(RunDirectory(config), fabric, model, optimizer, no_tokenizer, write, {}, {})
        if not (run.directory / "manifest.json").exists():
            write_json(run.directory / "manifest.json", {})
        return run, model, run.progress

    return begin


def save(run: Run, model: torch.nn.Module, step: int, **progress: object) -> Path:
    """Checkpoint a state that is a function of the step: every trained parameter is it."""
    for parameter in model.parameters():
        parameter.data.fill_(step)
    return run.checkpoint(Progress(step=step, **progress))


def in_child(work) -> int:
    """Run `work` in a forked process and wait for it; 0, or how it died."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def check_usable(start, steps: Sequence[int]) -> int:
    """That the run can go on with one of these steps, whole; returns which."""
    _, model, progress = start(resume="auto")
    assert progress.step in steps
    assert all((p == progress.step).all() for p in model.parameters())
    return progress.step


OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "os.scandir")


def kill_at(count: int, place: Path):
    """Die at the `count`-th operation on files below `place`. For a child: an audit hook cannot be taken away."""
    left = count

    def touch(path: object) -> None:
        nonlocal left
        if isinstance(path, (str, bytes, os.PathLike)) and str(place) in os.fsdecode(path):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda d: (touch(os.readlink(f"/proc/self/fd/{d}")), fsync(d))[1]  # not audited
    sys.addaudithook(lambda event, args: touch(args[0]) if event in OPERATIONS else None)


def test_a_kill_at_each_operation_of_a_save_leaves_a_usable_checkpoint(start, tmp_path):
    """Requirement 22. The second save also drops the first, and replaces a step that is there already."""
    place, outcomes = tmp_path / "run", []
    run, model, _ = start(keep_last=1)
    save(run, model, 1)
    run.saving.wait()
    shutil.copytree(place, tmp_path / "before")
    for count in range(1, 200):
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "before", place)

        def work(count=count):
            run, model, _ = start(resume="auto", keep_last=1)
            kill_at(count, place)
            save(run, model, 2)
            run.saving.wait()
            save(run, model, 2)  # as a run that went back does
            run.saving.wait()

        system._unlock.clear()
        died = in_child(work)
        outcomes.append(check_usable(start, (1, 2)))
        if died == 0:
            break
        assert died == signal.SIGKILL
        run, model, _ = start(resume="auto", keep_last=1)
        save(run, model, 3)  # and the next save finds nothing in its way
        run.saving.wait()
        assert sorted(p.name for p in place.iterdir()) == ["config.yaml", "manifest.json", "metrics.csv", "step-000003"]
    assert died == 0 and len(outcomes) > 40
    assert outcomes == sorted(outcomes) and outcomes.count(1) > 10 and outcomes.count(2) > 10


def test_kills_at_random_moments_of_saves(start):
    run, model, _ = start()
    save(run, model, 1)
    run.saving.wait()
    last = 1
    for trial in range(25):
        child = os.fork()
        if child == 0:
            run.saving = Background()  # threads do not survive a fork
            for step in range(last + 1, last + 1000):
                save(run, model, step)
            os._exit(1)
        while not any(
            int(p.name[5:]) > last for p in run.directory.glob("step-*")
        ):  # on a busy machine one may be missed
            time.sleep(0.001)
        time.sleep(random.Random(trial).uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = check_usable(start, range(last, last + 1000))
    assert last > 25


def test_data_that_were_added_are_refused_on_resuming(start):
    run, model, _ = start()
    save(run, model, 1)
    run.saving.wait()
    write_json(run.directory / "manifest.json", {"data": {"hub:org/name/train-0.parquet": {"sha256": "0" * 64}}})
    with pytest.raises(
        UserError, match=r"data were added or removed since the run began: hub:org/name/train-0.parquet"
    ):
        start(resume="auto")


def test_the_last_ones_and_the_best_are_kept(start):
    run, model, _ = start(keep_last=2, keep_best=True)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        save(run, model, step, best_step=best)
    run.saving.wait()
    assert [p.name for p in run.run_directory.checkpoints()] == ["step-000002", "step-000004", "step-000005"]


def test_what_fails_on_its_way_to_the_disk_is_raised(start, monkeypatch):
    run, model, _ = start()
    save(run, model, 1)
    run.saving.wait()

    def full(descriptor):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    save(run, model, 2)
    with pytest.raises(OSError, match="No space left"):
        save(run, model, 3)
    monkeypatch.undo()
    assert [p.name for p in run.directory.iterdir() if "step" in p.name] == ["step-000001"]
    assert check_usable(start, (1, 1)) == 1


@pytest.mark.parametrize("damage", ["flip a bit", "cut off", "delete"])
def test_a_damaged_checkpoint_is_refused_and_another_named(start, damage):
    run, model, _ = start()
    for step in (1, 2):
        save(run, model, step)
    run.saving.wait()
    state = run.directory / "step-000002/training_state.safetensors"
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    {"flip a bit": lambda: state.write_bytes(content), "cut off": lambda: state.write_bytes(content[:-8])}.get(
        damage, state.unlink
    )()
    with pytest.raises(UserError, match=r"training_state.safetensors.* --resume .*step-000001"):
        start(resume="auto")
    assert start(resume=str(run.directory / "step-000001"))[2].step == 1


def test_the_newest_step_counts_not_the_newest_file(start):
    """A clock that went backwards."""
    run, model, _ = start()
    for step in (9, 10):
        save(run, model, step)
        run.saving.wait()
    os.utime(run.directory / "step-000010", (0, 0))
    assert start(resume="auto")[2].step == 10


def test_a_line_that_was_cut_off_is_forgotten(start):
    """A row of metrics or a sample, written in part as the process died, or the disk filled."""
    run, model, _ = start()
    for step in (1, 2):
        run.log({"step": step, "loss": step / 2})
        run.log_samples(step, [{"given": "é"}])
    save(run, model, 2)
    run.saving.wait()
    for name, part in (("metrics.csv", "1,5"), ("samples.jsonl", '{"step": 3, "giv')):
        with (run.directory / name).open("a") as file:
            file.write(part)
    start(resume="auto")
    assert [row["step"] for row in read_metrics(run.directory / "metrics.csv")] == ["1", "2"]
    samples = [{"step": step, "prediction": "é"} for step in (1, 2)]  # by the name that a version before gave it
    assert read_samples(run.directory) == samples
    assert (run.directory / "metrics.csv").read_text().endswith("\n")


def test_resuming_a_run_that_saved_nothing_says_so(start, capfd):
    start(resume="auto")
    assert "holds no checkpoint yet" in capfd.readouterr().out


def test_one_directory_is_written_by_one_process(start, tmp_path):
    run, _, _ = start()
    with write_atomically(tmp_path / "x") as aside:
        (aside / "a").write_text("ours")
        others = [lambda: write_atomically(tmp_path / "x").__enter__(), lambda: system.lock(run.directory)]
        for other in others:

            def refused(other=other):
                system._unlock.clear()
                with pytest.raises(UserError, match="another process is writing"):
                    other()

            assert in_child(refused) == 0
    assert (tmp_path / "x/a").read_text() == "ours"


def finetune(tiny_dir, out_dir, monkeypatch, capfd, *words: object) -> tuple[int, str, str]:
    settings = ["--checkpoint_dir", tiny_dir, "--out_dir", out_dir, "--data.path", DATA / "train.jsonl"]
    settings += ["--data.max_seq_len", 256, "--data.pack", "false", "--train.max_steps", 4, "--eval.samples", 0]
    settings += ["--train.global_batch_size", 2, "--train.micro_batch_size", 1, "--precision", "32-true", *words]
    monkeypatch.setattr(sys, "argv", ["finetune_lora", *map(str, settings)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts/finetune_lora.py"), run_name="__main__")
    return (end.value.code, *capfd.readouterr())


@pytest.fixture(scope="module")
def poisoned(tiny_dir, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint whose embedding of one token is NaN, and data of which one example in eight has that token."""
    place = tmp_path_factory.mktemp("poisoned")
    tokenizer = Tokenizer(tiny_dir)
    tensors = dict(read_tensors(shards(tiny_dir)))
    tensors["model.embed_tokens.weight"][tokenizer.encode("~")[0]] = float("nan")
    (place / "model").mkdir()
    save_model(place / "model", llama.config_to_hf(llama.PRESETS["tiny"]), tensors.items(), side_files=tiny_dir)
    with (place / "data.jsonl").open("w") as out:
        for i in range(8):
            out.write(json.dumps({"prompt": f"{i}{'~' if i == 5 else ''}?", "completion": "yes"}) + "\n")
    return place / "model", place / "data.jsonl"


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_a_bad_step_is_named_and_its_batch_saved(poisoned, tmp_path, monkeypatch, capfd, choice):
    base, data = poisoned
    words = ["--data.path", data, "--train.on_nonfinite", choice, "--train.save_every", 4]
    status, out, error = finetune(base, tmp_path / "run", monkeypatch, capfd, *words)
    bad = list((tmp_path / "run").glob("bad-step-*.json"))
    assert len(bad) == 1 and f"Its batch is in {bad[0]} ({data}:" in (error if choice == "stop" else out)
    saved = read_json(bad[0])
    step = saved["step"]
    texts = [[e["text"] for row in part["rows"] for e in row] for part in saved["micro_batches"]]
    assert [any("5~" in text for text in part) for part in texts] == [
        p["loss_sum"] == "nan" for p in saved["micro_batches"]
    ]
    assert sum("5~" in text for part in texts for text in part) == 1
    for example in (e for part in saved["micro_batches"] for row in part["rows"] for e in row):
        assert example["place"] == f"{data}:{int(re.search(r'([0-9])~?[?]', example['text'])[1]) + 1}"
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    if choice == "stop":
        assert status == 1 and f"step {step}: loss nan" in error and "--train.on_nonfinite skip" in error
        assert [r["step"] for r in rows] == [str(i) for i in range(1, step)]
    else:
        assert status == 0 and [r["loss"] == "nan" for r in rows] == [i == step for i in range(1, 5)]
        state = load_file(tmp_path / "run/step-000004/training_state.safetensors")
        assert all(t.isfinite().all() for t in state.values()) and {float(state[n]) for n in state if "step/" in n} == {
            3.0
        }
        assert read_json(tmp_path / "run/step-000004/training_state.json")["progress"]["skipped"] == 1


def test_weights_that_are_nan_end_a_run_that_skips(poisoned, tmp_path, monkeypatch, capfd):
    base, data = poisoned
    data = tmp_path / "all.jsonl"
    data.write_text('{"prompt": "~", "completion": "yes"}\n' * 2)
    words = ["--data.path", data, "--train.on_nonfinite", "skip", "--train.max_steps", 40]
    status, _, error = finetune(base, tmp_path / "run", monkeypatch, capfd, *words)
    assert status == 1 and "step 25: loss nan" in error and "the 24 steps before it" in error


def test_the_best_step_is_saved_when_it_is_found(tiny_dir, tmp_path, monkeypatch, capfd):
    losses = iter([9.0, 5.0, 3.0, 4.0, 6.0, 7.0])  # before, after steps 1 to 4, after the run
    for module in (loop, measure):
        monkeypatch.setattr(module, "validate", lambda *_: {"loss": next(losses)})
    words = ["--data.val_path", DATA / "heldout.jsonl", "--train.eval_every", 1, "--train.keep_best", "true"]
    assert finetune(tiny_dir, tmp_path / "run", monkeypatch, capfd, *words, "--train.max_steps", 5)[0] == 0
    assert [p.name for p in sorted((tmp_path / "run").glob("step-*"))] == ["step-000001", "step-000002"]
    results = read_json(tmp_path / "run/manifest.json")["results"]
    assert (results["best_step"], results["best_val_loss"]) == (2, 3.0)


class Death(Exception):
    """In place of SIGKILL: nothing of a run catches it."""


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("save_final", ["--train.patience", 2, "--train.save_every", 4]),  # the step that decided is saved
        ("save_final", ["--train.patience", 2, "--train.save_every", 3]),  # it is not
        ("save_final", ["--train.patience", 2, "--train.keep_best", "true"]),
        ("save_final", ["--train.keep_best", "true", "--train.save_every", 6]),  # the last step is saved
        ("save_final", ["--train.keep_best", "true"]),
        ("measure", ["--train.patience", 2, "--train.save_every", 1]),  # the result is saved, but not measured
        ("write_report", ["--train.patience", 2, "--train.save_every", 1]),
    ],
)
def test_a_death_after_any_decision_changes_no_result(tiny_dir, tmp_path, monkeypatch, capfd, at, words):
    losses = {0: 9.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0, 5: 2.0, 6: 1.0}
    for module in (loop, measure):
        monkeypatch.setattr(module, "validate", lambda setup, _: {"loss": losses[setup.progress.step]})
    words = ["--data.val_path", DATA / "heldout.jsonl", "--train.eval_every", 1, "--train.max_steps", 6, *words]
    assert finetune(tiny_dir, tmp_path / "whole", monkeypatch, capfd, *words)[0] == 0

    holder = {"save_final": Run, "measure": measure, "write_report": report}[at]
    original = getattr(holder, at)

    def die(*args: object, **more: object) -> object:
        if at == "measure" and args[2] != "after":
            return original(*args, **more)
        raise Death

    with monkeypatch.context() as killed, pytest.raises(Death):
        killed.setattr(holder, at, die)
        finetune(tiny_dir, tmp_path / "run", killed, capfd, *words)
    system.unlock_all()
    assert finetune(tiny_dir, tmp_path / "run", monkeypatch, capfd, *words, "--resume", "auto")[0] == 0
    whole, resumed = (read_json(tmp_path / name / "manifest.json")["results"] for name in ("whole", "run"))
    assert resumed["steps"] == whole["steps"] == (4 if "--train.patience" in words else 6)
    assert {k: v for k, v in whole.items() if "loss" in k} == {k: v for k, v in resumed.items() if "loss" in k}
    tensors = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("whole", "run"))
    one, other = tensors
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
    steps = ([p.name for p in sorted((tmp_path / name).glob("step-*"))] for name in ("whole", "run"))
    assert next(steps) == next(steps)


def test_a_run_resumed_on_another_day_keeps_its_day(tiny_dir, tmp_path, monkeypatch, capfd):
    """Templates that write the date: the tokens of all its steps are those of the day on which it began."""

    class Day(datetime):
        today = 28

        @classmethod
        def now(cls) -> datetime:
            return datetime(2025, 11, cls.today)

    monkeypatch.setattr("litmini.tasks.plan.datetime", Day)
    template = tmp_path / "t.jinja"
    plain = (tiny_dir / "chat_template.jinja").read_text()
    template.write_text("<|im_start|>system\n{{ strftime_now('%d %B %Y') }}<|im_end|>\n" + plain)
    words = ["--data.chat_template", template, "--train.save_every", 2]
    assert finetune(tiny_dir, tmp_path / "whole", monkeypatch, capfd, *words)[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for name in ("final", "step-000004"):
        shutil.rmtree(tmp_path / "run" / name)
    Day.today = 29
    assert finetune(tiny_dir, tmp_path / "run", monkeypatch, capfd, *words, "--resume", "auto")[0] == 0
    one, other = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert finetune(tiny_dir, tmp_path / "next", monkeypatch, capfd, *words)[0] == 0
    assert not all(
        torch.equal(one[k], v) for k, v in load_file(tmp_path / "next/final/adapter_model.safetensors").items()
    )


def test_states_of_older_checkpoints_load(start):
    """Fields that progress did not have then."""
    run, model, _ = start()
    directory = save(run, model, 1)
    run.saving.wait()
    state = read_json(directory / "training_state.json")
    state["progress"] = {k: state["progress"][k] for k in ("step", "tokens", "targets", "seconds")}
    write_json(directory / "training_state.json", state)
    assert load_state(directory, model, torch.optim.SGD(model.parameters())).best_step == 0
