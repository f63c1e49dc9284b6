"""sweep.py: which runs it starts, with what, and what it says of them. Most runs here only look like training."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from script_runs import ROOT, run_script

from litmini.config.sweep import SweepConfig
from litmini.errors import UserError
from litmini.runs.sweep import Curves, Outcome, environments, visible_gpus
from litmini.runs.sweep import start as real_start
from litmini.runs.sweep_report import rows_of, table
from litmini.tasks.sweep import make_run
from litmini.tasks.sweep_samplers import Listed, Tpe, random_choice

RUN = """
import csv, json, os, signal, sys, time
from pathlib import Path

words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
out, rate, seed = Path(given["--out_dir"]), float(given["--optim.lr"]), int(given.get("--seed", 0))
out.mkdir(exist_ok=True)
began = time.time()

def stop(*_):
    (out / "saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
(out / "config.yaml").touch()
with (out / "started").open("a") as file:
    file.write(json.dumps({"words": words, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}) + "\\n")
if rate == 0.5:
    print("some text\\nerror: the rate is too high | really")
    sys.exit(1)
if rate == 0.25:
    os.kill(os.getpid(), signal.SIGKILL)
loss = (rate - 0.01) ** 2 * 1000 + seed / 100
with (out / "metrics.csv").open("w") as file:
    file.write("step,val_loss\\n")
    for step in (1, 2, 3):
        file.write(f"{step},{loss + 1 / step}\\n")
        file.flush()
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)) * (2 if rate > 0.05 else 1))
(out / "manifest.json").write_text(json.dumps({"results": {"val_loss_after": loss, "exact_match_after": rate}}))
(out / "times").write_text(json.dumps([began, time.time()]))
(out / "report.html").touch()
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """Settings of runs, and runs of the script above in place of real ones."""
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "run.yaml").write_text(
        f"checkpoint_dir: {tmp_path}/base\nout_dir: out/x\ndata: {{path: d.jsonl, val_path: v.jsonl}}\n"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def start(_: Path, words: list[str], log: Path, environment: dict[str, str]) -> Any:
        with log.open("ab") as out:
            command = [sys.executable, "-S", str(tmp_path / "run.py"), *words]
            return subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **environment})

    monkeypatch.setattr("litmini.runs.sweep.start", start)
    monkeypatch.setattr("litmini.runs.sweep.PAUSE", 0.01)
    return tmp_path


def sweep(capfd: Any, place: Path, *words: object, script: str = "finetune_lora", status: int = 0) -> str:
    fixed = [script, "--config", place / "run.yaml", "--out_dir", place / "out"]
    return run_script(capfd, "sweep", *fixed, *words, status=status)


def runs(place: Path) -> list[str]:
    return sorted(file.parent.name for file in (place / "out").glob("*/started"))


def starts(place: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "out" / name / "started").read_text().splitlines()]


GRID = ("--grid", "{optim.lr: [1e-2, 1e-1, 1e-3], lora.rank: [8, 16]}")


def test_a_grid(place, capfd):
    out = sweep(capfd, place, *GRID, "--set", "{train.max_steps: 5}")
    assert "6 runs: 6 done" in out
    assert runs(place) == [f"lr-{lr}_rank-{rank}" for lr in ("0.001", "0.01", "0.1") for rank in (16, 8)]
    words = starts(place, "lr-0.01_rank-8")[0]["words"]
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given == {
        "--config": str(place / "run.yaml"), "--train.max_steps": "5", "--optim.lr": "0.01", "--lora.rank": "8",
        "--out_dir": str(place / "out/lr-0.01_rank-8"),
    }  # fmt: skip
    text = (place / "out/sweep.md").read_text()
    assert text in out and text.splitlines()[:3] == [
        "| optim.lr | lora.rank | val_loss | runs |", "|---|---|---|---|", "| 0.01 | 8 | 0.0000 | done |"
    ]  # fmt: skip
    assert text.splitlines()[-1] == "| 0.1 | 16 | 8.1000 | done |"
    best = (
        f"python scripts/finetune_lora.py --config {place}/run.yaml --train.max_steps 5 --optim.lr 0.01 --lora.rank 8"
    )
    assert f"the best, val_loss 0.0000:\n  {best} --out_dir {place}/out/best" in out
    assert (place / "out/sweep.png").stat().st_size > 5000
    # repeated, it reads what is there; with more values, it runs these
    sweep(capfd, place, *GRID, "--set", "{train.max_steps: 5}")
    more = ("--grid", "{optim.lr: [1e-2, 2e-2], lora.rank: [8]}", "--set", "{train.max_steps: 5}")
    assert "2 runs: 2 done" in sweep(capfd, place, *more)
    assert len(runs(place)) == 7 and all(len(starts(place, name)) == 1 for name in runs(place))
    assert "other settings (set)" in sweep(capfd, place, *GRID, status=1)


def test_runs_that_fail_do_not_end_it(place, capfd):
    grid = ("--grid", "{optim.lr: [0.5, 0.01, 0.25]}")
    out = sweep(capfd, place, *grid)
    assert "3 runs: 1 done, 2 failed" in out and "2 runs failed; the logs are" in out
    assert "| 0.5 | | failed: status 1: error: the rate is too high / really |" in out
    assert "| 0.25 | | failed: ended by signal 9 |" in out and "--optim.lr 0.01 " in out
    sweep(capfd, place, *grid)  # they are tried again, and go on where they were
    assert [len(starts(place, f"lr-{rate}")) for rate in (0.5, 0.01, 0.25)] == [2, 1, 2]
    assert starts(place, "lr-0.5")[1]["words"][-2:] == ["--resume", "auto"]
    error = sweep(capfd, place, "--grid", "{optim.lr: [0.5]}", status=1)
    assert "no choice has a result" in error


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("{optim.lrr: [1e-3]}", "unknown setting 'optim.lrr': did you mean 'optim.lr'?"),
        ("{optim.lr: [1e-3], rank: [4]}", "unknown setting 'rank': did you mean 'lora.rank'?"),
        ("{lora.rank: [4, 0]}", "out of range: lora.rank is 0"),
        ("{lora.rank: [4, many]}", "lora.rank is many; expected a whole number"),
        ("{lora.rank: []}", "lora.rank has no values"),
        ("{out_dir: [a]}", "the sweep chooses it for each run"),
        ("{lora.rank: 4}", "lora.rank has no values"),
        ("rank", "grid is rank; expected names and lists of values such as"),
        ("{lora.rank: [4, 8, 4]}", "lora.rank has a value twice"),
    ],
)
def test_a_grid_that_is_refused(place, capfd, grid, says):
    """Before anything runs, or is written."""
    assert says in sweep(capfd, place, "--grid", grid, status=2)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("words", "says", "status"),
    [
        (("--sampler", "random"), "takes its settings from --space", 2),
        (("--sampler", "random", "--space", "{optim.lr: 3}"), "expected a list of values, or a range", 2),
        (("--sampler", "random", "--space", "{optim.lr: {min: 0, max: 1, log: true}}"), "above 0 if log", 2),
        (("--grid", "{seed: [1]}", "--seeds", "[1, 2]"), "expected one of them", 2),
        (("--grid", "{optim.lr: [1]}", "--set", "{optim.lr: 1}"), "given to all runs by --set as well", 2),
        (("--grid", "{optim.lr: [1]}", "--set", "{data.val_path: null}"), "have no val_loss to compare", 1),
        (("--grid", "{optim.lr: [1]}", "--prune"), "prune compares validation losses during training", 1),
        (("--grid", "{optim.lr: [1]}", "--config", "nowhere.yaml"), "nowhere.yaml", 2),
    ],
)
def test_settings_that_are_refused(place, capfd, words, says, status):
    assert says in sweep(capfd, place, *words, status=status)
    assert not (place / "out").exists()


def test_a_script_that_is_none(place, capfd):
    assert "expected one of finetune_full, " in sweep(capfd, place, *GRID, script="finetune_lara", status=1)


def test_seeds_and_their_spread(place, capfd):
    """In a file of the sweep's own."""
    (place / "sweep.yaml").write_text("grid: {optim.lr: [1e-2, 2e-2]}\nseeds: [1, 3]\n")
    out = sweep(capfd, place, "--sweep", place / "sweep.yaml")
    assert "| optim.lr | val_loss | std | lowest to highest | runs |" in out
    assert "| 0.01 | 0.0200 | 0.0141 | 0.0100 to 0.0300 | 2 done |" in out
    assert runs(place) == ["lr-0.01_seed-1", "lr-0.01_seed-3", "lr-0.02_seed-1", "lr-0.02_seed-3"]
    assert "the best, val_loss 0.0200" in out and "--seed" not in out.partition("the best")[2]


def test_another_metric(place, capfd):
    """Larger rates have a higher one here; and one that no run measures."""
    grid = ("--grid", "{optim.lr: [1e-2, 2e-2]}", "--metric", "exact_match", "--maximize")
    assert "the best, exact_match 0.0200" in sweep(capfd, place, *grid, "--set", "{data.val_path: null}")
    sweep(capfd, place, *grid[:2], "--metric", "accuracy", "--set", "{data.val_path: null}", status=1)
    assert "accuracy is None; measured: exact_match, val_loss" in (place / "out/sweep.md").read_text()


def test_jobs_and_gpus(place, capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    monkeypatch.setenv("STEP_SECONDS", "0.05")
    out = sweep(capfd, place, "--grid", "{optim.lr: [0.01, 0.011, 0.012, 0.013]}", "--jobs", 2)
    assert "on GPU 3" in out
    used = [starts(place, name)[0]["gpus"] for name in runs(place)]
    assert sorted(set(used)) == ["3", "5"] and used[:2] == ["3", "5"]
    times = sorted(json.loads(file.read_text()) for file in (place / "out").glob("*/times"))
    at_once = [sum(a <= start < b for a, b in times) for start, _ in times]
    assert max(at_once) == 2


def test_the_environments_of_runs(monkeypatch):
    gpus = [one["CUDA_VISIBLE_DEVICES"] for one in environments(4, 1, ["0", "1", "2"])]
    assert gpus == ["0", "1", "2", "0"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(2, 2, ["0", "1", "2"])] == ["0,1", "2,0"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("litmini.runs.sweep.cpu_count", lambda: 8)
    assert environments(4, 1, []) == [{"OMP_NUM_THREADS": "2"}] * 4 and environments(1, 1, []) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == []


def test_runs_that_are_behind_are_pruned(place, capfd, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "0.1")
    words = ("--grid", "{optim.lr: [0.01, 0.02, 0.1, 0.011]}", "--prune", "--prune_after", 2)
    words += ("--set", "{train.eval_every: 1}")
    out = sweep(capfd, place, *words)
    assert "4 runs: 3 done, 1 pruned" in out
    pruned = next(line for line in out.splitlines() if line.startswith("| 0.1 |"))
    assert "pruned at step 1: 9.1000" in pruned and (place / "out/lr-0.1/saved").exists()
    assert "lr-0.1: pruned 9.1000" in out
    sweep(capfd, place, *words)  # it stays so
    assert len(starts(place, "lr-0.1")) == 1
    out = sweep(capfd, place, *words[:2], "--set", "{train.eval_every: 1}")  # unless nothing is pruned
    assert "4 runs: 4 done" in out and len(starts(place, "lr-0.1")) == 2


def test_the_median_rule():
    curves = Curves(2)
    curves.seen = {"a": {1: 1.0}, "b": {1: 3.0, 2: float("nan")}, "c": {1: 2.0}}
    assert curves.is_behind("d", 1, 2.1) and not curves.is_behind("d", 1, 2.0)
    assert curves.is_behind("d", 1, float("nan"))
    assert not curves.is_behind("d", 2, 9.0), "too few have got so far"


def test_stopped_and_repeated(place, capfd, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "1")
    grid = ("--grid", "{optim.lr: [0.01, 0.02, 0.011]}", "--jobs", 2)

    def stop() -> None:
        while len(runs(place)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    error = sweep(capfd, place, *grid, status=128 + signal.SIGTERM)
    thread.join()
    assert "SIGTERM: the runs have saved their state. Repeat the command to continue" in error
    assert [(place / "out" / name / "saved").exists() for name in ("lr-0.01", "lr-0.02")] == [True, True]
    monkeypatch.setenv("STEP_SECONDS", "0")
    assert "3 runs: 3 done" in sweep(capfd, place, *grid)
    assert starts(place, "lr-0.01")[1]["words"][-2:] == ["--resume", "auto"]
    assert "--resume" not in starts(place, "lr-0.011")[0]["words"]


# Choices

SPACE = {
    "optim.lr": {"min": 1e-4, "max": 0.1, "log": True},
    "lora.rank": {"min": 4, "max": 6},
    "lora.dropout": [0.0, 0.1],
}


def config(**more: Any) -> SweepConfig:
    return SweepConfig(**{"script": "finetune_lora", "out_dir": "o", "space": SPACE, "sampler": "random", **more})


def test_choices_at_random():
    found = [random_choice(config(), i) for i in range(300)]
    listed = Listed(config(trials=300)).choices
    assert listed == [one for i, one in enumerate(found) if one not in found[:i]] and len(listed) > 250
    assert found[0] != random_choice(config(sampler_seed=1), 0)
    rates = [one["optim.lr"] for one in found]
    assert all(1e-4 <= rate <= 0.1 for rate in rates) and 70 < sum(rate < 1e-3 for rate in rates) < 130
    assert {one["lora.rank"] for one in found} == {4, 5, 6} and {one["lora.dropout"] for one in found} == {0.0, 0.1}


def test_a_random_sweep(place, capfd):
    words = (
        "--sampler",
        "random",
        "--space",
        "{optim.lr: {min: 1e-3, max: 0.1}, lora.targets: [[q_proj], [v_proj, o_proj]]}",
        "--trials",
    )
    assert "4 runs: 4 done" in sweep(capfd, place, *words, 4)
    assert "5 runs: 5 done" in sweep(capfd, place, *words, 5)
    assert len(runs(place)) == 5 and all(len(starts(place, name)) == 1 for name in runs(place))
    assert len(set(runs(place))) == 5 and not any("[" in name for name in runs(place))


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_a_choice_that_comes_again_is_run_once(place, capfd, monkeypatch, sampler):
    """Also where the first of them still runs."""
    monkeypatch.setenv("STEP_SECONDS", "0.05")
    words = ("--sampler", sampler, "--trials", 9, "--space", "{optim.lr: [0.01, 0.02]}", "--jobs", 2)
    for _ in range(2):
        assert "2 runs: 2 done" in sweep(capfd, place, *words)
    assert runs(place) == ["lr-0.01", "lr-0.02"] and all(len(starts(place, name)) == 1 for name in runs(place))


def test_directories_of_other_settings(place, capfd):
    """Names of runs have the last part of a setting only, so another one could be taken for it."""
    sweep(capfd, place, *GRID)
    error = sweep(capfd, place, "--grid", "{optim.weight_decay: [0.1]}", "--set", "{optim.lr: 1}", status=1)
    assert "other settings (set)" in error
    file = place / "out/sweep.json"
    before = file.read_text()
    file.write_text(before.replace('"optim.lr"', '"other.lr"'))
    assert "has a sweep over other.lr, lora.rank" in sweep(capfd, place, *GRID, status=1)
    for broken in (
        '{"a": 1}',
        '{"fixed": {"script": "finetune_lora", "set": {}, "settings": 0}, "runs": 1}',
        "[]",
        "{",
    ):
        file.write_text(broken)
        assert "sweep.json" in sweep(capfd, place, *GRID, status=1)


def test_ctrl_c_in_a_terminal_reaches_the_sweep_alone(place):
    """A terminal sends it to all processes of a group; runs that get it and SIGTERM would end without saving."""
    file = place / "sleep.py"
    file.write_text("import time\ntime.sleep(60)\n")
    process = real_start(file, [], place / "log", {})
    try:
        assert os.getpgid(process.pid) == process.pid != os.getpgrp()
    finally:
        process.kill()
        process.wait()


def test_optuna(place, capfd):
    """It comes closer to the best rate than choices at random, and continues with what it knows."""
    words = (
        "--sampler",
        "optuna",
        "--space",
        "{optim.lr: {min: 1e-4, max: 0.2, log: true}, lora.rank: [4, 8]}",
        "--trials",
    )
    sweep(capfd, place, *words, 6)
    first = [one["choice"] for one in json.loads((place / "out/sweep.json").read_text())["runs"]]
    out = sweep(capfd, place, *words, 12)
    after = json.loads((place / "out/sweep.json").read_text())["runs"]
    assert [one["choice"] for one in after[:6]] == first and "12 runs: 12 done" in out
    assert all(len(starts(place, name)) == 1 for name in runs(place))
    rates = [one["choice"]["optim.lr"] for one in after]
    assert all(1e-4 <= rate <= 0.2 for rate in rates) and len(set(rates)) > 8


def test_optuna_is_told_the_mean_of_the_seeds(place, capfd, monkeypatch):
    """Of a choice whose runs have all ended; nothing of one that failed."""
    told: list[tuple[int, float | None]] = []
    monkeypatch.setattr(Tpe, "tell", lambda _, number, value, pruned: told.append((number, value)))
    words = ("--sampler", "optuna", "--trials", 3, "--space", "{optim.lr: [0.01, 0.5, 0.02]}", "--seeds", "[1, 3]")
    sweep(capfd, place, *words)
    choices = {
        one["number"]: one["choice"]["optim.lr"] for one in json.loads((place / "out/sweep.json").read_text())["runs"]
    }
    means = {0.01: pytest.approx(0.02), 0.02: pytest.approx(0.12), 0.5: None}
    expected = [(i, means[choices[i]]) for i in range(3)]
    assert told == expected and len(choices) == 3


def test_optuna_learns():
    known = [{"optim.lr": 10.0**-i, "lora.rank": 4, "lora.dropout": 0.1} for i in (1, 2, 3, 4)] * 4
    tpe = Tpe(config(sampler="optuna", trials=40), known)
    for i, choice in enumerate(known):
        assert tpe.choose(i) == choice
        pruned = (3, 9.0) if i == 0 else None
        tpe.tell(i, None if i < 2 else abs(choice["optim.lr"] - 1e-2), pruned)
    found = []
    for i in range(len(known), 40):
        choice = tpe.choose(i)
        assert choice is not None
        found.append(choice["optim.lr"])
        tpe.tell(i, abs(choice["optim.lr"] - 1e-2))
    assert tpe.choose(40) is None
    assert sum(3e-3 < rate < 3e-2 for rate in found) > 12, found


def test_without_optuna(place, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    words = ("--sampler", "optuna", "--space", "{optim.lr: [1e-3]}")
    assert 'pip install -e ".[sweep]"' in sweep(capfd, place, *words, status=1)


def test_names_of_runs():
    """They differ, and are names of directories."""
    choices = [
        {"data.path": "a/b"},
        {"data.path": "a_b"},
        {"lora.targets": ["q"] * 60},
        {"lora.targets": ["q"] * 61},
        {},
    ]
    names = [make_run(config(), 0, choice, None).name for choice in choices]
    assert len(set(names)) == 5 and all(len(name) < 100 and "/" not in name and name for name in names)


def test_a_table_of_what_is_not_finished():
    outcomes = [
        Outcome("a", 0, {"x": 1}, 1, "done", 2.0),
        Outcome("b", 0, {"x": 1}, 2),
        Outcome("c", 1, {"x": 2}, 1, "done", 3.0),
    ]
    outcomes.append(Outcome("d", 1, {"x": 2}, 2, "done", 4.0))
    lines = table(rows_of(outcomes), "val_loss").splitlines()
    assert lines[2:] == [
        "| 2 | 3.5000 | 0.7071 | 3.0000 to 4.0000 | 2 done |",
        "| 1 | 2.0000 | | | 1 done; 1 waiting |",
    ]


# A real one


def test_real_runs(tiny_dir, place, capfd, monkeypatch):
    """Of which one fails while it runs: its base is missing."""
    monkeypatch.undo()
    data = ROOT / "config_hub/quickstart/heldout.jsonl"
    (place / "run.yaml").write_text(
        f"checkpoint_dir: {tiny_dir}\nout_dir: x\ndata: {{path: {data}, val_path: {data}, max_seq_len: 128}}\n"
        "train: {max_steps: 2, global_batch_size: 2}\neval: {samples: 0}\nprecision: 32-true\n"
    )
    monkeypatch.setenv("LITMINI_CACHE", str(place / "cache"))
    words = ("--grid", f"{{checkpoint_dir: [{tiny_dir}, {place}/none], optim.lr: [1e-2]}}", "--jobs", 2)
    out = sweep(capfd, place, *words)
    assert "2 runs: 1 done, 1 failed" in out and "failed: status 1: error:" in out
    (name,) = [one.name for one in (place / "out").iterdir() if (one / "report.html").exists()]
    assert (place / "out" / name / "final/adapter_model.safetensors").is_file()
    command = out.partition("the best, val_loss ")[2].split("\n")[1].split()
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    results = [json.loads((place / "out" / one / "manifest.json").read_text())["results"] for one in (name, "best")]
    assert done.returncode == 0 and results[0]["val_loss_after"] == results[1]["val_loss_after"]


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_settings_contradict(sampler):
    with pytest.raises(UserError):
        SweepConfig(script="x", out_dir="o", sampler=sampler)
