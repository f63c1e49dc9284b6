"""Phi-1, 1.5 and 2 are numerically those of transformers, and their checkpoints go in and out unchanged."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from numerics import assert_close
from parity import SMALL, FamilyTests, T, batch, reference
from transformers import PhiConfig

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import phi

SIZES = {**SMALL, "intermediate_size": 80, "max_position_embeddings": 256}
PUBLISHED = {  # config.json on the hub: hidden_size, num_hidden_layers, partial_rotary_factor, resid_pdrop
    "microsoft/phi-1": (2048, 24, 0.5, 0.0),
    "microsoft/phi-1_5": (2048, 24, 0.5, 0.0),
    "microsoft/phi-2": (2560, 32, 0.4, 0.1),
}


def rope(fraction: float, theta: float = 10_000.0) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": fraction}}


class TestPhi(FamilyTests):
    module = phi
    cases: ClassVar = {
        "phi-1": PhiConfig(**SIZES),
        "phi-2": PhiConfig(
            **{**SIZES, "hidden_size": 80}, **rope(0.4), resid_pdrop=0.1
        ),  # 8 of 20 rotated, as 32 of 80
        "all-rotated-eps": PhiConfig(**{**SIZES, "num_hidden_layers": 3}, **rope(1.0, 500.0), layer_norm_eps=1e-2),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": PhiConfig(**SIZES, hidden_act="gelu").to_dict(),
        "rope_type = 'linear'": {**PhiConfig(**SIZES).to_dict(), "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type = 'dynamic'": {**PhiConfig(**SIZES).to_dict(), "rope_parameters": {"rope_type": "dynamic"}},
        "qk_layernorm = True": PhiConfig(**SIZES, qk_layernorm=True).to_dict(),
        "head_dim = 32": {**PhiConfig(**SIZES).to_dict(), "head_dim": 32},
        "num_key_value_heads = 2": PhiConfig(**SIZES, num_key_value_heads=2).to_dict(),
        "attention_dropout = 0.1": PhiConfig(**SIZES, attention_dropout=0.1).to_dict(),
        "embd_pdrop = 0.1": PhiConfig(**SIZES, embd_pdrop=0.1).to_dict(),
        "tie_word_embeddings = True": PhiConfig(**SIZES, tie_word_embeddings=True).to_dict(),
        "quantization_config": {**PhiConfig(**SIZES).to_dict(), "quantization_config": {"quant_method": "gptq"}},
    }
    counts: ClassVar = {
        "microsoft/phi-1": 1_418_270_720,
        "microsoft/phi-1_5": 1_418_270_720,
        "microsoft/phi-2": 2_779_683_840,
    }

    def test_dropout_is_that_of_transformers(self, directory):
        """Drops the same values for the same seed, in training only."""
        theirs = reference(self.cases["phi-2"])
        model, (tokens, _) = load_model(directory(theirs), torch.float32), batch()
        calm = model(tokens)
        outputs = []
        for one in (theirs.train(), model.train()):
            torch.manual_seed(1)
            outputs.append(one(tokens))
        assert_close(outputs[1], outputs[0].logits)
        assert (outputs[1] - calm).abs().max() > 0.1

    @pytest.mark.parametrize("change", [{"rotary_pct": 0.25}, {"rope_theta": 500.0}])
    def test_each_setting_matters_in_the_comparison(self, directory, change):
        model, (tokens, _) = load_model(directory(reference(PhiConfig(**SIZES))), torch.float32), batch()
        other = phi.Model(replace(model.config, **change))
        other.load_state_dict(model.state_dict())
        assert (model(tokens) - other(tokens)).abs().max() > 0.1

    def test_left_padded_batch(self, directory):
        theirs = reference(PhiConfig(**SIZES))
        model, (tokens, _) = load_model(directory(theirs), torch.float32), batch()
        positions = torch.arange(T) - torch.tensor([[0], [20]])
        real = positions >= 0
        expected = theirs(
            tokens, attention_mask=real.long(), position_ids=positions.clamp(min=0), use_cache=False
        ).logits
        assert_close(model(tokens, positions)[real], expected[real])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    dim, layers, share, dropout = PUBLISHED[name]
    raw = {"architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_act": "gelu_new", "vocab_size": 51200}
    raw |= {"hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": 32, "intermediate_size": 4 * dim}
    raw |= {"num_key_value_heads": None, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048}
    raw |= {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": share, "qk_layernorm": False}
    raw |= {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": dropout, "tie_word_embeddings": False}
    assert phi.config_from_hf(raw) == phi.PRESETS[name]
    theirs = PhiConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    assert phi.config_from_hf(json.loads(theirs.to_json_string())) == phi.PRESETS[name]


def test_both_generations_of_config_json():
    new = json.loads(PhiConfig(**SIZES, **rope(0.25, 500.0)).to_json_string())
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    config = phi.config_from_hf({**old, "rope_theta": 500, "partial_rotary_factor": 0.25})
    assert config == phi.config_from_hf(new) and config.rope_theta == 500.0
    written = phi.config_to_hf(config)
    assert phi.config_from_hf(PhiConfig(**written).to_dict()) == config
    for generation in (("rope_parameters",), ("rope_theta", "partial_rotary_factor")):  # either is enough
        assert phi.config_from_hf({k: v for k, v in written.items() if k not in generation}) == config


def test_values_that_are_left_out_are_those_of_transformers():
    shape = {key: SIZES[key] for key in SIZES if key != "max_position_embeddings"}
    assert phi.config_from_hf(shape) == phi.config_from_hf(PhiConfig(**shape).to_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_heads": 3}, "dim 64 is not a multiple of n_heads 3"),
        ({"rotary_pct": 0.2}, "rotary_pct 0.2 of head_dim 16 is 3: rotary rotates pairs"),
        ({"rotary_pct": 0.0}, "rotary_pct 0.0 of head_dim 16 is 0"),
    ],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(phi.PRESETS["tiny"], **change)


def test_adapters_on_every_linear():
    model = phi.Model(phi.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 6 * model.config.n_layers
    tokens = torch.randint(0, 512, (2, 32))
    loss, _ = model(tokens, labels=tokens)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(names) and all(g is not None and g.isfinite().all() for g in gradients.values())
