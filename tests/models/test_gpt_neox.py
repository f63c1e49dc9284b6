"""GPT-NeoX is numerically that of transformers, and its checkpoints go in and out unchanged."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from numerics import assert_close
from parity import SMALL, FamilyTests, T, batch, reference
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import gpt_neox

SIZES = {**SMALL, "intermediate_size": 80, "max_position_embeddings": 256}
PYTHIA = {  # config.json on the hub: hidden_size, num_hidden_layers, num_attention_heads, vocab_size
    "EleutherAI/pythia-14m": (128, 6, 4, 50304),
    "EleutherAI/pythia-31m": (256, 6, 8, 50304),
    "EleutherAI/pythia-70m": (512, 6, 8, 50304),
    "EleutherAI/pythia-160m": (768, 12, 12, 50304),
    "EleutherAI/pythia-410m": (1024, 24, 16, 50304),
    "EleutherAI/pythia-1b": (2048, 16, 8, 50304),
    "EleutherAI/pythia-1.4b": (2048, 24, 16, 50304),
    "EleutherAI/pythia-2.8b": (2560, 32, 32, 50304),
    "EleutherAI/pythia-6.9b": (4096, 32, 32, 50432),
    "EleutherAI/pythia-12b": (5120, 36, 40, 50688),
}


def rope(fraction: float, theta: float = 10_000.0) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": fraction}}


class TestGPTNeoX(FamilyTests):
    module = gpt_neox
    cases: ClassVar = {
        "pythia": GPTNeoXConfig(**SIZES),
        "one-after-the-other": GPTNeoXConfig(**SIZES, **rope(1.0), use_parallel_residual=False),
        "half-rotated-eps": GPTNeoXConfig(
            **{**SIZES, "num_hidden_layers": 3, "num_attention_heads": 2}, **rope(0.5, 500.0), layer_norm_eps=1e-2
        ),
        "one-pair-of-24": GPTNeoXConfig(**{**SIZES, "hidden_size": 72, "num_attention_heads": 3}, **rope(0.1)),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu_fast'": GPTNeoXConfig(**SIZES, hidden_act="gelu_fast").to_dict(),
        "rope_type = 'linear'": {**GPTNeoXConfig(**SIZES).to_dict(), "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type = 'yarn'": {**GPTNeoXConfig(**SIZES).to_dict(), "rope_parameters": {"rope_type": "yarn"}},
        "attention_bias = False": GPTNeoXConfig(**SIZES, attention_bias=False).to_dict(),
        "head_dim = 32": {**GPTNeoXConfig(**SIZES).to_dict(), "head_dim": 32},
        "attention_dropout = 0.1": GPTNeoXConfig(**SIZES, attention_dropout=0.1).to_dict(),
        "hidden_dropout = 0.1": GPTNeoXConfig(**SIZES, hidden_dropout=0.1).to_dict(),
        "tie_word_embeddings = True": GPTNeoXConfig(**SIZES, tie_word_embeddings=True).to_dict(),
        "quantization_config": {**GPTNeoXConfig(**SIZES).to_dict(), "quantization_config": {"quant_method": "gptq"}},
    }
    counts: ClassVar = {
        "EleutherAI/pythia-14m": 14_067_712,
        "EleutherAI/pythia-31m": 30_494_720,
        "EleutherAI/pythia-70m": 70_426_624,
        "EleutherAI/pythia-160m": 162_322_944,
        "EleutherAI/pythia-410m": 405_334_016,
        "EleutherAI/pythia-1b": 1_011_781_632,
        "EleutherAI/pythia-1.4b": 1_414_647_808,
        "EleutherAI/pythia-2.8b": 2_775_208_960,
        "EleutherAI/pythia-6.9b": 6_857_302_016,
        "EleutherAI/pythia-12b": 11_846_072_320,
        "togethercomputer/RedPajama-INCITE-Base-3B-v1": 2_775_864_320,
    }

    def their_gradients(self, theirs):
        """On disk the head is embed_out, as ever; transformers 5 calls it lm_head in memory."""
        found = super().their_gradients(theirs)
        return {name.replace("lm_head.", "embed_out."): gradient for name, gradient in found.items()}

    def test_old_files_hold_buffers_too(self, directory):
        theirs = reference(GPTNeoXConfig(**SIZES))
        path = directory(theirs)
        tensors = load_file(path / "model.safetensors")
        for i in range(2):
            where = f"gpt_neox.layers.{i}.attention"
            tensors[f"{where}.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
            tensors[f"{where}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{where}.rotary_emb.inv_freq"] = torch.ones(2)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        assert {name for name, _ in gpt_neox.from_hf(tensors.items(), None)} == {
            name.replace("lm_head.", "embed_out.") for name, _ in theirs.named_parameters()
        }
        tokens, _ = batch()
        expected = theirs(tokens, use_cache=False).logits
        assert_close(load_model(path, torch.float32)(tokens), expected)

    @pytest.mark.parametrize("change", [{"parallel": False}, {"rotary_pct": 0.5}, {"rope_theta": 500.0}])
    def test_each_setting_matters_in_the_comparison(self, directory, change):
        model, (tokens, _) = load_model(directory(reference(GPTNeoXConfig(**SIZES))), torch.float32), batch()
        other = gpt_neox.Model(replace(model.config, **change))
        other.load_state_dict(model.state_dict())
        assert (model(tokens) - other(tokens)).abs().max() > 0.01

    def test_left_padded_batch(self, directory):
        theirs = reference(GPTNeoXConfig(**SIZES))
        model, (tokens, _) = load_model(directory(theirs), torch.float32), batch()
        positions = torch.arange(T) - torch.tensor([[0], [20]])
        real = positions >= 0
        expected = theirs(
            tokens, attention_mask=real.long(), position_ids=positions.clamp(min=0), use_cache=False
        ).logits
        assert_close(model(tokens, positions)[real], expected[real])


@pytest.mark.parametrize("name", PYTHIA)
def test_published_config(name):
    dim, layers, heads, vocab_size = PYTHIA[name]
    raw = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "vocab_size": vocab_size,
    }
    raw |= {"hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * dim}
    raw |= {"layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "rotary_emb_base": 10000, "rotary_pct": 0.25}
    raw |= {"tie_word_embeddings": False, "use_parallel_residual": True}
    assert gpt_neox.config_from_hf(raw) == gpt_neox.PRESETS[name]
    theirs = GPTNeoXConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    assert gpt_neox.config_from_hf(json.loads(theirs.to_json_string())) == gpt_neox.PRESETS[name]


def test_both_generations_of_config_json():
    new = json.loads(GPTNeoXConfig(**SIZES, **rope(0.5, 500.0)).to_json_string())
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    config = gpt_neox.config_from_hf({**old, "rotary_emb_base": 500, "rotary_pct": 0.5})
    assert config == gpt_neox.config_from_hf(new) and config.rope_theta == 500.0
    written = gpt_neox.config_to_hf(config)
    assert gpt_neox.config_from_hf(GPTNeoXConfig(**written).to_dict()) == config
    for generation in (("rope_parameters",), ("rotary_emb_base", "rotary_pct")):  # either is enough
        assert gpt_neox.config_from_hf({k: v for k, v in written.items() if k not in generation}) == config


def test_values_that_are_left_out_are_those_of_transformers():
    shape = {key: SIZES[key] for key in SIZES if key != "max_position_embeddings"}
    assert gpt_neox.config_from_hf(shape) == gpt_neox.config_from_hf(GPTNeoXConfig(**shape).to_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_heads": 3}, "dim 64 is not a multiple of n_heads 3"),
        ({"rotary_pct": 0.2}, "rotary_pct 0.2 of head_dim 16 is 3: rotary rotates pairs"),
        ({"rotary_pct": 2.0}, "rotary_pct 2.0 of head_dim 16 is 32"),
    ],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(gpt_neox.PRESETS["tiny"], **change)


def test_adapters_on_every_linear():
    model = gpt_neox.Model(gpt_neox.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 4 * model.config.n_layers
    tokens = torch.randint(0, 512, (2, 32))
    loss, _ = model(tokens, labels=tokens)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(names) and all(g is not None and g.isfinite().all() for g in gradients.values())
