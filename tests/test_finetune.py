"""What the finetuning scripts do around the loop."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litmini import finetune
from litmini.checkpoint import load_model
from litmini.config import FinetuneFullConfig, FinetuneLoraConfig
from litmini.data import Example
from litmini.evaluate import answer_all, exact_match
from litmini.launch import weight_dtype
from litmini.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
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
    monkeypatch.setattr(finetune, "rehearse", lambda *words: seen.append(words[-1]["tokens"].shape[1]))
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


def test_samples_statistics_and_idle_settings_are_printed(run):
    words = ["--data.val_path", DATA / "heldout.jsonl", "--optim.warmup_steps", 100]
    status, out, _ = run("finetune_lora", "run", *words)
    assert status == 0
    assert out.count("question  ") == 2 and out.count("\nbefore    ") == 2 and out.count("\nafter     ") == 2
    assert "held-out: 50 examples" in out and "held-out loss" in out
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


def test_a_checkpoint_of_one_run_does_not_overwrite_another(run, tmp_path):
    for name in ("a", "b"):
        assert run("finetune_lora", name, "--train.save_every", 2)[0] == 0
    before = (tmp_path / "b/final/adapter_model.safetensors").read_bytes()
    status, _, error = run("finetune_lora", "b", "--train.save_every", 2, "--resume", tmp_path / "a/step-000002")
    assert status == 1 and "finished" in error and "--out_dir" in error
    assert (tmp_path / "b/final/adapter_model.safetensors").read_bytes() == before


def test_held_out_losses_are_logged_whatever_log_every(run, tmp_path):
    words = ["--data.val_path", DATA / "heldout.jsonl", "--train.log_every", 3, "--train.eval_every", 1]
    assert run("finetune_lora", "run", *words, "--eval.samples", 0)[0] == 0
    rows = [line.split(",") for line in (tmp_path / "run/metrics.csv").read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows if row[-1]] == [1, 2, 3]


def test_the_result_is_saved_before_it_is_measured(run, tmp_path, monkeypatch):
    def fail(*words):
        if words[-1] == "after":
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "measure", fail)
    assert run("finetune_lora", "run")[0] == 130
    assert (tmp_path / "run/final/adapter_model.safetensors").is_file()


def test_answers_and_exact_match(tiny_dir):
    model, tokenizer = load_model(tiny_dir, torch.float32), Tokenizer(tiny_dir)
    turns = [{"role": "user", "content": "Two mugs"}, {"role": "assistant", "content": " x "}]
    long = [{"role": "user", "content": "mugs " * 300}, {"role": "assistant", "content": "y"}]
    examples = [Example("a:1", messages=turns), Example("a:2", messages=long), Example("a:3", text="only text")]
    answers = answer_all(model, tokenizer, examples, max_new_tokens=3)
    assert sorted(a.expected for a in answers) == [" x ", "y"]
    assert next(a.given for a in answers if a.expected == "y") == ""  # longer than the context: nothing can be said
    right = [type(answers[0])("q", " x ", "x\n"), type(answers[0])("q", "x", "X")]
    assert [a.right for a in right] == [True, False] and exact_match(right) == 0.5
