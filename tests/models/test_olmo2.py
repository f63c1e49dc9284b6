"""OLMo 2 and Olmo 3 are numerically those of transformers, and their checkpoints go in and out unchanged."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from numerics import assert_close
from parity import SMALL, FamilyTests, T, batch, reference
from transformers import Olmo2Config, Olmo3Config
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm, Olmo2RotaryEmbedding, apply_rotary_pos_emb
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import olmo2

SHAPE = {**SMALL, "intermediate_size": 80, "max_position_embeddings": 256, "pad_token_id": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
OLMO3 = {**SHAPE, "num_hidden_layers": 5, "num_key_value_heads": 2, "sliding_window": 7}  # the fourth sees everything
NESTED = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
NESTED["full_attention"] = {**YARN, "rope_theta": 100.0}
BETAS = {**NESTED["full_attention"], "attention_factor": 1.4, "beta_fast": 8.0, "beta_slow": 2.0}


class TestOlmo2(FamilyTests):
    module = olmo2
    cases: ClassVar = {
        "mha": Olmo2Config(**SHAPE, rope_parameters={"rope_theta": 5e5}),
        "gqa-eps": Olmo2Config(**SHAPE, num_key_value_heads=2, rms_norm_eps=1e-2),
        "mqa-tied": Olmo2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True),
        "olmo3": Olmo3Config(**{**OLMO3, "num_hidden_layers": 4}),
        "olmo3-yarn": Olmo3Config(**OLMO3, rope_parameters=NESTED),
        "olmo3-yarn-factors-mha": Olmo3Config(
            **{**OLMO3, "num_key_value_heads": 4, "sliding_window": 16},
            rope_parameters={**NESTED, "full_attention": BETAS},
        ),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": Olmo2Config(**SHAPE, hidden_act="gelu").to_dict(),
        "rope_type = 'yarn'": {**SHAPE, "model_type": "olmo2", "rope_scaling": YARN},
        "rope_type = 'llama3'": {**OLMO3, "model_type": "olmo3", "rope_scaling": {"rope_type": "llama3"}},
        "mscale = 2.0": {**OLMO3, "model_type": "olmo3", "rope_scaling": {**YARN, "mscale": 2.0}},
        "truncate = False": {**OLMO3, "model_type": "olmo3", "rope_scaling": {**YARN, "truncate": False}},
        "partial_rotary_factor = 0.5": {**SHAPE, "model_type": "olmo2", "partial_rotary_factor": 0.5},
        "rope_parameters = {'rope_theta': 10.0": {
            **OLMO3,
            "model_type": "olmo3",
            "rope_parameters": {"rope_theta": 10.0},
        },
        "rope_parameters = .*'sliding_attention'": Olmo3Config(
            **OLMO3, rope_parameters={**NESTED, "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}
        ).to_dict(),
        "rope_parameters = .*'yarn'": {
            **OLMO3,
            "model_type": "olmo3",
            "rope_parameters": {**YARN, "rope_theta": 100.0},
        },
        "sliding_window = 64": {**SHAPE, "model_type": "olmo2", "sliding_window": 64},
        "sliding_window = None": {**OLMO3, "model_type": "olmo3", "sliding_window": None},
        "layer_types = ": Olmo3Config(**OLMO3, layer_types=["full_attention"] + ["sliding_attention"] * 4).to_dict(),
        "attention_bias = True": Olmo2Config(**SHAPE, attention_bias=True).to_dict(),
        "attention_dropout = 0.1": Olmo2Config(**SHAPE, attention_dropout=0.1).to_dict(),
        "quantization_config": {**SHAPE, "model_type": "olmo2", "quantization_config": {"quant_method": "awq"}},
    }
    counts: ClassVar = {
        "allenai/OLMo-2-0425-1B": 1_484_916_736,
        "allenai/OLMo-2-1124-7B": 7_298_617_344,
        "allenai/OLMo-2-1124-13B": 13_716_198_400,
        "allenai/OLMo-2-0325-32B": 32_234_279_936,
        "allenai/Olmo-3-1025-7B": 7_298_011_136,
        "allenai/Olmo-3-1125-32B": 32_233_522_176,
    }


def test_config_of_the_first_generation():
    """OLMo-2-0425-1B's and Olmo-3-1025-7B's own config.json."""
    second = {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "num_attention_heads": 16,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "use_cache": False,
        "vocab_size": 100352,
    }
    third = {
        **second,
        "architectures": ["Olmo3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
        "max_position_embeddings": 65536,
        "model_type": "olmo3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "sliding_window": 4096,
        "vocab_size": 100278,
    }
    for raw, theirs, name in (
        (second, Olmo2Config, "allenai/OLMo-2-0425-1B"),
        (third, Olmo3Config, "allenai/Olmo-3-1025-7B"),
    ):
        preset = olmo2.PRESETS[name]
        assert olmo2.config_from_hf(raw) == preset
        assert olmo2.config_from_hf(theirs(**raw).to_dict()) == preset
        written = olmo2.config_to_hf(preset)
        assert olmo2.config_from_hf({k: v for k, v in written.items() if k != "rope_parameters"}) == preset
        assert olmo2.config_from_hf(theirs(**written).to_dict()) == preset
    full = {"full_attention": {**third["rope_scaling"], "rope_theta": 500000}}
    assert olmo2.config_from_hf({**third, "rope_scaling": None, "rope_parameters": full}) == preset


def test_values_that_are_left_out_are_those_of_transformers():
    shape = {k: v for k, v in SHAPE.items() if k != "max_position_embeddings"}
    for theirs in (Olmo2Config, Olmo3Config):
        for more in ({}, {"num_key_value_heads": None}):
            raw = {**shape, **more, "model_type": theirs.model_type}
            assert olmo2.config_from_hf(raw) == olmo2.config_from_hf(theirs(**shape, **more).to_dict())


@pytest.mark.parametrize("change", [{"window": 7}, {"model_type": "olmo3"}, {"model_type": "olmo3", "window": 0}])
def test_impossible_values_raise(change):
    with pytest.raises(ValueError, match="window"):
        replace(olmo2.PRESETS["tiny"], **change)


def test_transformers_really_applies_the_window_that_we_are_compared_with():
    distance = torch.arange(T)[:, None] - torch.arange(T)
    weights = reference(TestOlmo2.cases["olmo3"])(batch()[0], output_attentions=True).attentions
    assert [int((w > 0).sum(-1).max()) for w in weights] == [7, 7, 7, T]
    assert torch.equal((weights[2] > 0).all(0).all(0), (distance >= 0) & (distance < 7))


def test_yarn_keeps_blends_and_stretches():
    config = olmo2.config_from_hf(TestOlmo2.cases["olmo3-yarn"].to_dict())
    one = torch.ones(1, 1, dtype=torch.int64)
    pairs = [olmo2.rotary(one, config, yarn) for yarn in (config.yarn, None)]
    stretched, plain = (torch.atan2(sin, cos)[0, 0, 0, :8] for cos, sin in pairs)
    ratios = stretched / plain
    assert_close(ratios[0], torch.tensor(1.0))
    assert ((ratios > 0.26) & (ratios < 0.99)).any()
    assert_close(ratios[-1], torch.tensor(0.25))


def test_rotary_at_the_size_of_the_published_model():
    """Both kinds of layers against transformers' own module, with a head of 128 and 8,192 original positions."""
    config = olmo2.PRESETS["allenai/Olmo-3-1025-7B"]
    theirs = Olmo3RotaryEmbedding(Olmo3Config(**olmo2.config_to_hf(config)))
    positions = torch.tensor([[0, 1, 100, 4_097, 8_192, 65_535]])
    for kind, yarn in (("full_attention", config.yarn), ("sliding_attention", None)):
        expected = theirs(torch.zeros(1), positions, kind)
        for found, want in zip(olmo2.rotary(positions, config, yarn), expected, strict=True):
            torch.testing.assert_close(found[:, 0], want, rtol=0, atol=2e-2)  # an ulp of the angle is 8e-3 there
            torch.testing.assert_close(found[:, 0, :3], want[:, :3], rtol=0, atol=2e-5)


def test_bf16_rounds_where_transformers_rounds():
    """Bit by bit: the norm, and the rotary embedding from positions on."""
    norm, theirs = olmo2.RMSNorm(64, 1e-3).bfloat16(), Olmo2RMSNorm(64, 1e-3).bfloat16()
    norm.weight.data.uniform_(0.5, 1.5)
    theirs.weight.data.copy_(norm.weight.data)
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16)
    assert torch.equal(norm(x), theirs(x))
    config, positions = olmo2.PRESETS["tiny"], torch.arange(4_000, 4_050).expand(2, -1)
    q = x[:, None, :, : config.head_dim]  # (B, 1, T, head_dim)
    rope = Olmo2RotaryEmbedding(Olmo2Config(**olmo2.config_to_hf(config)))(x, positions)
    expected, _ = apply_rotary_pos_emb(q, q, *rope)
    assert torch.equal(olmo2.rotate(q, *olmo2.rotary(positions, config, None)), expected)


def test_adapters_on_every_linear():
    model = olmo2.Model(olmo2.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 2 * 7
    tokens = torch.randint(0, 512, (2, 16))
    loss, _ = model(tokens, labels=tokens)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
