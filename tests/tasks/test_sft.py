"""What the finetuning scripts do around the loop."""

import csv
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import varlen_kernel
from numerics import ulps
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import make_tiny

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import FinetuneFullConfig, FinetuneLoraConfig
from litmini.data.dataset import Example
from litmini.distributed import fabric as fabric_module
from litmini.distributed.fabric import weight_dtype
from litmini.evaluation.metrics import exact_match, predict
from litmini.files import file_hash
from litmini.ops import varlen
from litmini.runs import manifest as manifest_module
from litmini.runs.loggers import make_loggers
from litmini.runs.manifest import git_state, weights_hash
from litmini.runs.report import write_report
from litmini.tasks import measure
from litmini.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
DATA = ROOT / "config_hub/quickstart"


@pytest.fixture
def run(tiny_dir, tmp_path, monkeypatch, capfd):
    """Run a finetuning script's command line on the tiny model; returns (exit status, stdout, stderr)."""

    def command(script: str, name: str, *words: object) -> tuple[int, str, str]:
        fixed = ["--checkpoint_dir", tiny_dir, "--out_dir", tmp_path / name, "--data.max_seq_len", 256]
        fixed += ["--data.path", DATA / "train.jsonl", "--train.max_steps", 4, "--train.global_batch_size", 2]
        fixed += ["--train.micro_batch_size", 1, "--eval.max_new_tokens", 2, *words]
        monkeypatch.setattr(sys, "argv", [script, *map(str, fixed)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
        return (end.value.code, *capfd.readouterr())

    return command


def test_the_longest_batch_runs_first_where_lengths_differ(run, monkeypatch):
    """Requirement 10."""
    seen = []
    monkeypatch.setattr(measure, "memory_warmup", lambda *words: seen.append(words[-1]["tokens"].shape[1]))
    assert run("finetune_lora", "packed")[0] == 0
    assert seen == []
    assert run("finetune_lora", "unpacked", "--data.pack", "false")[0] == 0
    rows = [json.loads(line)["messages"] for line in (DATA / "train.jsonl").open()]
    assert len(seen) == 1 and 50 < seen[0] <= 256 and len(rows) == 320


def test_weights_are_trained_in_fp32_unless_asked_otherwise(run, tmp_path):
    """Requirement 17."""
    assert FinetuneFullConfig.precision == "bf16-mixed" and FinetuneLoraConfig.precision == "bf16-true"
    dtypes = {name: weight_dtype(name) for name in ("32-true", "bf16-mixed", "bf16-true")}
    assert list(dtypes.values()) == [torch.float32, torch.float32, torch.bfloat16]
    status, out, _ = run("finetune_full", "default", "--train.save_every", 4, "--eval.samples", 0)
    assert status == 0 and "warning: weights in bf16" not in out
    state = load_file(tmp_path / "default/step-000004/training_state.safetensors")
    assert {t.dtype for name, t in state.items() if name.startswith("parameter/")} == {torch.float32}
    status, out, _ = run("finetune_full", "rounded", "--precision", "bf16-true", "--eval.samples", 0)
    assert status == 0 and "warning: weights in bf16 lose small updates" in out


def test_a_run_on_a_cpu_keeps_its_memory(run, monkeypatch):
    calls = []
    monkeypatch.setattr("litmini.distributed.fabric.keep_memory", lambda: calls.append(torch.cuda.is_available()))
    assert run("finetune_lora", "run", "--eval.samples", 0)[0] == 0
    assert calls == ([] if torch.cuda.is_available() else [False])


def test_the_attention_kernel_is_printed_used_and_recorded(run, tmp_path, monkeypatch):
    """As on a GPU where the user asks for it: in training and in evaluation, through the stand-in of the operator."""
    plain = fabric_module.make_fabric

    def make_fabric(config):
        config.attention = "auto"  # what is asked for is refused on a CPU
        fabric = plain(config)
        config.attention = "varlen"
        return fabric

    words = ("--precision", "32-true", "--eval.samples", 0, "--data.val_path", DATA / "heldout.jsonl")
    status, out, _ = run("finetune_lora", "cpu", *words)
    assert status == 0 and "attention: documents\n" in out
    monkeypatch.setattr(fabric_module, "make_fabric", make_fabric)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    varlen_kernel.calls.clear()
    status, out, _ = run("finetune_lora", "run", *words)
    assert status == 0 and "attention: varlen\n" in out
    trained = 1 + 4 * 2  # forward passes: to find the kernel, and 4 steps of 2 micro-batches
    assert len(varlen_kernel.calls) > 2 * trained  # in two layers, and in validation
    results = [json.loads((tmp_path / name / "manifest.json").read_text())["results"] for name in ("cpu", "run")]
    assert [r["attention"] for r in results] == ["documents", "varlen"]
    assert results[1]["val_loss_after"] == pytest.approx(results[0]["val_loss_after"], rel=ulps(64))


def make_tiny_in_bf16(directory: Path, tokenizer_dir: Path) -> Path:
    tensors = load_file(make_tiny(directory, tokenizer_dir) / "model.safetensors")
    save_file({k: t.bfloat16() for k, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_full_finetuning_in_bf16_learns_what_it_does_in_fp32(run, tmp_path, tokenizer_dir):
    """Requirement 17: products in bf16 of weights in fp32 see every small update; of weights out of bf16, one in three."""
    base, data, learned = make_tiny_in_bf16(tmp_path / "base", tokenizer_dir), tmp_path / "data.jsonl", {}
    data.write_text("".join((DATA / "train.jsonl").open().readlines()[:4]))  # the same in each step
    words = ["--checkpoint_dir", base, "--data.path", data, "--data.train_on", "all", "--data.pack", "false"]
    words += [
        "--optim.lr",
        2e-6,
        "--optim.schedule",
        "constant",
        "--train.max_steps",
        6,
        "--train.global_batch_size",
        4,
    ]
    for precision in ("bf16-mixed", "32-true"):
        assert run("finetune_full", precision, *words, "--precision", precision, "--eval.samples", 0)[0] == 0
        with (tmp_path / precision / "metrics.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
        learned[precision] = losses[0] - losses[-1]
    assert learned["bf16-mixed"] == pytest.approx(learned["32-true"], rel=0.2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_what_is_trained_beside_adapters_is_dithered(run, tokenizer_dir, tmp_path, method, precision):
    """Trained at a rate that moves nothing: what is left is where the weights started."""
    base = make_tiny_in_bf16(tmp_path / "base", tokenizer_dir)
    words = ["--lora.modules_to_save", "[lm_head]", "--optim.lr", 1e-20, "--eval.samples", 0, "--precision", precision]
    assert run(f"finetune_{method}", "run", "--checkpoint_dir", base, *words)[0] == 0
    saved = load_file(tmp_path / "run/final/adapter_model.safetensors")
    head, start = saved["base_model.model.lm_head.weight"], load_model(base, torch.bfloat16).lm_head.weight
    assert head.dtype == torch.float32 and torch.equal(head.bfloat16(), start)
    assert (head != start).float().mean() > 0.99


def test_samples_statistics_and_ineffective_settings_are_printed(run):
    words = ["--data.val_path", DATA / "heldout.jsonl", "--optim.warmup_steps", 100]
    status, out, _ = run("finetune_lora", "run", *words)
    assert status == 0
    assert out.count("prompt     ") == 2 and out.count("\nbefore     ") == 2 and out.count("\nafter      ") == 2
    assert "validation: 50 examples" in out and "validation loss" in out
    assert "optim.warmup_steps beyond the 4 steps" in out
    assert "eval.exact_match" in run("finetune_lora", "other", "--eval.exact_match")[1]


def test_resuming_with_other_data_or_template_is_refused(run, tmp_path):
    data, template = tmp_path / "data.jsonl", tmp_path / "template.jinja"
    data.write_text((DATA / "train.jsonl").read_text())
    template.write_text("{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
                        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}")  # fmt: skip
    words = ["--data.path", data, "--data.chat_template", template, "--train.save_every", 2]
    assert run("finetune_lora", "run", *words)[0] == 0
    for file in (tmp_path / "run/final").iterdir():
        file.unlink()
    (tmp_path / "run/final").rmdir()
    template.write_text(template.read_text() + "\n")
    status, _, error = run("finetune_lora", "run", *words, "--resume", "auto")
    assert status == 1 and "the chat template was changed" in error
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    status, _, error = run("finetune_lora", "run", *words, "--resume", "auto")
    assert status == 1 and "data.jsonl was changed since the run began" in error


def test_resuming_on_another_cpu_is_noted(run, tmp_path):
    """Bits are promised with one instruction set and one number of threads."""
    words = ["--train.save_every", 2]
    assert "not bit-identical" not in run("finetune_lora", "run", *words)[1]
    for then in ("as now", 64):
        shutil.rmtree(tmp_path / "run/final")
        shutil.rmtree(tmp_path / "run/step-000004")
        file = tmp_path / "run/manifest.json"
        manifest = json.loads(file.read_text())
        assert manifest["hardware"].keys() >= {"instruction_set", "threads"}
        if then == 64:
            manifest["hardware"]["threads"] = then
        file.write_text(json.dumps(manifest))
        status, out, error = run("finetune_lora", "run", *words, "--resume", "auto")
        assert status == 0, error
        assert ("threads: 64 -> " in out and "not bit-identical" in out) == (then == 64)


def test_a_checkpoint_of_one_run_does_not_overwrite_another(run, tmp_path):
    for name in ("a", "b"):
        assert run("finetune_lora", name, "--train.save_every", 2)[0] == 0
    before = (tmp_path / "b/final/adapter_model.safetensors").read_bytes()
    status, _, error = run("finetune_lora", "b", "--train.save_every", 2, "--resume", tmp_path / "a/step-000002")
    assert status == 1 and "finished" in error and "--out_dir" in error
    assert (tmp_path / "b/final/adapter_model.safetensors").read_bytes() == before


def test_validation_losses_are_logged_whatever_log_every(run, tmp_path):
    words = ["--data.val_path", DATA / "heldout.jsonl", "--train.log_every", 3, "--train.eval_every", 1]
    assert run("finetune_lora", "run", *words, "--eval.samples", 0)[0] == 0
    rows = [line.split(",") for line in (tmp_path / "run/metrics.csv").read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows if row[-1]] == [1, 2, 3]


def test_the_result_is_saved_before_it_is_measured(run, tmp_path, monkeypatch):
    def fail(*words):
        if words[-1] == "after":
            raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", fail)
    assert run("finetune_lora", "run")[0] == 130
    assert (tmp_path / "run/final/adapter_model.safetensors").is_file()


def test_completions_and_exact_match(tiny_dir):
    model, tokenizer = load_model(tiny_dir, torch.float32), Tokenizer(tiny_dir)
    turns = [{"role": "user", "content": "Two mugs"}, {"role": "assistant", "content": " x "}]
    long = [{"role": "user", "content": "mugs " * 300}, {"role": "assistant", "content": "y"}]
    examples = [Example("a:1", messages=turns), Example("a:2", messages=long), Example("a:3", text="only text")]
    answers = predict(model, tokenizer, examples, max_new_tokens=3)
    assert sorted(a.reference for a in answers) == [" x ", "y"]
    assert (
        next(a.prediction for a in answers if a.reference == "y") == ""
    )  # longer than the context: nothing can be said
    right = [type(answers[0])("q", " x ", "x\n"), type(answers[0])("q", "x", "X")]
    assert [a.correct for a in right] == [True, False] and exact_match(right) == 0.5


LOGGED = ["--data.val_path", DATA / "heldout.jsonl", "--train.eval_every", 2, "--train.save_every", 2]


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory):
    """A run with all that one can look at: samples on the way, TensorBoard, a report; and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "logged"
    words = [*LOGGED, "--train.sample_every", 2, "--loggers", "[tensorboard]", "--checkpoint_dir", tiny_dir]
    words += [
        "--out_dir",
        directory,
        "--data.path",
        DATA / "train.jsonl",
        "--data.max_seq_len",
        256,
        "--train.max_steps",
        4,
    ]
    words += ["--train.global_batch_size", 2, "--train.micro_batch_size", 1, "--eval.max_new_tokens", 2]
    command = [sys.executable, ROOT / "scripts/finetune_lora.py", *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


@pytest.fixture
def logged(finished, tmp_path):
    """That run's directory, to do with as one likes."""
    return shutil.copytree(finished[0], tmp_path / "logged")


def rows_of(directory, *but):
    with (directory / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in but} for row in csv.DictReader(file)]


def test_a_run_one_can_look_at(run, finished, logged, tmp_path):
    directory, out = logged, finished[1]
    rows = rows_of(directory)
    for row in rows:
        assert float(row["mfu"]) > 0 and float(row["memory_mib"]) > 100 and float(row["grad_norm"]) > 0
    assert "MFU is relative to" in out and "TFLOP/s, measured with a matmul of" in out
    assert re.search(
        r"step 4 of 4: loss [\d.]+, lr [\d.e-]+, norm [\d.]+, [\d,]+ tok/s, MFU \d+%, [\d,]+ MiB, 00:00 left", out
    )
    samples = [json.loads(line) for line in (directory / "samples.jsonl").open()]
    assert [row["step"] for row in samples] == [2, 2, 4, 4]
    assert [row["prompt"] for row in samples[:2]] == [row["prompt"] for row in samples[2:]]
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "grad_norm", "val_loss"):
        there = [(str(e.step), pytest.approx(e.value)) for e in events.Scalars(name)]
        assert there == [(row["step"], float(row[name])) for row in rows if row[name]], name
    # going on after a kill: the steps that are done again stand there once, and sampling has changed nothing
    shutil.rmtree(directory / "final")
    shutil.rmtree(directory / "step-000004")
    words = ["--train.sample_every", 2, "--loggers", "[tensorboard]", "--resume", "auto"]
    assert run("finetune_lora", "logged", *LOGGED, *words)[0] == 0
    samples = [json.loads(line) for line in (directory / "samples.jsonl").open()]
    assert [row["step"] for row in samples] == [2, 2, 4, 4]
    moody = ("tokens_per_second", "mfu", "memory_mib")
    assert run("finetune_lora", "plain", *LOGGED)[0] == 0
    assert rows_of(directory, *moody) == rows_of(tmp_path / "plain", *moody)
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize("missing", ["wandb", "lightning"])
def test_a_logger_without_its_package_says_what_to_install(run, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, error = run("finetune_lora", "x", "--loggers", "[wandb]")
    assert status == 1 and 'pip install "litmini[wandb]"' in error and not (tmp_path / "x").exists()


def test_wandb_offline(tmp_path, monkeypatch):
    """What a logger is given ends in W&B's own file, under an id that the run keeps; nothing is sent."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (logger,) = make_loggers(["wandb"], tmp_path, 0)
    logger.log_hyperparams({"optim.lr": 0.125})
    logger.log_metrics({"loss": 1.5}, step=1)
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.stem == f"run-{(tmp_path / 'wandb_id').read_text()}"
    deadline, content = time.monotonic() + 30, b""
    while b"loss" not in content and time.monotonic() < deadline:  # its own process writes it
        time.sleep(0.1)
        content = file.read_bytes()
    assert b"loss" in content and b"1.5" in content and b"0.125" in content


class Page(HTMLParser):
    """Text, and every attribute that could fetch something."""

    def __init__(self, html):
        super().__init__()
        self.text, self.links, self.tags = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data") and not v.startswith("#")]

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_file_that_says_it_all(logged):
    directory = logged
    html = (directory / "report.html").read_text()
    page = Page(html)
    assert page.links == [] and "url(http" not in html and "@import" not in html and "script" not in page.tags
    assert page.tags.count("svg") == 5 and "validation" in page.text and "gradient norm" in page.text
    manifest = json.loads((directory / "manifest.json").read_text())
    before, after = (manifest["results"][f"samples_{when}"] for when in ("before", "after"))
    for sample in (*before, *after):
        assert sample["prompt"] in page.text and sample["reference"] in page.text and sample["prediction"] in page.text
    for line in (directory / "config.yaml").read_text().splitlines():
        assert line in page.text
    assert manifest["chat_template_sha256"] in page.text and f"{manifest['statistics']['tokens']:,}" in page.text
    assert "step 2" in page.text, "what was said on the way"


def test_what_a_model_says_cannot_change_the_report(logged):
    directory = logged
    manifest = json.loads((directory / "manifest.json").read_text())
    evil = "</dd><script>alert(1)</script>"
    for when in ("before", "after"):
        manifest["results"][f"samples_{when}"] = [{"question": evil, "expected": evil, "given": evil}]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    write_report(directory, np.array([3, 4]), 8)
    page = Page((directory / "report.html").read_text())
    assert "script" not in page.tags and page.text.count(evil) >= 4


def test_manifests_say_what_each_checkpoint_was_made_of(logged, tiny_dir):
    directory = logged
    run_, step, final = (
        json.loads((directory / d / "manifest.json").read_text()) for d in ("", "step-000002", "final")
    )
    assert step["progress"]["step"] == 2 and step["progress"]["tokens"] < final["results"]["tokens"]
    rows = rows_of(directory)
    assert step["progress"]["tokens"] == int(rows[1]["tokens"]) and final["results"]["tokens"] == int(rows[3]["tokens"])
    for manifest in (run_, step, final):
        assert manifest["data"][str(DATA / "train.jsonl")]["sha256"] == file_hash(DATA / "train.jsonl")
        assert manifest["data"][str(DATA / "heldout.jsonl")]["sha256"] == file_hash(DATA / "heldout.jsonl")
        assert manifest["versions"]["torch"] == torch.__version__ and manifest["seed"] == 1337
        assert manifest["base"]["weights_sha256"] == weights_hash(tiny_dir)
        template = (tiny_dir / "chat_template.jinja").read_bytes()
        assert manifest["chat_template_sha256"] == hashlib.sha256(template).hexdigest()
        assert set(manifest["git"] or {}) in ({"commit", "changed"}, set())


def test_git_state(tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], [*name, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and not state["changed"]
    (tmp_path / "new").touch()
    assert git_state(tmp_path) == {**state, "changed": True}


def test_weights_that_were_changed_at_the_same_path_are_noticed(run, tiny_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_dir, base)
    words = ["--checkpoint_dir", base, "--train.save_every", 2]
    assert run("finetune_lora", "run", *words)[0] == 0
    shutil.rmtree(tmp_path / "run/final")
    tensors = load_file(base / "model.safetensors")
    save_file({name: t + 1e-3 for name, t in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    status, _, error = run("finetune_lora", "run", *words, "--resume", "auto")
    assert status == 1 and "the base model's weights were changed since the run began" in error


def test_the_hash_of_large_files_samples_them(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "SAMPLE", 8)
    monkeypatch.setattr(manifest_module, "SAMPLES", 4)
    content = bytearray(range(100))
    hashes = set()
    for at in (None, 0, 99, 40):
        changed = bytearray(content)
        if at is not None:
            changed[at] ^= 1
        (tmp_path / "a.safetensors").write_bytes(changed)
        hashes.add(weights_hash(tmp_path))
    assert len(hashes) == 4 - 1, "40 lies between two samples; beginning and end are always seen"
    (tmp_path / "a.safetensors").write_bytes(content + b"x")
    assert weights_hash(tmp_path) not in hashes
