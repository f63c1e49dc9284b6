"""The benchmark of GPUs, on a CPU with a tiny model: its rows, its time, and rows that fail."""

import json
import runpy
import sys
import time
from pathlib import Path

import pytest
import run_shapes
import shapes
import torch
import varlen_kernel
from shape_models import DOCUMENTS, packed

from litmini.training import setup
from litmini.training.setup import on_device

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def job(tool: str, task: str, **more: object) -> dict:
    fixed = {"shape": "tiny", "length": 48, "rows": 2, "variant": "", "attention": "sdpa", "steps": 3, "warmup": 1}
    return {**fixed, "tool": tool, "task": task, **more}


@pytest.mark.parametrize("task", ["lora", "qlora", "full"])
def test_both_tools_train_the_same_shape(task):
    """Other weights, drawn alike, so the first loss is that of a uniform guess."""
    rows = [run_shapes.run_row(job(tool, task), CPU) for tool in ("litmini", "transformers")]
    for row in rows:
        assert row.get("failed") is None and row["tokens_per_second"] > 0 and row["mfu"] > 0, row
        assert row["loss"] == pytest.approx(6.24, abs=0.1)  # ln 512


@pytest.mark.parametrize("task", ["lora", "full"])
def test_batches_of_a_gpu_reach_the_model_as_they_are(task, monkeypatch):
    """Their documents and targets are frozen dataclasses, which Lightning's own mixed precision refuses."""
    monkeypatch.setattr(setup, "on_device", lambda batch, device, _: on_device(batch, device, "varlen"))
    calls = len(varlen_kernel.calls)
    row = run_shapes.run_row(job("litmini", task), CPU)
    assert "failed" not in row and row["loss"] == pytest.approx(6.24, abs=0.1)
    assert len(varlen_kernel.calls) > calls


def test_rows_run_on_the_gpu_that_is_asked_for(monkeypatch):
    """Else Lightning takes the first one, and memory and time are those of the first one."""
    asked = []

    class Refused(Exception):
        pass

    def fabric(**how):
        asked.append((how["accelerator"], how["devices"]))
        raise Refused

    monkeypatch.setattr(run_shapes, "random_model", lambda job, device: torch.nn.Linear(2, 2))
    monkeypatch.setattr(run_shapes, "fabric_class", lambda: fabric)
    for device in ("cuda:1", "cuda", "cpu"):
        with pytest.raises(Refused):
            run_shapes.litmini_training(job("litmini", "full"), torch.device(device), [])
    assert asked == [("cuda", [1]), ("cuda", 1), ("cpu", 1)]
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for device in ("cuda:1", "cuda", "cpu"):
        run_shapes.use(torch.device(device))
    assert used == [torch.device("cuda:1")]


def test_both_tools_decode():
    for tool in ("litmini", "transformers"):
        row = run_shapes.run_row(job(tool, "decode"), CPU)
        assert row["tokens_per_second"] > 0 and row["batch_8_tokens_per_second"] > 0 and row["of_bandwidth"] > 0, row


def test_bandwidth_is_that_of_memory_and_not_of_a_cache(monkeypatch):
    made, plain = [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda n, device: made.append((n, str(device))) or plain(8))
    for device in ("cuda:0", "cpu"):
        assert run_shapes.read_bandwidth(torch.device(device)) > 0
    assert made == [(2**29, "cuda:0"), (2**26, "cpu")]


def test_a_row_that_fails_is_a_result(monkeypatch):
    row = run_shapes.run_row(job("transformers", "lora", variant="sdpa, liger"), CPU)
    assert row == {"failed": "skipped: liger_kernel is not installed"}

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run_shapes, "litmini_training", no_memory)
    assert run_shapes.run_row(job("litmini", "full"), CPU) == {"failed": "out of memory"}
    monkeypatch.setattr(run_shapes, "litmini_training", lambda *_: 1 / 0)
    assert run_shapes.run_row(job("litmini", "full"), CPU) == {"failed": "ZeroDivisionError: division by zero"}


def test_sequences_are_packed_with_documents():
    batch = packed(100, 64, 3, 0)
    assert (batch["documents"].amax(1) == DOCUMENTS).all()
    starts = batch["positions"] == 0
    assert (starts.sum(1) == DOCUMENTS).all() and (batch["labels"] < 0).sum() == starts.sum()
    inside = batch["labels"][:, :-1] >= 0
    assert torch.equal(batch["labels"][:, :-1][inside], batch["tokens"][:, 1:][inside])


def test_the_plan_has_what_matters_most_first():
    rows = shapes.plan("litmini", "cuda", shapes.SHAPES, (8192, 2048), 12, 2)
    assert [(row["task"], row["length"]) for row in rows[::3]][:4] == [
        ("lora", 8192), ("lora", 2048), ("decode", 0), ("lora", 8192),
    ]  # fmt: skip
    assert {row["variant"] for row in rows} == {"", "compiled"} and {row["rows"] for row in rows} == {0, 1, 4}
    assert {row["task"] for row in rows} == {"lora", "qlora", "full", "decode"}
    with pytest.raises(ValueError, match="Llama-9 is no preset"):
        shapes.plan("litmini", "cuda", ["Llama-9"], (64,), 3, 1)


WORKER = """
import json, os, pathlib, sys, time
plan = json.loads(pathlib.Path(sys.argv[1]).read_text())
for job in plan["jobs"]:
    if job["task"] == "dies":
        sys.exit("Segmentation fault")
    if job["task"] == "sleeps":
        time.sleep(60)
    with open(plan["results"], "a") as file:
        file.write(json.dumps({**job, "tokens_per_second": 5.0, "device": "pretended"}) + chr(10))
    if job["task"] == "breaks CUDA":
        os._exit(3)
"""


def test_rows_after_one_that_ends_its_process_are_measured(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(shapes, "WORKER", tmp_path / "worker.py")
    tasks = ["lora", "dies", "breaks CUDA", "full", "sleeps", "decode"]
    jobs = [job("litmini", task) for task in tasks]
    rows = shapes.run_tool(tmp_path, "litmini", "cpu", jobs, time.time() + 6)
    assert [row["task"] for row in rows] == tasks
    assert [row.get("failed") for row in rows] == [
        None,
        "the process ended with 1: Segmentation fault",
        None,
        None,
        "stopped: the time was over",
        "not run: the time was over",
    ]
    text = shapes.table(rows)
    assert "device pretended, torch " in text and "| tiny | sleeps | 48 | litmini |  |  |  | stopped" in text


def test_the_command_writes_rows_and_a_table(tmp_path, monkeypatch, capsys):
    """With `--device cuda`, these rows are the default."""
    monkeypatch.setattr(shapes, "run_tool", lambda place, tool, device, jobs, deadline: jobs)
    words = [
        "--device",
        "cpu",
        "--tasks",
        "[shapes]",
        "--shapes",
        "[tiny]",
        "--lengths",
        "[64]",
        "--tools",
        "[litmini]",
    ]
    words += ["--out_dir", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/benchmark.py"), run_name="__main__")
    assert ended.value.code == 0 and "| tiny | lora | 64 | litmini, compiled |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows == json.loads((tmp_path / "shapes.json").read_text())["rows"] and len(rows) == 6
    assert "| tiny | full | 64 | litmini |" in (tmp_path / "shapes.md").read_text()
    config = runpy.run_path(str(ROOT / "scripts/benchmark.py"))["BenchmarkConfig"]
    assert config(device="cuda").tasks == ["shapes"] and config().tasks == ["lora"]
    assert tuple(config().shapes) == shapes.SHAPES and tuple(config().lengths) == shapes.LENGTHS
