"""Gemma 3 (text) is numerically that of transformers, and its checkpoints go in and out unchanged."""

import json
from copy import deepcopy
from dataclasses import replace
from typing import ClassVar

import parity
import pytest
import torch
from parity import SMALL, FamilyTests, batch
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import gemma3

GEMMA3 = {**SMALL, "hidden_size": 48, "intermediate_size": 80, "head_dim": 16, "max_position_embeddings": 256}
GEMMA3["pad_token_id"] = None  # transformers gives the padding token's embedding no gradient; it is in the batches here
GEMMA3 |= {"num_key_value_heads": 2, "sliding_window": 16, "query_pre_attn_scalar": 16}
ROPES = {  # so far apart that a swap shows
    "full_attention": {"rope_type": "default", "rope_theta": 3_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
}
LINEAR = {**ROPES, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0}}
PUBLISHED_1B = {  # google/gemma-3-1b-pt, config.json: written by transformers 4.50
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}
TEXT_OF_4B = {  # text_config in google/gemma-3-4b-pt, config.json: only what differs from transformers' defaults
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}


def centred(theirs):
    """The norms multiply by 1 + weight: from 0.5 to 1.5, as in other families."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.sub_(1)
    return theirs


class TestGemma3(FamilyTests):
    module = gemma3
    cases: ClassVar = {
        "five-to-one": Gemma3TextConfig(**{**GEMMA3, "num_hidden_layers": 7}, rope_parameters=deepcopy(ROPES)),
        "two-to-one-linear": Gemma3TextConfig(
            **{**GEMMA3, "num_hidden_layers": 3, "sliding_window": 7},
            sliding_window_pattern=3,
            rope_parameters=deepcopy(LINEAR),
        ),
        "published-bases": Gemma3TextConfig(**{**GEMMA3, "num_hidden_layers": 6}),
        "all-local": Gemma3TextConfig(**GEMMA3),
        "all-global": Gemma3TextConfig(**GEMMA3, sliding_window_pattern=1),
        "query-scalar": Gemma3TextConfig(**{**GEMMA3, "query_pre_attn_scalar": 9}, sliding_window_pattern=2),
        "mqa-untied": Gemma3TextConfig(
            **{**GEMMA3, "num_key_value_heads": 1, "tie_word_embeddings": False}, sliding_window_pattern=2
        ),
        "mha-eps": Gemma3TextConfig(
            **{**GEMMA3, "num_key_value_heads": 4}, sliding_window_pattern=2, rms_norm_eps=1e-2
        ),
    }
    refused: ClassVar = {
        "hidden_activation": {"model_type": "gemma3_text", "hidden_activation": "gelu"},
        "rope_type": {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "partial_rotary_factor": {"model_type": "gemma3_text", "partial_rotary_factor": 0.5},
        "attention_bias": {"model_type": "gemma3_text", "attention_bias": True},
        "attention_dropout": {"model_type": "gemma3_text", "attention_dropout": 0.1},
        "use_bidirectional_attention": {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "rope_parameters": {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}},
        "sliding_attention": {
            "model_type": "gemma3_text",
            "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
        },
        "attn_logit_softcapping": {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
        "final_logit_softcapping": {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
        "sliding_window": {"model_type": "gemma3_text", "sliding_window": None},
        "layer_types": {"model_type": "gemma3_text", "layer_types": ["full_attention", "sliding_attention"] * 13},
        "quantization_config": {"model_type": "gemma3_text", "quantization_config": {"load_in_4bit": True}},
    }
    counts: ClassVar = {
        "google/gemma-3-270m": 268_098_176,
        "google/gemma-3-1b-pt": 999_885_952,
        "google/medgemma-27b-text-it": 27_009_002_240,
    }

    @pytest.fixture(autouse=True)
    def _norms_around_one(self, monkeypatch):
        original = parity.reference
        monkeypatch.setattr(parity, "reference", lambda config: centred(original(config)))


def test_what_is_missing_is_the_default_of_transformers():
    config = gemma3.config_from_hf({"model_type": "gemma3_text"})
    assert config == gemma3.config_from_hf(json.loads(Gemma3TextConfig().to_json_string()))
    assert (config.rope_theta, config.rope_local_theta, config.global_every) == (1e6, 1e4, 6)


def test_published_config_is_the_preset():
    assert gemma3.config_from_hf(PUBLISHED_1B) == gemma3.PRESETS["google/gemma-3-1b-pt"]


def test_text_part_of_4b_has_the_published_size():
    config = gemma3.config_from_hf(TEXT_OF_4B)
    assert (config.n_heads, config.n_kv_heads, config.rope_factor, config.vocab_size) == (8, 4, 8.0, 262_208)
    with torch.device("meta"):
        size = sum(p.numel() for p in gemma3.Model(config).parameters())
    assert size == 3_880_099_328 + (262_208 - 262_144) * 2560  # published for the vocabulary without image tokens


@pytest.mark.parametrize("old", [PUBLISHED_1B, TEXT_OF_4B, {**TEXT_OF_4B, "sliding_window_pattern": 3}])
def test_both_generations_of_config_json_mean_the_same(old):
    new = json.loads(Gemma3TextConfig(**deepcopy(old)).to_json_string())
    assert "rope_theta" not in new and "rope_scaling" not in new and len(new["layer_types"]) == new["num_hidden_layers"]
    assert gemma3.config_from_hf(new) == gemma3.config_from_hf(old)
    ours = Gemma3TextConfig(**gemma3.config_to_hf(gemma3.config_from_hf(old)))  # has both
    assert ours.rope_parameters == new["rope_parameters"] and ours.layer_types == new["layer_types"]


def test_global_layers_come_where_layer_types_says():
    types = ["sliding_attention", "full_attention"] * 2
    assert gemma3.config_from_hf({"num_hidden_layers": 4, "layer_types": types}).global_every == 2
    for bad in (types[::-1], [*types[:3], "sliding_attention"], types[:3], ["sliding_attention"] * 7):
        with pytest.raises(ValueError, match="layer_types"):
            gemma3.config_from_hf({"num_hidden_layers": 7 if len(bad) == 7 else 4, "layer_types": bad})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_scale_is_rounded_as_in_transformers(dtype):
    """sqrt(48) = 6.9282 is 6.9375 in bf16."""
    theirs = parity.reference(TestGemma3.cases["all-local"]).to(dtype)
    model = gemma3.Model(gemma3.config_from_hf(theirs.config.to_dict())).to(dtype)
    model.load_state_dict(theirs.state_dict())
    (tokens, _), seen = batch(), []
    model.model["layers"][0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens)
    assert torch.equal(seen[0], theirs.model.embed_tokens(tokens))
    if dtype == torch.bfloat16:
        assert torch.equal(seen[0], model.model["embed_tokens"](tokens) * 6.9375)


def test_transformers_really_applies_the_windows_that_we_are_compared_with():
    theirs = parity.reference(TestGemma3.cases["two-to-one-linear"])
    tokens, _ = batch()
    distance = torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])
    for i, weights in enumerate(theirs(tokens, output_attentions=True).attentions):
        seen = (distance >= 0) & (distance < 7) if i < 2 else distance >= 0
        assert torch.equal((weights > 0).all(0).all(0), seen)


@pytest.mark.parametrize(
    "change",
    [
        {"query_scalar": 9},
        {"window": 8},
        {"window": 100},
        {"global_every": 2},
        {"rope_factor": 1.0},
        {"rope_theta": 30.0},
        {"rope_local_theta": 300.0},
    ],
)
def test_each_number_matters_in_the_comparison(change):
    """Otherwise the comparison with transformers would not notice that one is ignored."""
    theirs = centred(parity.reference(TestGemma3.cases["two-to-one-linear"]))
    config, (tokens, _) = gemma3.config_from_hf(theirs.config.to_dict()), batch()
    model = gemma3.Model(replace(config, **change))
    model.load_state_dict(theirs.state_dict())
    assert (model(tokens) - theirs(tokens, use_cache=False).logits).abs().max() > 0.05


def test_norm_multiplies_before_it_rounds():
    """Llama's order, or a 1 + weight that is rounded to bf16, differs."""
    x, norm = torch.randn(64, 48).bfloat16(), gemma3.RMSNorm(48, 1e-6).bfloat16()
    norm.weight.data.uniform_(-0.5, 0.5)
    theirs = Gemma3RMSNorm(48, 1e-6).bfloat16()
    theirs.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), theirs(x))
    rounded = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert not torch.equal(norm(x), (1 + norm.weight) * rounded)


def test_lora_on_every_linear():
    model = gemma3.Model(gemma3.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    add_adapters(model, LoraConfig(rank=2))
    tokens = torch.randint(0, 512, (2, 32))
    model(tokens, labels=tokens.roll(-1, 1))[0].backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * 7 * model.config.n_layers and all("lora" in name for name in trained)
