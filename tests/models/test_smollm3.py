"""SmolLM3 is numerically that of transformers, and its checkpoints go in and out unchanged."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from numerics import assert_close
from parity import SMALL, FamilyTests, batch, reference
from transformers import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm, SmolLM3RotaryEmbedding, apply_rotary_pos_emb

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import smollm3

SHAPE = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 256}
SHAPE |= {"num_hidden_layers": 4, "pad_token_id": None}  # the fourth has no rotary embedding
SHORT = {**SHAPE, "num_hidden_layers": 2, "no_rope_layer_interval": 2}  # the second has none
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}


class TestSmolLM3(FamilyTests):
    module = smollm3
    cases: ClassVar = {
        "gqa": SmolLM3Config(**SHAPE),
        "mqa-untied": SmolLM3Config(**{**SHAPE, "num_key_value_heads": 1}, tie_word_embeddings=False),
        "mha-eps": SmolLM3Config(**{**SHAPE, "num_key_value_heads": 4}, rms_norm_eps=1e-2),
        "wide-heads": SmolLM3Config(**SHORT, head_dim=24, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "every-second": SmolLM3Config(**{**SHORT, "num_hidden_layers": 3}),
        "listed": SmolLM3Config(**SHORT, no_rope_layers=[1, 0, 1, 0]),
        "yarn": SmolLM3Config(**SHORT, rope_parameters=YARN),
        "yarn-factors-untied": SmolLM3Config(
            **SHORT,
            rope_parameters={**YARN, "attention_factor": 1.4, "beta_fast": 8.0, "beta_slow": 2.0},
            tie_word_embeddings=False,
        ),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": SmolLM3Config(**SHAPE, hidden_act="gelu").to_dict(),
        "rope_type = 'dynamic'": {**SHAPE, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type = 'linear'": {**SHAPE, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "mscale = 2.0": {**SHAPE, "rope_scaling": {**YARN, "mscale": 2.0}},
        "truncate = False": {**SHAPE, "rope_scaling": {**YARN, "truncate": False}},
        "layer_types = .*chunked": {**SHAPE, "layer_types": ["chunked_attention"] * 4},
        "partial_rotary_factor = 0.5": {**SHAPE, "partial_rotary_factor": 0.5},
        "no_rope_layers = \\[1, 1, 0, 1\\]": SmolLM3Config(**SHAPE, no_rope_layers=[1, 1, 0, 1]).to_dict(),
        "sliding_window = 7": SmolLM3Config(**SHAPE, use_sliding_window=True, sliding_window=7).to_dict(),
        "layer_types = ": SmolLM3Config(**SHAPE, sliding_window=7, layer_types=["sliding_attention"] * 4).to_dict(),
        "attention_bias = True": SmolLM3Config(**SHAPE, attention_bias=True).to_dict(),
        "mlp_bias = True": SmolLM3Config(**SHAPE, mlp_bias=True).to_dict(),
        "attention_dropout = 0.1": SmolLM3Config(**SHAPE, attention_dropout=0.1).to_dict(),
        "quantization_config": {**SHAPE, "quantization_config": {"quant_method": "awq"}},
    }
    counts: ClassVar = {
        "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
        "HuggingFaceTB/SmolLM3-3B-Base": 3_075_098_624,
    }


def test_config_of_the_first_generation():
    """SmolLM3-3B's config.json as transformers 4 writes it, and the scaling that its model card adds."""
    published = {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 128012,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pad_token_id": 128004,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 128256,
    }
    preset = smollm3.PRESETS["HuggingFaceTB/SmolLM3-3B"]
    assert smollm3.config_from_hf(published) == preset
    assert smollm3.config_from_hf(SmolLM3Config(**published).to_dict()) == preset
    scaling = {"factor": 2.0, "original_max_position_embeddings": 65536, "rope_type": "yarn"}
    long = smollm3.config_from_hf({**published, "rope_scaling": scaling})
    assert long == replace(preset, yarn=smollm3.Yarn(2.0, 65536, 1.0693147180559945))
    assert smollm3.config_from_hf(SmolLM3Config(**published | {"rope_scaling": scaling}).to_dict()) == long
    for config in (preset, long):
        written = smollm3.config_to_hf(config)
        assert smollm3.config_from_hf({k: v for k, v in written.items() if k != "rope_parameters"}) == config
        assert smollm3.config_from_hf(SmolLM3Config(**written).to_dict()) == config


def test_values_that_are_left_out_are_those_of_transformers():
    shape = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    for more in ({}, {"num_key_value_heads": None}, {"no_rope_layer_interval": 2}):
        raw = {**shape, **more}
        assert smollm3.config_from_hf(raw) == smollm3.config_from_hf(SmolLM3Config(**raw).to_dict())


def test_impossible_values_raise():
    with pytest.raises(ValueError, match="nope_every"):
        replace(smollm3.PRESETS["tiny"], nope_every=0)


def test_layers_without_rotary_embedding_matter_in_the_comparison(tmp_path):
    """Otherwise the comparison with transformers would not notice a layer that is rotated, or not, by mistake."""
    reference(TestSmolLM3.cases["gqa"]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    model, (tokens, _) = load_model(tmp_path, torch.float32), batch()
    assert smollm3.rope_layers(4, 4) == [True, True, True, False]
    with torch.no_grad():
        logits = model(tokens)
        for nope_every in (2, 5):
            other = smollm3.Model(replace(model.config, nope_every=nope_every))
            other.load_state_dict(model.state_dict())
            assert (other(tokens) - logits).abs().max() > 0.1


@pytest.mark.parametrize("case", ["yarn", "yarn-factors-untied"])
def test_yarn_keeps_blends_and_stretches(case):
    config = smollm3.config_from_hf(TestSmolLM3.cases[case].to_dict())
    one = torch.ones(1, 1, dtype=torch.int64)
    angles = [
        torch.atan2(*reversed(smollm3.rotary(one, c, torch.float32)))[0, 0, 0, :8]
        for c in (config, replace(config, yarn=None))
    ]
    ratios = angles[0] / angles[1]
    assert_close(ratios[0], torch.tensor(1.0))
    assert ((ratios > 0.26) & (ratios < 0.99)).any()
    assert_close(ratios[-1], torch.tensor(0.25))


def test_bf16_rounds_where_transformers_rounds():
    """Bit by bit: the norm, and the rotary embedding from positions on."""
    norm, theirs = smollm3.RMSNorm(64, 1e-3).bfloat16(), SmolLM3RMSNorm(64, 1e-3).bfloat16()
    norm.weight.data.uniform_(0.5, 1.5)
    theirs.weight.data.copy_(norm.weight.data)
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16)
    assert torch.equal(norm(x), theirs(x))
    config, positions = smollm3.PRESETS["tiny"], torch.arange(4_000, 4_050).expand(2, -1)
    q = x[:, None, :, : config.head_dim]  # (B, 1, T, head_dim)
    rope = SmolLM3RotaryEmbedding(SmolLM3Config(**smollm3.config_to_hf(config)))(x, positions)
    expected, _ = apply_rotary_pos_emb(q, q, *rope)
    assert torch.equal(smollm3.rotate(q, *smollm3.rotary(positions, config, torch.bfloat16)), expected)


def test_adapters_on_every_linear():
    model = smollm3.Model(smollm3.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 2 * 7
    tokens = torch.randint(0, 512, (2, 16))
    loss, _ = model(tokens, labels=tokens)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
