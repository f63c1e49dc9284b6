"""Gemma 2 is numerically that of transformers, and its checkpoints go in and out unchanged."""

from dataclasses import replace
from typing import ClassVar

import parity
import pytest
import torch
from numerics import assert_close
from parity import SMALL, FamilyTests, batch
from transformers import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import gemma2

GEMMA2 = {**SMALL, "hidden_size": 48, "intermediate_size": 80, "head_dim": 16, "max_position_embeddings": 256}
GEMMA2["pad_token_id"] = None  # transformers gives the padding token's embedding no gradient; it is in the batches here
GEMMA2 |= {"num_key_value_heads": 2, "sliding_window": 16, "query_pre_attn_scalar": 16}
PUBLISHED_27B = {  # google/gemma-2-27b, config.json
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "initializer_range": 0.02,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 256000,
    "_attn_implementation": "eager",
}


def centred(theirs):
    """The norms multiply by 1 + weight: from 0.5 to 1.5, as in other families."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.sub_(1)
    return theirs


class TestGemma2(FamilyTests):
    module = gemma2
    cases: ClassVar = {
        "gqa": Gemma2Config(**GEMMA2),
        "three-layers": Gemma2Config(**{**GEMMA2, "num_hidden_layers": 3, "sliding_window": 7}),
        "window-of-one": Gemma2Config(**{**GEMMA2, "sliding_window": 1}),
        "window-beyond-the-end": Gemma2Config(**{**GEMMA2, "sliding_window": 100}),
        "low-caps": Gemma2Config(**GEMMA2, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
        "query-scalar": Gemma2Config(**{**GEMMA2, "query_pre_attn_scalar": 9}),
        "mqa-untied": Gemma2Config(**{**GEMMA2, "num_key_value_heads": 1, "tie_word_embeddings": False}),
        "mha-eps-theta": Gemma2Config(
            **{**GEMMA2, "num_key_value_heads": 4},
            rms_norm_eps=1e-2,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        ),
    }
    refused: ClassVar = {
        "hidden_activation": {"model_type": "gemma2", "hidden_activation": "gelu"},
        "rope_type": {"model_type": "gemma2", "rope_scaling": {"type": "linear", "factor": 2.0}},
        "partial_rotary_factor": {"model_type": "gemma2", "partial_rotary_factor": 0.5},
        "attention_bias": {"model_type": "gemma2", "attention_bias": True},
        "attention_dropout": {"model_type": "gemma2", "attention_dropout": 0.1},
        "use_bidirectional_attention": {"model_type": "gemma2", "use_bidirectional_attention": True},
        "attn_logit_softcapping": {"model_type": "gemma2", "attn_logit_softcapping": None},
        "final_logit_softcapping": {"model_type": "gemma2", "final_logit_softcapping": None},
        "sliding_window": {"model_type": "gemma2", "sliding_window": None},
        "layer_types": {"model_type": "gemma2", "layer_types": ["full_attention"] * 26},
        "quantization_config": {"model_type": "gemma2", "quantization_config": {"load_in_4bit": True}},
    }
    counts: ClassVar = {
        "google/gemma-2-2b": 2_614_341_888,
        "google/gemma-2-9b": 9_241_705_984,
        "google/gemma-2-27b": 27_227_128_320,
    }

    @pytest.fixture(autouse=True)
    def _norms_around_one(self, monkeypatch):
        original = parity.reference
        monkeypatch.setattr(parity, "reference", lambda config: centred(original(config)))


def test_what_is_missing_is_the_default_of_transformers():
    assert gemma2.config_from_hf({"model_type": "gemma2"}) == gemma2.PRESETS["google/gemma-2-2b"]
    assert gemma2.config_from_hf(Gemma2Config().to_dict()) == gemma2.PRESETS["google/gemma-2-2b"]


def test_published_config_is_the_preset():
    assert gemma2.config_from_hf(PUBLISHED_27B) == gemma2.PRESETS["google/gemma-2-27b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_scale_is_rounded_as_in_transformers(dtype):
    """sqrt(48) = 6.9282 is 6.9375 in bf16."""
    theirs = parity.reference(TestGemma2.cases["gqa"]).to(dtype)
    model = gemma2.Model(gemma2.config_from_hf(theirs.config.to_dict())).to(dtype)
    model.load_state_dict(theirs.state_dict())
    (tokens, _), seen = batch(), []
    model.model["layers"][0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens)
    assert torch.equal(seen[0], theirs.model.embed_tokens(tokens))
    if dtype == torch.bfloat16:
        assert torch.equal(seen[0], model.model["embed_tokens"](tokens) * 6.9375)


def test_transformers_really_applies_the_windows_that_we_are_compared_with():
    theirs = parity.reference(TestGemma2.cases["three-layers"])
    tokens, _ = batch()
    distance = torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])
    for i, weights in enumerate(theirs(tokens, output_attentions=True).attentions):
        seen = (distance >= 0) & (distance < 7) if i % 2 == 0 else distance >= 0
        assert torch.equal((weights > 0).all(0).all(0), seen)


@pytest.mark.parametrize(
    "change", [{"attn_softcap": 1e4}, {"logit_softcap": 1e4}, {"query_scalar": 16}, {"window": 17}, {"window": 100}]
)
def test_each_number_matters_in_the_comparison(change):
    """Otherwise the comparison with transformers would not notice that one is ignored."""
    settings = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    theirs = centred(parity.reference(Gemma2Config(**{**GEMMA2, **settings, "query_pre_attn_scalar": 9})))
    config = gemma2.config_from_hf(theirs.config.to_dict())
    tokens, _ = batch()
    expected = theirs(tokens, use_cache=False).logits
    model = gemma2.Model(replace(config, **change))
    model.load_state_dict(theirs.state_dict())
    assert (model(tokens) - expected).abs().max() > 0.05


def test_logits_are_capped_with_and_without_labels():
    theirs = centred(parity.reference(TestGemma2.cases["low-caps"]))
    model = gemma2.Model(gemma2.config_from_hf(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict())
    tokens, labels = batch()
    logits = model(tokens)
    assert 2.5 < logits.abs().max() < 3
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert_close(model(tokens, labels=labels)[0], expected)


def test_norm_multiplies_before_it_rounds():
    """Llama's order, or a 1 + weight that is rounded to bf16, differs."""
    x, norm = torch.randn(64, 48).bfloat16(), gemma2.RMSNorm(48, 1e-6).bfloat16()
    norm.weight.data.uniform_(-0.5, 0.5)
    theirs = Gemma2RMSNorm(48, 1e-6).bfloat16()
    theirs.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), theirs(x))
    rounded = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert not torch.equal(norm(x), (1 + norm.weight) * rounded)


def test_lora_on_every_linear():
    model = gemma2.Model(gemma2.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    add_adapters(model, LoraConfig(rank=2))
    tokens = torch.randint(0, 512, (2, 32))
    model(tokens, labels=tokens.roll(-1, 1))[0].backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * 7 * model.config.n_layers and all("lora" in name for name in trained)
