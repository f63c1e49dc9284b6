"""Training on: from an adapter, merged or continued; a run that is finished, or has other settings."""

import csv
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from numerics import assert_close
from preference_parts import write_pairs
from safetensors.torch import load_file

import litmini
from litmini.files import read_json

ROOT = Path(__file__).parents[2]
TOKENS = torch.tensor([[5, 300, 17, 17, 260, 511, 4, 99]])


@pytest.fixture
def run(tiny_dir, tmp_path, monkeypatch, capfd):
    """Run a finetuning script for 2 steps in fp32; returns (exit status, stdout, stderr)."""

    def command(name: str, *words: object, script: str = "finetune_lora") -> tuple[int, str, str]:
        fixed = [
            "--checkpoint_dir",
            tiny_dir,
            "--out_dir",
            tmp_path / name,
            "--precision",
            "32-true",
            "--eval.samples",
            0,
        ]
        fixed += ["--data.path", ROOT / "config_hub/quickstart/train.jsonl", "--data.max_seq_len", 128]
        fixed += ["--train.global_batch_size", 2, "--optim.lr", 1e-2, "--optim.schedule", "constant"]
        fixed += [] if "--train.epochs" in words else ["--train.max_steps", 2]
        monkeypatch.setattr(sys, "argv", [script, *map(str, [*fixed, *words])])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"scripts/{script}.py"), run_name="__main__")
        return (end.value.code, *capfd.readouterr())

    return command


def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    model, _ = litmini.load(base, adapter, dtype="fp32")
    with torch.no_grad():
        return model(TOKENS)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "final/adapter_model.safetensors")


@pytest.mark.parametrize("script", ["finetune_lora", "finetune_dora", "finetune_ia3", "finetune_qlora"])
def test_an_adapter_is_trained_further(run, tmp_path, script):
    """At first it is what it was; its rank is its own; what is trained is the adapter alone."""
    own = [] if script == "finetune_ia3" else ["--lora.rank", 4]
    assert run("first", *own, script=script)[0] == 0
    start = ["--adapter_dir", tmp_path / "first/final"]
    assert run("still", *start, "--optim.lr", 0, script=script)[0] == 0
    before, still = tensors(tmp_path / "first"), tensors(tmp_path / "still")
    assert before.keys() == still.keys() and all(torch.equal(before[name], still[name]) for name in before)
    status, out, _ = run("second", *start, *own, script=script)
    assert ("warning: ineffective settings: lora.rank\n" in out) == bool(own)
    after = tensors(tmp_path / "second")
    assert status == 0 and any(not torch.equal(before[name], after[name]) for name in before)
    trained = read_json(tmp_path / "second/manifest.json")["results"]["trained_parameters"]
    assert trained == sum(t.numel() for t in before.values())
    assert "continued from" in read_json(tmp_path / "second/manifest.json")["method"]


def test_training_further_is_what_one_longer_run_does_without_momentum(run, tmp_path, tiny_dir):
    """SGD has no state: two steps, and two more on the same data from the adapter, are a run that repeats them."""
    plain = ["--optim.name", "sgd", "--optim.max_grad_norm", "null"]
    assert run("a", *plain)[0] == 0
    assert run("b", *plain, "--adapter_dir", tmp_path / "a/final", "--lora.dropout", 0.5)[0] == 0
    assert run("c", *plain, "--adapter_dir", tmp_path / "a/final")[0] == 0
    b, c = tensors(tmp_path / "b"), tensors(tmp_path / "c")
    assert any(not torch.equal(b[name], c[name]) for name in b)  # dropout is that of the settings
    assert read_json(tmp_path / "b/final/adapter_config.json")["lora_dropout"] == 0.5
    assert (logits(tiny_dir, tmp_path / "c/final") - logits(tiny_dir, tmp_path / "a/final")).abs().max() > 1e-3


def test_an_adapter_is_merged_into_the_base_first(run, tmp_path, tiny_dir):
    assert run("first")[0] == 0
    words = ["--adapter_dir", tmp_path / "first/final", "--adapter_start", "merge", "--train.save_every", 1]
    assert run("second", *words, "--dry_run")[0] == 0 and not (tmp_path / "second").exists()
    assert run("second", *words)[0] == 0
    base, final = tmp_path / "second/base", tmp_path / "second/final"
    assert_close(logits(base), logits(tiny_dir, tmp_path / "first/final"))
    assert read_json(final / "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert (logits(base, final) - logits(base)).abs().max() > 1e-3
    assert "with its adapter merged in" in (base / "README.md").read_text()
    # resumed in another directory, it merges again, to the same bits
    assert run("third", *words, "--resume", tmp_path / "second/step-000001")[0] == 0
    second, third = tensors(tmp_path / "second"), tensors(tmp_path / "third")
    assert all(torch.equal(second[name], third[name]) for name in second)
    (base / "merged.json").write_text("{}")
    status, _, error = run("second", *words, "--resume", "auto", "--resume_changed", "true")
    assert status == 1 and "is not this base with this adapter" in error


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "script",
    ["finetune_preference", "finetune_reward", "finetune_classifier", "finetune_grpo", "finetune_distill"],
)
def test_other_objectives_start_from_a_merged_adapter(run, tmp_path, tiny_dir, script, adapters):
    assert run("first")[0] == 0
    data = tmp_path / "data.jsonl"
    if script == "finetune_classifier":
        data.write_text("".join(f'{{"text": "text {n}", "label": "{"ab"[n % 2]}"}}\n' for n in range(8)))
    else:
        write_pairs(data)
    words = ["--data.path", data, "--adapter_dir", tmp_path / "first/final", *([] if adapters else ["--lora", "null"])]
    if script == "finetune_grpo":
        words += ["--rewards.functions", "[length]", "--grpo.num_generations", 2, "--grpo.max_completion_length", 4]
    if script == "finetune_distill":
        words[1] = ROOT / "config_hub/quickstart/heldout.jsonl"
        words += ["--distill.teacher_dir", tiny_dir]
    status, _, error = run("second", *words, "--dry_run", script=script)
    assert status == 0 and not (tmp_path / "second").exists(), error
    if script == "finetune_preference":  # its reference, which is kept on disk, must not serve the next run
        assert run("before", "--data.path", data, "--lora", "null", script=script)[0] == 0
    status, out, error = run("second", *words, "--train.save_every", 1, script=script)
    assert status == 0, error
    base, final = tmp_path / "second/base", tmp_path / "second/final"
    assert_close(logits(base), logits(tiny_dir, tmp_path / "first/final"))
    if script == "finetune_preference":  # the reference is what the first run has made
        with (tmp_path / "second/metrics.csv").open() as file:
            assert float(next(csv.DictReader(file))["loss"]) == pytest.approx(math.log(2), rel=1e-6)
    elif adapters and script not in ("finetune_grpo", "finetune_distill"):
        assert f"--checkpoint_dir {base} --adapter_dir {final}" in out
    if adapters:
        assert read_json(final / "adapter_config.json")["base_model_name_or_path"] == str(base)
    status, _, error = run("third", *words, "--resume", tmp_path / "second/step-000001", script=script)
    assert status == 0, error
    name = "adapter_model.safetensors" if adapters else "model.safetensors"
    second, third = (load_file(tmp_path / run_name / "final" / name) for run_name in ("second", "third"))
    assert all(torch.equal(second[key], third[key]) for key in second)


def test_preferences_refuse_what_gives_scores(run, tmp_path):
    data = write_pairs(tmp_path / "data.jsonl")
    assert run("scores", "--data.path", data, script="finetune_reward")[0] == 0
    words = ["--data.path", data, "--adapter_dir", tmp_path / "scores/final"]
    status, _, error = run("second", *words, script="finetune_preference")
    assert status == 1 and "is a classifier or a reward model" in error and not (tmp_path / "second/final").exists()


def test_an_adapter_with_new_tokens_is_trained_further(run, tmp_path):
    """On data that has them; they are read from the adapter, and their rows are trained on."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Where is <|city|>?", "completion": "<|city|> is here."}\n' * 4)
    words = ["--data.path", data, "--data.max_dropped", 1]
    assert run("first", *words, "--data.new_tokens", '["<|city|>"]')[0] == 0
    again = [*words, "--adapter_dir", tmp_path / "first/final"]
    status, _, error = run("second", *again)
    assert status == 0, error
    before, after = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    rows = [name for name in before if "token_adapter" in name]
    assert rows and not any(torch.equal(before[name], after[name]) for name in rows)
    merged = ["--adapter_start", "merge"]
    shown = [run("merged", *again, *more, "--show_masks", 1)[1].partition("parameters")[0] for more in ([], merged)]
    tokens = [re.sub(r"[\d,]+ of [\d,]+ $", "", text) for text in shown]
    assert tokens[0] == tokens[1] and "<|city|>" in tokens[0]
    status, _, error = run("third", *again, "--data.new_tokens", '["<|other|>"]')
    assert status == 2 and "data.new_tokens needs a new adapter" in error


def test_what_does_not_go(run, tmp_path):
    assert run("first")[0] == 0
    status, _, error = run("x", "--adapter_dir", tmp_path / "first/final", script="finetune_ia3")
    assert status == 1 and "an adapter of LoRA, and this script trains IA3: take scripts/finetune_lora.py" in error
    assert run("x", "--adapter_start", "merge")[0] == 2


def test_settings_change_if_that_is_asked_for(run, tmp_path):
    save = ["--train.save_every", 1, "--train.max_steps", 3]
    assert run("run", *save)[0] == 0
    step = ["--resume", tmp_path / "run/step-000002"]
    status, _, error = run("other", *save, *step, "--optim.lr", 1e-3)
    assert status == 1 and "optim.lr: 0.01 -> 0.001\n" in error and "--resume_changed true" in error
    status, _, error = run("other", *save, *step, "--resume_changed", "true", "--lora.rank", 8, "--seed", 2)
    assert status == 1 and "lora.rank" in error and "seed" in error and "Start another run" in error
    status, out, _ = run("other", *save, *step, "--resume_changed", "true", "--optim.lr", 0)
    assert status == 0 and "note: other settings from here on" in out
    manifest = read_json(tmp_path / "other/manifest.json")
    assert manifest["bit_identical"] is False
    assert manifest["changed"] == [{"after_step": 2, "settings": ["optim.lr: 0.01 -> 0.0"]}]
    kept = load_file(tmp_path / "run/step-000002/adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors(tmp_path / "other").items())
    settings = yaml.safe_load((tmp_path / "other/config.yaml").read_text())
    assert settings["optim"]["lr"] == 0 and settings["resume_changed"] is False
    assert "bit_identical" not in read_json(tmp_path / "run/manifest.json")


def test_a_finished_run_goes_on(run, tmp_path):
    assert run("run", "--train.save_every", 2)[0] == 0
    status, _, error = run("run", "--train.save_every", 2, "--resume", "auto")
    assert status == 1 and "is finished" in error and "--resume_changed true" in error and "--adapter_dir" in error
    words = ["--train.save_every", 2, "--resume", "auto", "--resume_changed", "true"]
    status, out, _ = run("run", *words, "--train.max_steps", 4)
    assert status == 0 and "after step 2" in out
    manifest = read_json(tmp_path / "run/manifest.json")
    assert manifest["results"]["steps"] == 4
    assert manifest["changed"] == [{"after_step": 2, "settings": ["train.max_steps: 2 -> 4"]}]
    assert run("long", "--train.max_steps", 4)[0] == 0  # with a constant learning rate, it is the same
    longer, once = tensors(tmp_path / "run"), tensors(tmp_path / "long")
    assert all(torch.equal(longer[name], once[name]) for name in once)
    # without a checkpoint there is the result only
    assert run("bare")[0] == 0
    status, _, error = run("bare", "--resume", "auto", "--resume_changed", "true", "--train.max_steps", 4)
    assert status == 1 and f"--adapter_dir {tmp_path / 'bare/final'}" in error and "Or train on from" not in error


def test_the_manifest_has_date_machine_and_method(run, tmp_path):
    assert run("run")[0] == 0
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["date"][:2] == "20" and manifest["hardware"]["cores"] >= 1 and manifest["hardware"]["name"]
    assert manifest["method"] == "LoRA, rank 16, alpha 32, all-linear"
