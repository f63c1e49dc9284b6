"""verify.py: every check passes on what is right, and fails on what is not."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_export import make_adapter

import litmini
import litmini.evaluation.verify
import litmini.training.setup
from litmini.checkpoints.config import disk_tensors
from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model, save_model
from litmini.checkpoints.safetensors_io import shards
from litmini.config.training import OptimConfig
from litmini.errors import UserError
from litmini.evaluation.verify import CHECKS, check_accumulation, check_bits, sequences
from litmini.methods.lora import LoRALinear
from litmini.models import family, gpt2
from litmini.ops.kv_cache import LayerCache
from litmini.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import verify  # the script

SCRIPT = Path(verify.__file__)


def tiny(name: str, tokenizer_dir: Path, directory: Path) -> Path:
    module = family(name)
    model = module.Model(module.PRESETS["tiny"])
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.1, generator)
    directory.mkdir()
    tensors = ((n, p.detach()) for n, p in model.named_parameters())
    config = module.config_to_hf(model.config)
    save_model(directory, config, disk_tensors(module, model.config, tensors), side_files=tokenizer_dir)
    return directory


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral", "phi3"])
def test_what_is_right_passes(name: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = tiny(name, tokenizer_dir, tmp_path / "tiny")
    model = load_model(directory, torch.float32)
    tokens = sequences(Tokenizer(directory), model, "cpu")
    before = model(tokens)
    results = [check_bits(directory), *(check(model, tokens) for check in CHECKS)]
    assert all(result.passed for result in results), results
    assert torch.equal(model(tokens), before)


def broken_update(self, *args):
    keys, values = original_update(self, *args)
    return keys.flip(2), values  # keys of other tokens


original_update, original_merged = LayerCache.update, LoRALinear.merged_weight


@pytest.mark.parametrize(
    ("check", "target", "broken"),
    [
        ("check_cache", "litmini.ops.kv_cache.LayerCache.update", broken_update),
        ("check_packing", "litmini.models.llama.make_mask", None),
        ("check_merge", "litmini.methods.lora.LoRALinear.merged_weight", lambda self: original_merged(self) * 1.001),
        ("check_accumulation", "litmini.training.objective.LanguageModeling.count", lambda self, batch: 2),
        (
            "check_resume",
            "litmini.evaluation.verify.load_state",
            lambda directory, model, optimizer: litmini.training.setup.Progress(1),
        ),
    ],
)
def test_what_is_wrong_fails(check: str, target: str, broken, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_dir, torch.float32)
    tokens = sequences(Tokenizer(tiny_dir), model, "cpu")
    if broken is None:  # documents are forgotten
        from litmini.ops.attention import make_mask

        def broken(positions, documents, cache, window):
            order = torch.arange(positions.shape[1]).expand_as(positions)
            return make_mask(order, None, cache, window)

    monkeypatch.setattr(target, broken)
    result = getattr(litmini.evaluation.verify, check)(model, tokens)
    assert result.passed is False, result


def test_bits_that_change(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_bits(tiny_dir).passed
    monkeypatch.setattr(
        litmini.evaluation.verify, "disk_tensors", lambda m, c, tensors: ((n, t.bfloat16()) for n, t in tensors)
    )
    result = check_bits(tiny_dir)
    assert result.passed is False and result.note.startswith("changed: ") and result.measured["changed"] > 10


def test_command_line(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = [str(SCRIPT), str(tiny_dir), "--json", str(tmp_path / "v.json"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert done.value.code == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) == 8 and all(" ok " in line for line in lines)
    facts = json.loads((tmp_path / "v.json").read_text())
    assert facts["checkpoint"] == str(tiny_dir) and "transformers" in facts["checks"][0]["name"]
    assert facts["checks"][0]["measured"]["top1_agreement"] == 1.0 and all(c["passed"] for c in facts["checks"])


def test_other_weights_and_no_transformers(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(verify, "against_transformers", scaled := Scaled(verify.against_transformers))
    with pytest.raises(
        UserError, match=r"2 of 8 checks failed: logits = transformers, fp32, logits = transformers, bf16"
    ):
        verify.main(verify.VerifyConfig(str(tiny_dir), device="cpu"))
    assert capsys.readouterr().out.count("FAILED") == 2
    monkeypatch.setattr(verify, "against_transformers", scaled.original)
    monkeypatch.setitem(sys.modules, "transformers", None)
    verify.main(verify.VerifyConfig(str(tiny_dir), device="cpu"))
    out = capsys.readouterr().out
    assert out.count("skipped  transformers is not installed: pip install transformers") == 2 and out.count(" ok ") == 6
    with pytest.raises(UserError, match="checkpoint directory not found"):
        verify.main(verify.VerifyConfig(str(tmp_path / "none")))


@pytest.mark.parametrize("bits", [16, 4])
def test_an_adapter_over_shards(
    bits: int, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The user's own adapter, over a base in several files, in 16 and in 4 bits; against peft, and against a false one."""
    sharded = export(tiny_dir, tmp_path / "sharded", max_shard_bytes=100_000)
    assert len(shards(sharded)) > 2
    adapter = make_adapter(tiny_dir, tmp_path / "adapter", ["all-linear", "lm_head"])
    settings = verify.VerifyConfig(str(sharded), str(adapter), bits=bits, json=str(tmp_path / "v.json"), device="cpu")
    verify.main(settings)
    facts = json.loads((tmp_path / "v.json").read_text())
    assert facts["bits"] == bits and facts["adapter_dir"] == str(adapter)
    assert [check["name"] for check in facts["checks"][:2]] == ["logits = peft, fp32", "logits = peft, bf16"]
    assert all(check["passed"] for check in facts["checks"]) and len(facts["checks"]) == 8
    settings.json = None  # an existing file is not overwritten
    with monkeypatch.context() as patch, pytest.raises(UserError, match="1 of 8 checks failed: merged = unmerged"):
        patch.setattr(LoRALinear, "merged_weight", lambda self: original_merged(self) * 1.001)
        verify.main(settings)
    other = make_adapter(tiny_dir, tmp_path / "other", ["all-linear", "lm_head"])
    real = litmini.load
    monkeypatch.setattr(litmini, "load", lambda directory, _, *rest: real(directory, other, *rest))
    with pytest.raises(UserError, match="2 of 8 checks failed: logits = peft, fp32, logits = peft, bf16"):
        verify.main(settings)


class Scaled:
    """Logits that are off by a hundredth."""

    def __init__(self, original) -> None:
        self.original = original

    def __call__(self, directory, adapter_dir, packed, tokens, ours, rounded, scored):
        return self.original(directory, adapter_dir, packed, tokens, ours * 1.01, rounded * 1.01, scored)


def test_accumulation_is_not_judged_by_a_familys_dropout():
    config = dataclasses.replace(gpt2.PRESETS["tiny"], embd_dropout=0.1, attn_dropout=0.1, resid_dropout=0.1)
    model = gpt2.Model(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    result = check_accumulation(model, torch.arange(48).reshape(4, 12) * 7 % 512)
    assert result.passed, result
    assert "train" not in vars(model) and model.train().training, "the model itself is left alone"


@pytest.mark.parametrize(
    ("device", "asked"), [("cuda:1", ("cuda", [1])), ("cuda:0", ("cuda", [0])), ("cpu", ("cpu", 1))]
)
def test_training_is_on_the_gpu_of_the_model(device, asked, monkeypatch, tmp_path):
    """Else Lightning takes the first one."""
    found = []
    monkeypatch.setattr(
        "lightning_fabric.Fabric", lambda accelerator, devices: found.append((accelerator, devices)) or 1 / 0
    )
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device(device))]))
    with pytest.raises(ZeroDivisionError):
        litmini.evaluation.verify._train(model, [], OptimConfig(), tmp_path / "state")
    assert found == [asked]
