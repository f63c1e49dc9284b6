"""What adapters and 4 bits owe each family: the same in PEFT, merged and read again; every linear that they name."""

from pathlib import Path

import peft
import torch
from numerics import assert_close
from parity import batch
from transformers import AutoModelForCausalLM

from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import adapters, add_adapters
from litmini.methods.nf4 import quantize_linears


def assert_same_in_peft_and_merged(base: Path, place: Path, config: LoraConfig) -> None:
    """Assert that PEFT over transformers' model, a merged checkpoint, and what PEFT writes again, give our logits.

    Args:
        base: a checkpoint directory.
        place: where adapters are written.
    """
    ours = load_model(base, torch.float32)
    add_adapters(ours, config)
    for layer in adapters(ours).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    tokens, _ = batch()
    ours.eval()
    with torch.no_grad():
        expected = ours(tokens)
        assert (expected - load_model(base, torch.float32)(tokens)).abs().max() > 0.1
    (place / "adapter").mkdir()
    save_adapter(ours, place / "adapter", str(base))
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, place / "adapter").eval()
    with torch.no_grad():
        assert_close(theirs(tokens, use_cache=False).logits, expected)
    theirs.save_pretrained(place / "again")
    back = load_model(base, torch.float32)
    load_adapter(back, place / "again")
    merged = export(base, place / "merged", place / "adapter")
    with torch.no_grad():
        assert torch.equal(back(tokens), expected)
        assert_close(load_model(merged, torch.float32)(tokens), expected)


def assert_4_bits(base: Path, linears: set[str], most: float) -> None:
    """Assert that 4 bits take linears of these names only, and that adapters over all of them are trained.

    Args:
        most: the largest error of logits, relative to them.
    """
    model, (tokens, labels) = load_model(base, torch.float32), batch()
    with torch.no_grad():
        expected = model(tokens)
    assert {name.rpartition(".")[2] for name in quantize_linears(model)} == linears
    with torch.no_grad():
        error = (model(tokens) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < most
    add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    model(tokens, labels=labels)[0].backward()
    assert all((p.grad is not None) for name, p in model.named_parameters() if "lora" in name)
