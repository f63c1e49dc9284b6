"""Qwen 3.5 is numerically that of transformers, and its checkpoints go in and out unchanged."""

import json
import shutil
from dataclasses import replace
from typing import ClassVar

import peft
import pytest
import torch
from numerics import assert_close
from parity import SMALL, FamilyTests, batch, reference
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5RMSNorm,
    Qwen3_5RMSNormGated,
    Qwen3_5TextRotaryEmbedding,
    apply_rotary_pos_emb,
)

from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model, save_trained
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.importers.convert import convert
from litmini.methods.adapters import add_adapters
from litmini.models import qwen3_5

SHAPE = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256}
SHAPE |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
SHAPE |= {"linear_value_head_dim": 24, "layer_types": ["linear_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
MROPE = {**ROPE, "mrope_interleaved": True, "mrope_section": [2, 1, 1]}


class TestQwen35(FamilyTests):
    module = qwen3_5
    cases: ClassVar = {
        "grouped-values": Qwen3_5TextConfig(**SHAPE),
        "mqa-tied": Qwen3_5TextConfig(
            **SHAPE | {"num_key_value_heads": 1, "linear_num_key_heads": 4}, tie_word_embeddings=True
        ),
        "interval": Qwen3_5TextConfig(**SHAPE | {"num_hidden_layers": 4, "layer_types": None}, rope_parameters=MROPE),
        "kernel-eps-half-rotated": Qwen3_5TextConfig(
            **SHAPE,
            linear_conv_kernel_dim=2,
            rms_norm_eps=1e-2,
            rope_parameters=ROPE | {"partial_rotary_factor": 0.5},
        ),
        "linear-only": Qwen3_5TextConfig(**SHAPE | {"layer_types": None}),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": Qwen3_5TextConfig(**SHAPE, hidden_act="gelu").to_dict(),
        "rope_type = 'yarn'": {**SHAPE, "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}},
        "rope_type = 'linear'": {**SHAPE, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "attention_bias = True": Qwen3_5TextConfig(**SHAPE, attention_bias=True).to_dict(),
        "attention_dropout = 0.1": Qwen3_5TextConfig(**SHAPE, attention_dropout=0.1).to_dict(),
        "attn_output_gate = False": {**SHAPE, "attn_output_gate": False},
        "layer_types = .*sliding": {**SHAPE, "layer_types": ["linear_attention", "sliding_attention"]},
        "layer_types = ": {**SHAPE, "layer_types": ["full_attention", "linear_attention"]},
        "quantization_config": {**SHAPE, "quantization_config": {"quant_method": "fp8"}},
    }
    counts: ClassVar = {  # of the text part: with tower and multi-token prediction 0.87, 2.27, 4.66, 9.65 and 27.8 billion
        "Qwen/Qwen3.5-0.8B": 752_393_024,
        "Qwen/Qwen3.5-2B": 1_881_825_088,
        "Qwen/Qwen3.5-4B": 4_205_751_296,
        "Qwen/Qwen3.5-9B": 8_953_803_264,
        "Qwen/Qwen3.5-27B": 26_895_998_464,
    }


def test_text_config_of_a_published_checkpoint():
    """That of Qwen3.5-27B, whose keys without meaning for the text are passed over."""
    published = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 17408,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 24,
        "num_hidden_layers": 64,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {**ROPE, "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_theta": 10000000},
        "use_cache": True,
        "vocab_size": 248320,
    }
    preset = qwen3_5.PRESETS["Qwen/Qwen3.5-27B"]
    assert qwen3_5.config_from_hf(published) == preset
    assert qwen3_5.config_from_hf(Qwen3_5TextConfig(**published).to_dict()) == preset
    assert qwen3_5.config_from_hf(Qwen3_5TextConfig(**qwen3_5.config_to_hf(preset)).to_dict()) == preset


def test_values_that_are_left_out_are_those_of_transformers():
    for raw in ({}, {"layer_types": None}, {"num_hidden_layers": 3, "full_attention_interval": 2}):
        assert qwen3_5.config_from_hf(raw) == qwen3_5.config_from_hf(Qwen3_5TextConfig(**raw).to_dict())


def test_impossible_values_raise():
    for change in ({"linear_v_heads": 6}, {"n_kv_heads": 3}, {"rotary_pct": 0.1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            replace(qwen3_5.PRESETS["tiny"], **change)


def test_bf16_rounds_where_transformers_rounds():
    """Bit by bit: both norms, and the rotary embedding from positions on."""
    x, gate = torch.randn(2, 2, 50, 64, dtype=torch.bfloat16)
    norm, theirs = qwen3_5.RMSNorm(64, 1e-3).bfloat16(), Qwen3_5RMSNorm(64, 1e-3).bfloat16()
    gated, theirs_gated = qwen3_5.GatedRMSNorm(64, 1e-3).bfloat16(), Qwen3_5RMSNormGated(64, 1e-3).bfloat16()
    for ours, other in ((norm, theirs), (gated, theirs_gated)):
        ours.weight.data.uniform_(0.5, 1.5)
        other.weight.data.copy_(ours.weight.data)
    assert torch.equal(norm(x), theirs(x))
    assert torch.equal(gated(x, gate), theirs_gated(x, gate))
    config, positions = qwen3_5.PRESETS["tiny"], torch.arange(4_000, 4_050).expand(2, -1)
    q = x[:, None, :, : config.head_dim]  # (B, 1, T, head_dim)
    rope = Qwen3_5TextRotaryEmbedding(Qwen3_5TextConfig(**qwen3_5.config_to_hf(config)))(x, positions)
    expected, _ = apply_rotary_pos_emb(q, q, *rope)
    assert torch.equal(qwen3_5.rotate(q, *qwen3_5.rotary(positions, config, torch.bfloat16)), expected)


@pytest.fixture
def base(tmp_path, tokenizer_dir):
    """A text checkpoint with weights for multi-token prediction, of another dtype."""
    source = tmp_path / "base"
    reference(TestQwen35.cases["kernel-eps-half-rotated"]).save_pretrained(source)
    shutil.copytree(tokenizer_dir, source, dirs_exist_ok=True)
    add_prediction(source)
    return source


def add_prediction(source) -> dict[str, torch.Tensor]:
    tensors = load_file(source / "model.safetensors")
    more = {"mtp.fc.weight": torch.randn(64, 128).bfloat16(), "mtp.layers.0.mlp.up_proj.weight": torch.randn(80, 64)}
    save_file(tensors | more, source / "model.safetensors", metadata={"format": "pt"})
    return more


def read_all(directory) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def test_multi_token_prediction_is_carried_through(base, tmp_path):
    """Bit by bit by what is trained, merged and exported; other tensors are refused as in every family."""
    before = read_all(base)
    model = load_model(base, torch.float32)
    assert not any("mtp" in name for name, _ in model.named_parameters())
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 5 + 4 + 2 * 3
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, adapter, str(base))
    export(base, tmp_path / "merged", adapter, dtype=torch.float32)
    (tmp_path / "full").mkdir()
    save_trained(load_model(base, torch.float32), tmp_path / "full", base)
    convert(base, tmp_path / "converted")
    for directory, changed in (
        (tmp_path / "merged", True),
        (tmp_path / "full", False),
        (tmp_path / "converted", False),
    ):
        after = read_all(directory)
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            is_linear = name.endswith("proj.weight") or name.endswith(tuple(f"in_proj_{x}.weight" for x in "abz"))
            same = torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
            assert same != (changed and name.startswith("model.") and (is_linear or "in_proj_qkv" in name)), name
    tokens, _ = batch()
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        tuned = peft.PeftModel.from_pretrained(theirs, adapter).eval()(tokens, use_cache=False).logits
        load_adapter(again := load_model(base, torch.float32), adapter)
        for found in (model.eval()(tokens), again(tokens), load_model(tmp_path / "merged", torch.float32)(tokens)):
            assert_close(found, tuned)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"model.more": torch.ones(1)}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="unexpected model.more"):
        load_model(base, torch.float32)


def test_the_text_part_of_a_multimodal_checkpoint(tmp_path, tokenizer_dir):
    """As all published ones are: logits, an adapter in PEFT, and an export that loads under the original class."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    text = json.loads(TestQwen35.cases["interval"].to_json_string())
    ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **ids)).eval()
    for name, parameter in whole.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.data += "norm" in name
    base = tmp_path / "base"
    whole.save_pretrained(base)
    shutil.copytree(tokenizer_dir, base, dirs_exist_ok=True)
    more = add_prediction(base)
    tokens = torch.randint(0, 90, (2, 70))
    model = load_model(base, torch.float32)
    with torch.no_grad():
        assert_close(model(tokens), whole(tokens, use_cache=False).logits)
    add_adapters(model, LoraConfig(rank=2, targets=["in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, adapter, str(base))
    export(base, tmp_path / "merged", adapter, dtype=torch.float32)
    merged = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tuned = peft.PeftModel.from_pretrained(whole, adapter).eval()
    with torch.no_grad():
        ours = model.eval()(tokens)
        assert_close(ours, tuned(tokens, use_cache=False).logits)
        assert_close(merged(tokens, use_cache=False).logits, ours)
    after, before = read_all(tmp_path / "merged"), read_all(base)
    assert after.keys() == before.keys() and more.keys() < after.keys()
    beside = [name for name in before if "language_model" not in name and name != "lm_head.weight"]
    assert len(beside) > 10 and all(torch.equal(after[name], before[name]) for name in beside)
