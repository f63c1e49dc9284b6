"""IA3 against PEFT, both ways; merged, exported, over 4 bits, row by row in a batch, and through its script."""

import runpy
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from numerics import assert_close
from safetensors.torch import load_file, save_file

import litmini
from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model, save_model
from litmini.checkpoints.load import load_quantized
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import Ia3Config, QuantizeConfig
from litmini.errors import UserError
from litmini.generation.multi_adapter import MultiLoRA
from litmini.methods.adapters import merge_adapters, restore_adapters
from litmini.methods.ia3 import add_ia3
from litmini.models import qwen2

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 512
TARGETS = ["k_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_dir) -> Path:
    """A tiny Qwen 2, which has biases on k and v, away from zero."""
    directory, config = tmp_path_factory.mktemp("base"), qwen2.PRESETS["tiny"]
    model = qwen2.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    save_model(directory, qwen2.config_to_hf(config), model.named_parameters(), tokenizer_dir)
    return directory


def reference(base: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def saved(base: Path, directory: Path, bits: int = 16) -> torch.Tensor:
    """A changed adapter written to `directory`; what the model with it gives."""
    model = load_quantized(base, QuantizeConfig(bits), torch.float32)
    add_ia3(model, Ia3Config())
    expected = moved(model)(TOKENS).detach()
    directory.mkdir()
    save_adapter(model, directory, str(base), quantize=QuantizeConfig(bits))
    return expected


def test_from_us_to_peft(base, tmp_path):
    plain = load_model(base, torch.float32)
    expected = plain(TOKENS)
    assert len(add_ia3(plain, Ia3Config())) == 3 * plain.config.n_layers
    assert torch.equal(plain(TOKENS), expected), "it starts as the base, exactly"
    changed = saved(base, tmp_path / "adapter")
    assert (changed - expected).abs().max() > 0.05
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(reference(base), tmp_path / "adapter").eval()(TOKENS).logits
    assert_close(found, changed)
    assert torch.equal(litmini.load(base, tmp_path / "adapter", dtype="fp32")[0](TOKENS), changed)


def test_from_peft_to_us_with_equal_gradients_and_counts(base, tmp_path):
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=["down_proj"])
    theirs = moved(peft.get_peft_model(reference(base), config))
    theirs.save_pretrained(tmp_path)
    model = load_model(base, torch.float32)
    load_adapter(model, tmp_path)
    assert_close(model(TOKENS), theirs(TOKENS).logits)
    ours = {n: p.requires_grad_() for n, p in model.named_parameters() if n.endswith("ia3_l")}
    gradients = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in ours.values()) == sum(p.numel() for p in gradients.values())
    model(TOKENS).square().mean().backward()
    theirs(TOKENS).logits.square().mean().backward()
    for name, parameter in ours.items():
        expected = gradients[f"base_model.model.{name}.default"].grad.flatten()
        assert_close(parameter.grad, expected)


@pytest.mark.parametrize("bits", [16, 4])
def test_merged_restored_and_exported(base, tmp_path, bits):
    expected = saved(base, tmp_path / "adapter", bits)
    model, _ = litmini.load(base, tmp_path / "adapter", dtype="fp32", bits=bits)
    assert torch.equal(model(TOKENS), expected)
    replaced = merge_adapters(model)
    assert_close(model(TOKENS), expected)
    restore_adapters(model, replaced)
    assert torch.equal(model(TOKENS), expected)
    export(base, tmp_path / "merged", tmp_path / "adapter")
    with torch.no_grad():
        assert_close(reference(tmp_path / "merged")(TOKENS).logits, expected)


@torch.no_grad()
def test_beside_the_base_in_one_batch(base, tmp_path):
    changed = saved(base, tmp_path / "adapter")
    model = load_model(base, torch.float32)
    plain, multi_lora = model(TOKENS), MultiLoRA(model)
    multi_lora.add("one", tmp_path / "adapter")
    with multi_lora.use([None, "one"]):
        y = model(TOKENS)
    assert_close(y, torch.stack((plain[0], changed[1])))


def test_what_does_not_fit_is_an_error(base, tmp_path):
    model = load_model(base, torch.float32)
    with pytest.raises(UserError, match=r"key_proj; linears there: down_proj, gate_proj, k_proj"):
        add_ia3(model, Ia3Config(targets=["key_proj"]))
    with pytest.raises(UserError, match="ia3.feedforward: empty"):
        add_ia3(model, Ia3Config([], []))
    with pytest.raises(UserError, match="ia3.targets"):
        Ia3Config(["down_proj"], ["down_proj"])
    saved(base, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    for change, message in (
        (lambda t: torch.ones_like(t), "does nothing: every ia3_l is one"),
        (lambda t: t[: len(t) // 2 + 1], r"k_proj.ia3_l: adapter has \(\d+, 1\), the model wants \(\d+, 1\)"),
    ):
        save_file({name: change(t).contiguous() for name, t in tensors.items()}, file)
        with pytest.raises(UserError, match=message):
            load_adapter(model, tmp_path / "adapter")


def test_script(base, tmp_path, monkeypatch):
    """It learns, writes an adapter that PEFT reads, and its factors stay without decay."""
    words = ["--checkpoint_dir", base, "--out_dir", tmp_path / "run", "--optim.lr", 0.05, "--optim.weight_decay", 0.1]
    words += ["--data.path", ROOT / "config_hub/quickstart/train.jsonl", "--data.max_seq_len", 128, "--eval.samples", 0]
    words += ["--train.max_steps", 4, "--train.global_batch_size", 2, "--train.micro_batch_size", 1]
    monkeypatch.setattr(sys, "argv", ["finetune_ia3", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts/finetune_ia3.py"), run_name="__main__")
    assert end.value.code == 0
    tensors = load_file(tmp_path / "run/final/adapter_model.safetensors")
    assert all(t.dtype == torch.float32 and 1e-3 < (t - 1).abs().max() < 0.3 for t in tensors.values())
    peft.PeftModel.from_pretrained(reference(base), tmp_path / "run/final")
