"""Every family of the registry goes through the real scripts: nothing outside its file knows which one it is."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_close, ulps

import litmini
from litmini.checkpoints.config import disk_tensors
from litmini.checkpoints.hf import save_model
from litmini.models import FAMILIES, family

ROOT = Path(__file__).parents[2]
DATA = ROOT / "config_hub/quickstart"
MODULES = {name.rsplit(".", 1)[-1]: model_type for model_type, name in reversed(FAMILIES.items())}  # one type each


@pytest.fixture
def checkpoint(request, tmp_path, tokenizer_dir) -> Path:
    """The family's `tiny` preset with initial weights, as a checkpoint directory."""
    module = family(MODULES[request.param])
    model = module.Model(module.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    directory = tmp_path / "tiny"
    directory.mkdir()
    tensors = disk_tensors(module, model.config, [(n, p.detach()) for n, p in model.named_parameters()])
    save_model(directory, module.config_to_hf(model.config), tensors, tokenizer_dir)
    return directory


def run(monkeypatch, script: str, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert end.value.code == 0


@pytest.mark.parametrize("checkpoint", MODULES, indirect=True)
def test_finetune_merge_and_generate(checkpoint, tmp_path, monkeypatch, capfd):
    data = ["--data.path", DATA / "train.jsonl", "--data.max_seq_len", 128, "--train.max_steps", 2, "--eval.samples", 0]
    data += ["--train.global_batch_size", 2, "--train.micro_batch_size", 1, "--precision", "32-true", "--optim.lr", 0.1]
    run(monkeypatch, "finetune_lora", "--checkpoint_dir", checkpoint, "--out_dir", tmp_path / "lora", *data)
    run(monkeypatch, "finetune_full", "--checkpoint_dir", checkpoint, "--out_dir", tmp_path / "full", *data)
    run(monkeypatch, "finetune_qlora", "--checkpoint_dir", checkpoint, "--out_dir", tmp_path / "qlora", *data)
    packed = [*data, "--quantize.bits", 4, "--lora.rank_stabilized", "true"]
    run(monkeypatch, "finetune_dora", "--checkpoint_dir", checkpoint, "--out_dir", tmp_path / "dora", *packed)
    for name in ("qlora", "dora"):
        run(
            monkeypatch,
            "merge_adapter",
            *("--checkpoint_dir", checkpoint, "--adapter_dir", tmp_path / name / "final"),
            *("--out_dir", tmp_path / f"merged-{name}", "--dtype", "fp32"),
        )
        found = re.search(r"differ by at most (\S+),", capfd.readouterr().out)
        merged, _ = litmini.load(tmp_path / f"merged-{name}", dtype="fp32")
        with torch.no_grad():
            assert found and float(found[1]) <= ulps(scale=merged(torch.arange(3, 40)[None]).log_softmax(-1))
    adapter = tmp_path / "lora/final"
    words = [
        "--checkpoint_dir",
        checkpoint,
        "--adapter_dir",
        adapter,
        "--out_dir",
        tmp_path / "merged",
        "--dtype",
        "fp32",
    ]
    run(monkeypatch, "merge_adapter", *words)
    run(
        monkeypatch, "convert_to_hf", tmp_path / "full/final", "--out_dir", tmp_path / "hf", "--max_shard_size", "100KB"
    )
    tokens = torch.arange(3, 40)[None]
    models = [
        litmini.load(directory, chosen, dtype="fp32")[0]
        for directory, chosen in [
            (checkpoint, None),
            (checkpoint, adapter),
            (tmp_path / "merged", None),
            (tmp_path / "full/final", None),
            (tmp_path / "hf", None),
        ]
    ]
    with torch.no_grad():
        base, unmerged, merged, full, sharded = (model(tokens) for model in models)
    assert_close(merged, unmerged)
    assert all(torch.equal(a, b) for a, b in zip(models[3].parameters(), models[4].parameters(), strict=True))
    assert_close(sharded, full)  # to the bit only where tensors begin at the same multiple of bytes in their files
    assert (unmerged - base).abs().max() > 1e-3 and (full - base).abs().max() > 1e-3
    capfd.readouterr()
    for directory in (tmp_path / "merged", tmp_path / "hf"):
        words = ["--prompt", "Two mugs", "--max_new_tokens", 8, "--ignore_eos", "true", "--dtype", "fp32"]
        run(monkeypatch, "generate", "--checkpoint_dir", directory, *words)
        assert capfd.readouterr().out.strip("\n")  # any text: an untrained model may say control characters
