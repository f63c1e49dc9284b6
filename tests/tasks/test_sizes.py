"""The sizes of sequences and steps: those that a run chooses for small data, and what it says of them."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from litmini.files import read_json

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "config_hub/quickstart/train.jsonl"


@pytest.fixture
def run(tiny_dir, tmp_path, monkeypatch, capfd):
    """Run finetune_lora.py without sizes; returns (exit status, stdout, stderr)."""

    def command(name: str, *words: object) -> tuple[int, str, str]:
        fixed = ["--checkpoint_dir", tiny_dir, "--out_dir", tmp_path / name, "--data.path", TRAIN, "--eval.samples", 0]
        monkeypatch.setattr(sys, "argv", ["finetune_lora", *map(str, [*fixed, *words])])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts/finetune_lora.py"), run_name="__main__")
        return (end.value.code, *capfd.readouterr())

    return command


def settings(directory: Path) -> dict:
    return yaml.safe_load((directory / "config.yaml").read_text())


def test_small_data_has_steps_of_eight_examples(run, tmp_path):
    status, out, _ = run("run", "--data.val_fraction", 0.05)
    assert status == 0 and "warning" not in out
    steps, each = re.search(
        r"(\d+) steps of 3 sequences of \d+ tokens, about (\d+) examples, .*: 1.00 epochs", out
    ).groups()
    assert int(each) in (8, 9) and 0.9 * 304 / 8 <= int(steps) <= 1.1 * 304 / 8
    assert read_json(tmp_path / "run/manifest.json")["results"]["steps"] == int(steps)
    chosen = settings(tmp_path / "run")
    assert chosen["train"]["global_batch_size"] == chosen["train"]["micro_batch_size"] == 3
    assert chosen["data"]["max_seq_len"] == 256  # the context of the tiny model


def test_what_is_chosen_repeats_and_resumes_the_run(run, tmp_path):
    assert run("first", "--train.save_every", 20, "--data.val_fraction", 0.05)[0] == 0
    config = tmp_path / "first/config.yaml"
    assert run("again", "--config", config, "--out_dir", tmp_path / "again")[0] == 0
    resumed = ["--train.save_every", 20, "--data.val_fraction", 0.05, "--resume", tmp_path / "first/step-000020"]
    assert run("resumed", *resumed)[0] == 0
    files = [
        (tmp_path / name / "final/adapter_model.safetensors").read_bytes() for name in ("first", "again", "resumed")
    ]
    assert files[0] == files[1] == files[2]
    assert settings(tmp_path / "resumed")["data"] == settings(tmp_path / "first")["data"]


def test_sizes_that_are_given_are_kept(run, tmp_path):
    words = ["--train.global_batch_size", 16, "--data.max_seq_len", 256, "--train.max_steps", 2]
    assert run("run", *words)[0] == 0
    config = settings(tmp_path / "run")
    assert (config["train"]["global_batch_size"], config["train"]["micro_batch_size"]) == (16, 4)
    assert config["data"]["max_seq_len"] == 256


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--train.global_batch_size", 16],
            "lower --train.global_batch_size (now 16), or raise --train.epochs (now 1)",
        ),
        (
            ["--data.pack", "false", "--train.epochs", 0.5],
            "20 steps will teach the model little: lower --train.global_b",
        ),
        (["--train.epochs", 0.5], "lower --train.global_batch_size (now 3), or raise --train.epochs (now 0.5)"),
    ],
)
def test_few_steps_are_a_warning_that_names_the_setting(run, words, expected):
    status, out, _ = run("run", *words, "--dry_run")
    assert status == 0 and re.search(r"warning: \d+ steps? will teach the model little: ", out) and expected in out


def test_asked_for_steps_are_no_warning(run):
    assert "warning" not in run("run", "--train.max_steps", 3, "--dry_run")[1]


def test_the_line_of_steps_is_true_for_a_tiny_file(run, tmp_path):
    data = tmp_path / "ten.jsonl"
    data.write_text("".join(TRAIN.open().readlines()[:3]))
    status, out, _ = run("run", "--data.path", data, "--train.global_batch_size", 16, "--dry_run")
    tokens = int(re.search(r"3 examples, (\d+) tokens", out)[1])
    length = int(re.search(r"1 step of 1 sequence of (\d+) tokens, about 3 examples", out)[1])
    assert status == 0 and tokens <= length < tokens + 8


def test_the_default_length_is_within_the_context(run, tiny_dir, tmp_path):
    short = tmp_path / "short"
    short.mkdir()
    for file in tiny_dir.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    raw = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 300}))
    assert run("fits", "--checkpoint_dir", short, "--train.global_batch_size", 2, "--train.max_steps", 1)[0] == 0
    assert settings(tmp_path / "fits")["data"]["max_seq_len"] == 300
    status, _, error = run("long", "--checkpoint_dir", short, "--data.max_seq_len", 301)
    assert status == 1 and "context 300 tokens: use --data.max_seq_len 300 or less" in error


def test_a_step_in_the_backward_pass_is_one_micro_batch(run, tmp_path):
    words = ["--data.pack", "false", "--optim.in_backward", "true", "--optim.max_grad_norm", "null"]
    assert run("run", *words, "--train.max_steps", 1)[0] == 0
    assert settings(tmp_path / "run")["train"]["global_batch_size"] == 4


def test_each_device_has_its_examples():
    """As long examples as fill a sequence are a sequence each."""
    from types import SimpleNamespace

    import numpy as np

    from litmini.config.finetune import DataConfig
    from litmini.config.training import OptimConfig, TrainConfig
    from litmini.tasks.plan import choose_sizes

    def chosen(size: int, devices: int = 1) -> tuple[int, int, int]:
        config = SimpleNamespace(
            data=DataConfig(""), train=TrainConfig(), optim=OptimConfig(), devices=devices, num_nodes=1
        )
        examples = SimpleNamespace(table=np.array([(size,)] * 50, [("size", np.int64)]), lengths_per_sequence=1)
        batch = choose_sizes(config, examples, None)
        return batch, config.train.micro_batch_size, config.data.max_seq_len

    assert chosen(100) == (1, 1, 800) and chosen(100, devices=4) == (4, 1, 800)
    assert chosen(2048) == (8, 4, 2048) and chosen(1000) == (4, 4, 2048)
