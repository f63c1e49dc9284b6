"""Gemma 1 is numerically that of transformers, and its checkpoints go in and out unchanged."""

from typing import ClassVar

import parity
import pytest
import torch
from parity import SMALL, FamilyTests, batch
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import gemma

GEMMA = {**SMALL, "hidden_size": 48, "intermediate_size": 80, "head_dim": 16, "max_position_embeddings": 256}
GEMMA["pad_token_id"] = None  # transformers gives the padding token's embedding no gradient; it is in the batches here
PUBLISHED_2B = {  # google/gemma-2b, config.json
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
}


def centred(theirs):
    """The norms multiply by 1 + weight: from 0.5 to 1.5, as in other families."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.sub_(1)
    return theirs


class TestGemma(FamilyTests):
    module = gemma
    cases: ClassVar = {
        "mqa": GemmaConfig(**GEMMA, num_key_value_heads=1),
        "mha": GemmaConfig(**GEMMA, num_key_value_heads=4),
        "gqa-untied": GemmaConfig(**GEMMA, num_key_value_heads=2, tie_word_embeddings=False),
        "heads-wider-than-the-model": GemmaConfig(**{**GEMMA, "head_dim": 64}, num_key_value_heads=1),
        "eps-theta": GemmaConfig(
            **GEMMA,
            num_key_value_heads=2,
            rms_norm_eps=1e-2,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        ),
    }
    refused: ClassVar = {
        "hidden_act": {"model_type": "gemma", "hidden_act": "silu"},
        "hidden_activation": {"model_type": "gemma", "hidden_activation": "gelu"},
        "rope_type": {"model_type": "gemma", "rope_scaling": {"type": "linear", "factor": 2.0}},
        "partial_rotary_factor": {"model_type": "gemma", "partial_rotary_factor": 0.5},
        "attention_bias": {"model_type": "gemma", "attention_bias": True},
        "attention_dropout": {"model_type": "gemma", "attention_dropout": 0.1},
        "use_bidirectional_attention": {"model_type": "gemma", "use_bidirectional_attention": True},
        "quantization_config": {"model_type": "gemma", "quantization_config": {"load_in_4bit": True}},
    }
    counts: ClassVar = {"google/gemma-2b": 2_506_172_416, "google/gemma-7b": 8_537_680_896}

    @pytest.fixture(autouse=True)
    def _norms_around_one(self, monkeypatch):
        original = parity.reference
        monkeypatch.setattr(parity, "reference", lambda config: centred(original(config)))


def test_what_is_missing_is_the_default_of_transformers():
    assert gemma.config_from_hf({"model_type": "gemma"}) == gemma.PRESETS["google/gemma-7b"]
    assert gemma.config_from_hf(GemmaConfig().to_dict()) == gemma.PRESETS["google/gemma-7b"]


def test_published_config_is_the_preset():
    assert gemma.config_from_hf(PUBLISHED_2B) == gemma.PRESETS["google/gemma-2b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_scale_is_rounded_as_in_transformers(dtype):
    """sqrt(48) = 6.9282 is 6.9375 in bf16."""
    theirs = parity.reference(TestGemma.cases["mqa"]).to(dtype)
    model = gemma.Model(gemma.config_from_hf(theirs.config.to_dict())).to(dtype)
    model.load_state_dict(theirs.state_dict())
    (tokens, _), seen = batch(), []
    model.model["layers"][0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens)
    assert torch.equal(seen[0], theirs.model.embed_tokens(tokens))
    if dtype == torch.bfloat16:
        assert torch.equal(seen[0], model.model["embed_tokens"](tokens) * 6.9375)


def test_norm_multiplies_before_it_rounds():
    """Llama's order, or a 1 + weight that is rounded to bf16, differs."""
    x, norm = torch.randn(64, 48).bfloat16(), gemma.RMSNorm(48, 1e-6).bfloat16()
    norm.weight.data.uniform_(-0.5, 0.5)
    theirs = GemmaRMSNorm(48, 1e-6).bfloat16()
    theirs.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), theirs(x))
    rounded = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert not torch.equal(norm(x), (1 + norm.weight) * rounded)


def test_lora_on_every_linear():
    model = gemma.Model(gemma.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    add_adapters(model, LoraConfig(rank=2))
    tokens = torch.randint(0, 512, (2, 32))
    model(tokens, labels=tokens.roll(-1, 1))[0].backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * 7 * model.config.n_layers and all("lora" in name for name in trained)
