"""Qwen 3 is numerically that of transformers, and its checkpoints go in and out unchanged."""

from dataclasses import replace
from typing import ClassVar

import torch
from numerics import assert_close
from parity import SMALL, FamilyTests
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import qwen3

SHAPE = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}


class TestQwen3(FamilyTests):
    module = qwen3
    cases: ClassVar = {
        "gqa": Qwen3Config(**SHAPE),
        "mqa-tied": Qwen3Config(**{**SHAPE, "num_key_value_heads": 1}, tie_word_embeddings=True),
        "mha-eps": Qwen3Config(**{**SHAPE, "num_key_value_heads": 4}, rms_norm_eps=1e-2),
        "wide-heads": Qwen3Config(**{**SHAPE, "head_dim": 24}, rope_parameters={"rope_theta": 5e6}),
        "narrow-heads-tied": Qwen3Config(**{**SHAPE, "head_dim": 10}, tie_word_embeddings=True),
        "yarn": Qwen3Config(**SHAPE, rope_parameters=YARN),
        "yarn-factors": Qwen3Config(
            **{**SHAPE, "head_dim": 24},
            rope_parameters={**YARN, "attention_factor": 1.4, "beta_fast": 8.0, "beta_slow": 2.0},
        ),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": Qwen3Config(**SHAPE, hidden_act="gelu").to_dict(),
        "rope_type = 'dynamic'": {**SHAPE, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type = 'linear'": {**SHAPE, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "mscale = 2.0": {**SHAPE, "rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0}},
        "truncate = False": {**SHAPE, "rope_scaling": {**YARN, "truncate": False}},
        "partial_rotary_factor = 0.5": {**SHAPE, "partial_rotary_factor": 0.5},
        "attention_bias = True": Qwen3Config(**SHAPE, attention_bias=True).to_dict(),
        "use_sliding_window = True": Qwen3Config(**SHAPE, use_sliding_window=True).to_dict(),
        "layer_types = ": Qwen3Config(**SHAPE, layer_types=["sliding_attention", "full_attention"]).to_dict(),
        "dual_chunk_attention_config": {**SHAPE, "dual_chunk_attention_config": {"chunk_size": 262144}},
        "attention_dropout = 0.1": Qwen3Config(**SHAPE, attention_dropout=0.1).to_dict(),
        "quantization_config = {'quant_method': 'fp8'}": {**SHAPE, "quantization_config": {"quant_method": "fp8"}},
    }
    counts: ClassVar = {
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-4B": 4_022_468_096,
        "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
        "Qwen/Qwen3-8B": 8_190_735_360,
        "Qwen/Qwen3-14B": 14_768_307_200,
        "Qwen/Qwen3-32B": 32_762_123_264,
    }


def test_config_of_the_first_generation():
    """Qwen3-0.6B's own config.json, and the scaling that its model card adds for 131,072 tokens."""
    published = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    preset = qwen3.PRESETS["Qwen/Qwen3-0.6B"]
    assert qwen3.config_from_hf(published) == preset
    assert qwen3.config_from_hf(Qwen3Config(**published).to_dict()) == preset
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    long = qwen3.config_from_hf({**published, "rope_scaling": scaling})
    assert long == replace(preset, yarn=qwen3.Yarn(4.0, 32768, 1.1386294361119891))
    assert qwen3.config_from_hf(Qwen3Config(**{**published, "rope_scaling": scaling}).to_dict()) == long
    for config in (preset, long):
        written = qwen3.config_to_hf(config)
        assert qwen3.config_from_hf({k: v for k, v in written.items() if k != "rope_parameters"}) == config
        assert qwen3.config_from_hf(Qwen3Config(**written).to_dict()) == config


def test_values_that_are_left_out_are_those_of_transformers():
    keys = ("num_key_value_heads", "max_position_embeddings", "head_dim")
    shape = {k: v for k, v in SHAPE.items() if k not in keys} | {"num_attention_heads": 32}
    for more in ({}, {"num_key_value_heads": None}):
        assert qwen3.config_from_hf({**shape, **more}) == qwen3.config_from_hf(Qwen3Config(**shape, **more).to_dict())


def test_yarn_keeps_blends_and_stretches():
    config = qwen3.config_from_hf(TestQwen3.cases["yarn"].to_dict())
    one = torch.ones(1, 1, dtype=torch.int64)
    pairs = [qwen3.rotary(one, c, torch.float32) for c in (config, replace(config, yarn=None))]
    stretched, plain = (torch.atan2(sin, cos)[0, 0, 0, :8] for cos, sin in pairs)
    ratios = stretched / plain
    assert_close(ratios[0], torch.tensor(1.0))
    assert ((ratios > 0.26) & (ratios < 0.99)).any()
    assert_close(ratios[-1], torch.tensor(0.25))


def test_yarn_at_the_size_of_the_published_model():
    """Frequencies and factor of transformers' own rotary module, with a head of 128 and 32,768 original positions."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    config = replace(qwen3.PRESETS["Qwen/Qwen3-8B"], yarn=qwen3.Yarn(4.0, 32768, 1.1386294361119891))
    theirs = Qwen3Config(**{**qwen3.config_to_hf(config), "rope_scaling": None, "rope_parameters": scaling})
    positions = torch.tensor([[0, 1, 100, 8_191, 32_768, 131_071]])
    expected = Qwen3RotaryEmbedding(theirs)(torch.zeros(1), positions)
    for found, want in zip(qwen3.rotary(positions, config, torch.float32), expected, strict=True):
        torch.testing.assert_close(found[:, 0], want, rtol=0, atol=2e-2)  # at 131,071 an ulp of the angle is 8e-3
        torch.testing.assert_close(found[:, 0, :3], want[:, :3], rtol=0, atol=2e-5)


def test_bf16_rounds_where_transformers_rounds():
    """Bit by bit: the norm, and the rotary embedding from positions on."""
    norm, theirs = qwen3.RMSNorm(64, 1e-3).bfloat16(), Qwen3RMSNorm(64, 1e-3).bfloat16()
    norm.weight.data.uniform_(0.5, 1.5)
    theirs.weight.data.copy_(norm.weight.data)
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16)
    assert torch.equal(norm(x), theirs(x))
    config, positions = qwen3.PRESETS["tiny"], torch.arange(4_000, 4_050).expand(2, -1)
    q = x[:, None, :, : config.head_dim]  # (B, 1, T, head_dim)
    rope = Qwen3RotaryEmbedding(Qwen3Config(**qwen3.config_to_hf(config)))(x, positions)
    expected, _ = apply_rotary_pos_emb(q, q, *rope)
    assert torch.equal(qwen3.rotate(q, *qwen3.rotary(positions, config, torch.bfloat16)), expected)


def test_adapters_on_every_linear():
    model = qwen3.Model(qwen3.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 2 * 7
    tokens = torch.randint(0, 512, (2, 16))
    loss, _ = model(tokens, labels=tokens)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
