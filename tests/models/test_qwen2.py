"""Qwen 2 and 2.5 are numerically those of transformers, and their checkpoints go in and out unchanged."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from numerics import assert_close
from parity import SMALL, FamilyTests, T, batch, reference
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding, apply_rotary_pos_emb

from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import qwen2

SHAPE = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 256}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}


class TestQwen2(FamilyTests):
    module = qwen2
    cases: ClassVar = {
        "gqa": Qwen2Config(**SHAPE),
        "mqa-tied": Qwen2Config(**{**SHAPE, "num_key_value_heads": 1}, tie_word_embeddings=True),
        "mha-eps": Qwen2Config(**{**SHAPE, "num_key_value_heads": 4}, rms_norm_eps=1e-2),
        "narrow-heads-of-three": Qwen2Config(
            **{**SHAPE, "hidden_size": 48, "num_attention_heads": 6}, rope_parameters={"rope_theta": 1e6}
        ),
        "yarn": Qwen2Config(**SHAPE, rope_parameters=YARN),
        "yarn-factors-tied": Qwen2Config(
            **SHAPE,
            rope_parameters={**YARN, "attention_factor": 1.4, "beta_fast": 8.0, "beta_slow": 2.0},
            tie_word_embeddings=True,
        ),
        "window-in-upper-layers": Qwen2Config(**{**SHAPE, "num_hidden_layers": 3}, **WINDOW, max_window_layers=1),
        "window-in-all-layers": Qwen2Config(**SHAPE, **WINDOW, max_window_layers=0),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": Qwen2Config(**SHAPE, hidden_act="gelu").to_dict(),
        "rope_type = 'dynamic'": {**SHAPE, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type = 'linear'": {**SHAPE, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "mscale = 2.0": {**SHAPE, "rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0}},
        "truncate = False": {**SHAPE, "rope_scaling": {**YARN, "truncate": False}},
        "partial_rotary_factor = 0.5": {**SHAPE, "partial_rotary_factor": 0.5},
        "layer_types = ": Qwen2Config(
            **SHAPE, **WINDOW, layer_types=["sliding_attention", "full_attention"], max_window_layers=1
        ).to_dict(),
        "dual_chunk_attention_config": {**SHAPE, "dual_chunk_attention_config": {"chunk_size": 262144}},
        "attention_dropout = 0.1": Qwen2Config(**SHAPE, attention_dropout=0.1).to_dict(),
        "quantization_config = {'quant_method': 'awq'}": {**SHAPE, "quantization_config": {"quant_method": "awq"}},
    }
    counts: ClassVar = {
        "Qwen/Qwen2-0.5B": 494_032_768,
        "Qwen/Qwen2-1.5B": 1_543_714_304,
        "Qwen/Qwen2-7B": 7_615_616_512,
        "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
        "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
        "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
        "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
        "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
        "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    }


def test_config_of_the_first_generation():
    """Qwen2.5-7B-Instruct's own config.json, and the scaling that its model card adds for 131,072 tokens."""
    published = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    preset = qwen2.PRESETS["Qwen/Qwen2.5-7B-Instruct"]
    assert qwen2.config_from_hf(published) == preset
    assert qwen2.config_from_hf(Qwen2Config(**published).to_dict()) == preset
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    long = qwen2.config_from_hf({**published, "rope_scaling": scaling})
    assert long == replace(preset, yarn=qwen2.Yarn(4.0, 32768, 1.1386294361119891))
    assert qwen2.config_from_hf(Qwen2Config(**published, rope_scaling=scaling).to_dict()) == long
    for config in (preset, long):
        written = qwen2.config_to_hf(config)
        assert qwen2.config_from_hf({k: v for k, v in written.items() if k != "rope_parameters"}) == config
        assert qwen2.config_from_hf(Qwen2Config(**written).to_dict()) == config


def test_values_that_are_left_out_are_those_of_transformers():
    shape = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    shape["num_attention_heads"] = 32
    for more in ({}, {"use_sliding_window": True}, {"num_key_value_heads": None}):
        assert qwen2.config_from_hf({**shape, **more}) == qwen2.config_from_hf(Qwen2Config(**shape, **more).to_dict())


def test_transformers_really_applies_the_window_that_we_are_compared_with():
    distance = torch.arange(T)[:, None] - torch.arange(T)
    weights = reference(TestQwen2.cases["window-in-upper-layers"])(batch()[0], output_attentions=True).attentions
    assert [int((w > 0).sum(-1).max()) for w in weights] == [T, 7, 7]
    assert torch.equal((weights[2] > 0).all(0).all(0), (distance >= 0) & (distance < 7))


@pytest.mark.parametrize("case", ["yarn", "yarn-factors-tied"])
def test_yarn_keeps_blends_and_stretches(case):
    config = qwen2.config_from_hf(TestQwen2.cases[case].to_dict())
    one = torch.ones(1, 1, dtype=torch.int64)
    angles = [
        torch.atan2(*reversed(qwen2.rotary(one, c, torch.float32)))[0, 0, 0, :8]
        for c in (config, replace(config, yarn=None))
    ]
    ratios = angles[0] / angles[1]
    assert_close(ratios[0], torch.tensor(1.0))
    assert ((ratios > 0.26) & (ratios < 0.99)).any()
    assert_close(ratios[-1], torch.tensor(0.25))


def test_yarn_at_the_size_of_the_published_model():
    """Frequencies and factor of transformers' own rotary module, with a head of 128 and 32,768 original positions."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    config = replace(qwen2.PRESETS["Qwen/Qwen2.5-7B-Instruct"], yarn=qwen2.Yarn(4.0, 32768, 1.1386294361119891))
    theirs = Qwen2Config(**{**qwen2.config_to_hf(config), "rope_scaling": None, "rope_parameters": scaling})
    positions = torch.tensor([[0, 1, 100, 8_191, 32_768, 131_071]])
    expected = Qwen2RotaryEmbedding(theirs)(torch.zeros(1), positions)
    for found, want in zip(qwen2.rotary(positions, config, torch.float32), expected, strict=True):
        torch.testing.assert_close(found[:, 0], want, rtol=0, atol=2e-2)  # at 131,071 an ulp of the angle is 8e-3
        torch.testing.assert_close(found[:, 0, :3], want[:, :3], rtol=0, atol=2e-5)


def test_bf16_rounds_where_transformers_rounds():
    """Bit by bit: the norm, and the rotary embedding from positions on."""
    norm, theirs = qwen2.RMSNorm(64, 1e-3).bfloat16(), Qwen2RMSNorm(64, 1e-3).bfloat16()
    norm.weight.data.uniform_(0.5, 1.5)
    theirs.weight.data.copy_(norm.weight.data)
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16)
    assert torch.equal(norm(x), theirs(x))
    config, positions = qwen2.PRESETS["tiny"], torch.arange(4_000, 4_050).expand(2, -1)
    q = x[:, None, :, : config.head_dim]  # (B, 1, T, head_dim)
    rope = Qwen2RotaryEmbedding(Qwen2Config(**qwen2.config_to_hf(config)))(x, positions)
    expected, _ = apply_rotary_pos_emb(q, q, *rope)
    assert torch.equal(qwen2.rotate(q, *qwen2.rotary(positions, config, torch.bfloat16)), expected)


def test_adapters_on_every_linear():
    model = qwen2.Model(qwen2.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 2 * 7
    tokens = torch.randint(0, 512, (2, 16))
    loss, _ = model(tokens, labels=tokens)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
