"""Two processes: sharded or not, they do what one does, share the memory, save together and end together."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two import ROOT, command, run_two

DATA = ROOT / "config_hub/quickstart"
TWO = ["--devices", 2, "--strategy"]


def words(tiny_dir: Path, out_dir: Path, *more: object) -> list[str]:
    fixed = ["--checkpoint_dir", tiny_dir, "--out_dir", out_dir, "--data.path", DATA / "train.jsonl"]
    fixed += ["--data.max_seq_len", 128, "--precision", "32-true", "--optim.lr", "1e-2", "--eval.samples", 0]
    fixed += ["--train.global_batch_size", 3, "--train.micro_batch_size", 1, "--train.max_steps", 4]
    return list(map(str, [*fixed, *more]))


def metrics(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


def alone(script: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["script"])
        command(script, *arguments)
    assert end.value.code == 0


def assert_same(one: Path, two: Path, file: str) -> None:
    """Losses, norms and the product of two runs agree; what they wrote as integers is equal."""
    rows = list(zip(metrics(one), metrics(two), strict=True))
    assert len(rows) == 4
    for a, b in rows:
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        for name in ("loss", "grad_norm", "val_loss"):
            assert float(b[name] or 0) == pytest.approx(float(a[name] or 0), rel=1e-5), name
    ours, theirs = load_file(one / "final" / file), load_file(two / "final" / file)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", ["finetune_full", "finetune_lora"])
def test_sharded_equals_one_process(tiny_dir, tmp_path, script):
    """Requirements 2, 22 and 24: accumulation, a step with fewer rows than ranks, samples, evaluation; and resuming."""
    common = ["--data.val_path", DATA / "heldout.jsonl", "--train.eval_every", 2, "--eval.samples", 2]
    common += ["--eval.max_new_tokens", 2, "--train.save_every", 2]
    alone(script, *words(tiny_dir, tmp_path / "one", *common))
    ended = run_two(command, script, *words(tiny_dir, tmp_path / "two", *common, *TWO, "fsdp"))
    assert [end.status for end in ended] == [0, 0], ended[0].err + ended[1].err
    assert "2 processes share the parameters" in ended[0].out and not ended[1].out
    product = "model.safetensors" if script == "finetune_full" else "adapter_model.safetensors"
    assert_same(tmp_path / "one", tmp_path / "two", product)
