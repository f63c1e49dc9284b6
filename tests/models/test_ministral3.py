"""Ministral 3 is numerically that of transformers, and its checkpoints go in and out unchanged."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from numerics import assert_close
from parity import SMALL, FamilyTests, batch, reference
from transformers import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3RotaryEmbedding,
    apply_rotary_pos_emb,
    get_llama_4_attn_scale,
)

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import ministral3

SHAPE = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16}
SHAPE |= {"pad_token_id": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
YARN |= {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}  # 61 tokens are four lengths
PLAIN = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 9}


class TestMinistral3(FamilyTests):
    module = ministral3
    cases: ClassVar = {
        "gqa": Ministral3Config(**SHAPE, rope_parameters=YARN),
        "mqa-tied": Ministral3Config(
            **{**SHAPE, "num_key_value_heads": 1}, rope_parameters=YARN, tie_word_embeddings=True
        ),
        "mha-eps-mscale": Ministral3Config(
            **{**SHAPE, "num_key_value_heads": 4}, rms_norm_eps=1e-2, rope_parameters={**YARN, "mscale": 2.0}
        ),
        "wide-heads-no-yarn": Ministral3Config(**{**SHAPE, "head_dim": 24}, rope_parameters=PLAIN),
        "window": Ministral3Config(**SHAPE, sliding_window=7, rope_parameters=PLAIN),
        "yarn-factors": Ministral3Config(
            **SHAPE, rope_parameters={**YARN, "attention_factor": 1.4, "beta_fast": 8.0, "beta_slow": 2.0}
        ),
        "no-settings": Ministral3Config(**SHAPE),  # transformers' own
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": Ministral3Config(**SHAPE, hidden_act="gelu").to_dict(),
        "rope_type = 'linear'": {**SHAPE, "rope_parameters": {**YARN, "rope_type": "linear"}},
        "truncate = False": {**SHAPE, "rope_parameters": {**YARN, "truncate": False}},
        "partial_rotary_factor = 0.5": {**SHAPE, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
        "attention_dropout = 0.1": Ministral3Config(**SHAPE, attention_dropout=0.1).to_dict(),
        "layer_types = ": {**SHAPE, "layer_types": ["sliding_attention"] * 2},
        "quantization_config": {**SHAPE, "quantization_config": {"quant_method": "fp8"}},
    }
    counts: ClassVar = {
        "mistralai/Ministral-3-3B-Base-2512": 3_429_006_336,
        "mistralai/Ministral-3-8B-Base-2512": 8_489_553_920,
        "mistralai/Ministral-3-14B-Base-2512": 13_506_073_600,
    }

    def test_positions_far_away_in_bf16(self, case, directory, monkeypatch):
        """Without the scale of the queries, which grows with the position, distances alone count."""
        monkeypatch.setattr(ministral3, "query_scale", lambda positions, config, dtype: torch.ones((), dtype=dtype))
        super().test_positions_far_away_in_bf16(case, directory)


def test_the_published_config():
    """text_config of Ministral-3-3B-Instruct-2512."""
    rope = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
    }
    published = {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "max_position_embeddings": 262144,
        "model_type": "ministral3",
        "num_attention_heads": 32,
        "num_hidden_layers": 26,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_parameters": rope,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 131072,
    }
    preset = ministral3.PRESETS["mistralai/Ministral-3-3B-Base-2512"]
    assert ministral3.config_from_hf(published) == preset
    assert ministral3.config_from_hf(Ministral3Config(**published).to_dict()) == preset
    assert ministral3.config_from_hf(Ministral3Config(**ministral3.config_to_hf(preset)).to_dict()) == preset


def test_values_that_are_left_out_are_those_of_transformers():
    assert ministral3.config_from_hf({}) == ministral3.config_from_hf(Ministral3Config().to_dict())
    with pytest.raises(KeyError, match="llama_4_scaling_beta"):
        ministral3.config_from_hf({"rope_parameters": {"rope_type": "default"}})
    wrong = {**PLAIN, "original_max_position_embeddings": 0}
    with pytest.raises(ValueError, match="original_max_position_embeddings = 0, expected a whole number above 0"):
        ministral3.config_from_hf({**SHAPE, "rope_parameters": wrong})


def test_the_scale_of_the_queries_matters(tmp_path):
    theirs = reference(TestMinistral3.cases["gqa"])
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    model, (tokens, _) = load_model(tmp_path, torch.float32), batch()
    with torch.no_grad():
        logits = model(tokens)
        other = ministral3.Model(replace(model.config, scale_beta=0.0)).eval()
        other.load_state_dict(model.state_dict())
        unscaled = other(tokens)
    assert_close(unscaled[:, :16], logits[:, :16])
    assert (unscaled[:, 16:] - logits[:, 16:]).abs().max() > 0.1


def test_bf16_rounds_where_transformers_rounds():
    """Bit by bit: rotary embedding and scale, from positions on."""
    config, positions = ministral3.PRESETS["tiny"], torch.arange(4_000, 4_050).expand(2, -1)
    x = torch.randn(2, 1, 50, config.head_dim, dtype=torch.bfloat16)
    rope = Ministral3RotaryEmbedding(Ministral3Config(**ministral3.config_to_hf(config)))(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, *rope)
    assert torch.equal(ministral3.rotate(x, *ministral3.rotary(positions, config, torch.bfloat16)), expected)
    positions = torch.arange(0, 400, 8)[None]
    scale = get_llama_4_attn_scale(positions, config.scale_beta, config.original_positions).bfloat16()
    found = ministral3.query_scale(positions, config, torch.bfloat16)
    assert torch.equal(found, scale) and len(scale.unique()) == 7
    assert (ministral3.query_scale(torch.tensor([[-1, 0]]), config, torch.bfloat16) == 1).all()  # padding


def test_adapters_on_every_linear():
    model = ministral3.Model(ministral3.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 2 * 7
    tokens = torch.randint(0, 512, (2, 16))
    loss, _ = model(tokens, labels=tokens)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"window": 0}, "window 0 is below 1"),
        ({"original_positions": 9}, "original_positions are 64, not 9"),
    ],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ministral3.PRESETS["tiny"], **change)
