"""LFM2 is numerically that of transformers: short convolutions and attention."""

import shutil
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from adapters_in_peft import assert_4_bits, assert_same_in_peft_and_merged
from parity import SMALL, FamilyTests, reference
from transformers import Lfm2Config

from litmini.config.finetune import LoraConfig
from litmini.models import lfm2

SHAPE = {key: value for key, value in SMALL.items() if key != "rms_norm_eps"}
SHAPE |= {"intermediate_size": 96, "block_multiple_of": 16, "num_key_value_heads": 2, "max_position_embeddings": 256}
SHAPE |= {"pad_token_id": None}  # else its embedding has no gradient there
SHAPE |= {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}


class TestLfm2(FamilyTests):
    module = lfm2
    cases: ClassVar = {
        "tied": Lfm2Config(**SHAPE),
        "untied-mqa-kernel-biases-eps": Lfm2Config(
            **SHAPE | {"num_key_value_heads": 1},
            conv_L_cache=4,
            conv_bias=True,
            norm_eps=1e-2,
            tie_word_embeddings=False,
        ),
        "attention-only-theta": Lfm2Config(
            **SHAPE | {"layer_types": None}, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
        ),
        "convolutions-only-size-as-given": Lfm2Config(
            **SHAPE | {"layer_types": ["conv"] * 3}, block_auto_adjust_ff_dim=False, conv_L_cache=2
        ),
    }
    refused: ClassVar = {
        "rope_type = 'yarn'": {**SHAPE, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_type = 'linear'": {**SHAPE, "rope_scaling": {"type": "linear", "factor": 2.0}},
        r"layer_types = \['conv', 'sliding_attention', 'conv'\]": {
            **SHAPE,
            "layer_types": ["conv", "sliding_attention", "conv"],
        },
        r"layer_types = \['conv'\]": {**SHAPE, "layer_types": ["conv"]},
        r"full_attn_idxs = \[3\]": {**SHAPE, "layer_types": None, "full_attn_idxs": [3]},
        "quantization_config": {**SHAPE, "quantization_config": {"quant_method": "fp8"}},
    }
    counts: ClassVar = {
        "LiquidAI/LFM2-350M": 354_483_968,
        "LiquidAI/LFM2-700M": 742_489_344,
        "LiquidAI/LFM2-1.2B": 1_170_340_608,
    }


PUBLISHED = {  # of LFM2-1.2B
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_dim": 2048,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-05,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 2048,
    "conv_dim_out": 2048,
    "conv_use_xavier_init": True,
    "eos_token_id": 7,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "model_type": "lfm2",
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_pos_enc": True,
    "vocab_size": 65536,
}


def test_a_published_config():
    """As transformers 4 and 5 write it."""
    preset = lfm2.PRESETS["LiquidAI/LFM2-1.2B"]
    assert lfm2.config_from_hf(PUBLISHED) == preset
    assert lfm2.config_from_hf(Lfm2Config(**PUBLISHED).to_dict()) == preset
    assert lfm2.config_from_hf(Lfm2Config(**lfm2.config_to_hf(preset)).to_dict()) == preset


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"block_ff_dim": 6656, "intermediate_size": 4},
        {"intermediate_size": 1000, "block_ffn_dim_multiplier": 1.3, "block_multiple_of": 48},
        {"intermediate_size": 1000, "block_auto_adjust_ff_dim": False},
        {"tie_embedding": False, "tie_word_embeddings": True},
    ],
)
def test_values_are_read_as_transformers_reads_them(raw):
    """Also the size of the MLP, which is not what config.json says."""
    theirs = Lfm2Config(**{**SHAPE, "intermediate_size": 96, **raw})
    from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

    found = lfm2.config_from_hf({**SHAPE, **raw})
    assert found == lfm2.config_from_hf(theirs.to_dict())
    assert found.ffn_dim == Lfm2MLP(theirs).w1.out_features and found.tied == theirs.tie_word_embeddings


def test_impossible_values_raise():
    for change in ({"n_kv_heads": 3}, {"head_dim": 15}, {"attention": (1, 3)}):
        with pytest.raises(ValueError, match=next(iter(change))):
            replace(lfm2.PRESETS["tiny"], **change)


def test_a_token_sees_three_tokens_in_a_convolution():
    """The output at a token does not change with what stands four before it."""
    layer, x = lfm2.ShortConv(lfm2.PRESETS["tiny"]), torch.randn(1, 8, 64)
    changed = x.clone()
    changed[:, 2] += 1
    runs = lfm2.make_runs(torch.arange(8)[None], None, None)
    different = (layer(x, runs, None) != layer(changed, runs, None)).any(-1)[0]
    assert different.tolist() == [False, False, True, True, True, False, False, False]


@pytest.fixture
def base(tmp_path, tokenizer_dir):
    reference(TestLfm2.cases["tied"]).save_pretrained(tmp_path / "base")
    shutil.copytree(tokenizer_dir, tmp_path / "base", dirs_exist_ok=True)
    return tmp_path / "base"


def test_adapters_are_the_same_in_peft_and_merged(base, tmp_path):
    assert_same_in_peft_and_merged(base, tmp_path, LoraConfig(4, 8.0, 0.0, ["all-linear"]))


def test_4_bits_take_linears_and_leave_convolutions(base):
    linears = {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"}
    assert_4_bits(base, linears, 0.6)
