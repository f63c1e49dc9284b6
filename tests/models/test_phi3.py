"""Phi-3 and Phi-4 are numerically those of transformers, and their checkpoints go in and out unchanged."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from numerics import assert_close
from parity import SMALL, VOCAB, FamilyTests, T, batch, reference
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm, Phi3RotaryEmbedding, apply_rotary_pos_emb

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import phi3
from litmini.ops.kv_cache import KVCache

SHAPE = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 256}
SHAPE |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def longrope(n: int, kind: str = "longrope") -> dict:
    return {
        "type": kind,
        "short_factor": [1.0 + 0.05 * i for i in range(n)],
        "long_factor": [1.3 + 0.9 * i for i in range(n)],
    }


PARTIAL = {"partial_rotary_factor": 0.75, "rope_theta": 500.0}
# T = 61: the first is short throughout, the others long; packed and padded rows hold texts on both sides of 24
SHORT = {**SHAPE, "original_max_position_embeddings": 64}
LONG = {**SHAPE, "original_max_position_embeddings": 24}


class TestPhi3(FamilyTests):
    module = phi3
    cases: ClassVar = {
        "gqa": Phi3Config(**SHAPE),
        "mha-window-eps": Phi3Config(**{**SHAPE, "num_key_value_heads": 4}, sliding_window=7, rms_norm_eps=1e-2),
        "mqa-tied-partial": Phi3Config(
            **{**SHAPE, "num_key_value_heads": 1}, **PARTIAL, tie_word_embeddings=True, sliding_window=262144
        ),
        "longrope-short": Phi3Config(**SHORT, rope_scaling=longrope(8)),
        "longrope-long": Phi3Config(**LONG, rope_scaling=longrope(8)),
        "longrope-long-partial-tied-window": Phi3Config(
            **LONG, **PARTIAL, rope_scaling=longrope(6), tie_word_embeddings=True, sliding_window=16
        ),
        "longrope-that-stretches-nothing": Phi3Config(
            **{**SHAPE, "max_position_embeddings": 24}, original_max_position_embeddings=24, rope_scaling=longrope(8)
        ),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": Phi3Config(**SHAPE, hidden_act="gelu").to_dict(),
        "rope_type = 'linear'": {**SHAPE, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "factor = 7.0": {**SHORT, "rope_scaling": {**longrope(8), "factor": 7.0}},
        "attention_factor = 1.1": {**SHORT, "rope_scaling": {**longrope(8), "attention_factor": 1.1}},
        "original_max_position_embeddings = 32": {
            **SHORT,
            "rope_scaling": {**longrope(8), "original_max_position_embeddings": 32},
        },
        "attention_bias = True": {**SHAPE, "attention_bias": True},
        "mlp_bias = True": {**SHAPE, "mlp_bias": True},
        "lm_head_bias = True": {**SHAPE, "lm_head_bias": True},
        "attention_dropout = 0.1": Phi3Config(**SHAPE, attention_dropout=0.1).to_dict(),
        "embd_pdrop = 0.1": Phi3Config(**SHAPE, embd_pdrop=0.1).to_dict(),
        "resid_pdrop = 0.1": Phi3Config(**SHAPE, resid_pdrop=0.1).to_dict(),
        "quantization_config": {**SHAPE, "quantization_config": {"quant_method": "awq"}},
    }
    counts: ClassVar = {
        "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
        "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
        "microsoft/phi-4": 14_659_507_200,
        "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    }

    def test_positions_far_away_in_bf16(self, case, directory):
        """As in every family, but for LongRoPE both positions are beyond its original length: factors change there."""
        model, (tokens, _) = load_model(directory(reference(self.cases[case])), torch.bfloat16), batch(1, 6)
        steps, start = torch.arange(6)[None], 100 if model.config.long_rope else 0
        with torch.no_grad():
            near, far = model(tokens, positions=steps + start).float(), model(tokens, positions=steps + 9_000).float()
        assert (near - far).abs().max() < 0.1 * near.abs().max()


@pytest.mark.parametrize("length", [1, 23, 24, 25, 26, T])
def test_factors_change_where_they_do_in_transformers(length, tmp_path):
    theirs = reference(TestPhi3.cases["longrope-long"])
    model = phi3.Model(phi3.config_from_hf(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict())
    tokens, _ = batch(2, length)
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        assert_close(model(tokens), expected)
        if length == T:
            short = phi3.Model(replace(model.config, long_rope=replace(model.config.long_rope, original_positions=64)))
            short.load_state_dict(theirs.state_dict())
            assert (short(tokens) - expected).abs().max() > 0.1


def test_each_text_of_a_batch_has_its_own_factors():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [-1, 0, 1, 2, 3, 4]])
    documents = torch.tensor([[1, 1, 1, 2, 2, 1], [0, 5, 5, 5, 5, 5]])
    assert phi3.text_lengths(positions, documents, None).tolist() == [[3, 3, 3, 2, 2, 1], [0, 5, 5, 5, 5, 5]]
    assert phi3.text_lengths(positions, None, None).tolist() == [[3], [5]]


def test_a_cache_has_the_factors_of_the_length_that_it_has_room_for():
    """So keys of one text are all rotated alike; with room for 24 tokens they are those of a short text."""
    model = phi3.Model(phi3.config_from_hf(TestPhi3.cases["longrope-long"].to_dict()))
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, VOCAB, (1, 60))
    with torch.no_grad():
        for length in (24, 60):
            cache = KVCache(model.config, 1, length, torch.float32)
            parts = [model(part, cache=cache) for part in tokens[:, :length].split(7, dim=1)]
            assert_close(torch.cat(parts, 1), model(tokens[:, :length]))


def test_rotary_at_the_size_of_the_published_model():
    config = phi3.PRESETS["microsoft/Phi-4-mini-instruct"]
    theirs = Phi3RotaryEmbedding(Phi3Config(**phi3.config_to_hf(config)))
    for last in (4_095, 4_096, 131_071):
        positions = torch.tensor([[0, 1, 100, last]])
        ours = phi3.rotary(positions, phi3.text_lengths(positions, None, None), config, torch.float32)
        for found, want in zip(ours, theirs(torch.zeros(1), positions), strict=True):
            assert want.shape == (1, 4, 96)
            torch.testing.assert_close(found[:, 0, :3], want[:, :3], rtol=0, atol=2e-5)
            torch.testing.assert_close(found[:, 0], want, rtol=0, atol=2e-2)  # an ulp of the angle is 8e-3 there


def test_config_of_the_first_generation():
    """Phi-3-mini-4k-instruct's and Phi-4-mini-instruct's own config.json."""
    third = {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32064,
    }
    mini = phi3.PRESETS["microsoft/Phi-4-mini-instruct"]
    fourth = {
        **third,
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "long_factor": [1, *mini.long_rope.long_factors[1:]],
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    }
    for raw, name in ((third, "microsoft/Phi-3-mini-4k-instruct"), (fourth, "microsoft/Phi-4-mini-instruct")):
        preset = phi3.PRESETS[name]
        assert phi3.config_from_hf(raw) == preset
        assert phi3.config_from_hf(Phi3Config(**raw).to_dict()) == preset
        written = phi3.config_to_hf(preset)
        assert phi3.config_from_hf({k: v for k, v in written.items() if k != "rope_parameters"}) == preset
        assert phi3.config_from_hf({**written, "rope_scaling": None}) == preset
        assert phi3.config_from_hf(Phi3Config(**written).to_dict()) == preset
    su = {**fourth, "rope_scaling": {**fourth["rope_scaling"], "type": "su"}}  # in the first Phi-3-128k files
    assert phi3.config_from_hf(su) == mini


def test_values_that_are_left_out_are_those_of_transformers():
    shape = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    for more in ({}, {"rope_scaling": longrope(8), "max_position_embeddings": 8192}):
        theirs = Phi3Config(**shape, **more)
        assert phi3.config_from_hf({**shape, **more}) == phi3.config_from_hf(theirs.to_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rotary_share": 0.7}, "11 of head_dim 16 is odd"),
        ({"long_rope": phi3.LongRope((1.0,) * 8, (1.0,) * 7, 64)}, "7 LongRoPE factors for 8 pairs"),
        ({"window": 0}, "window 0 is below 1"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
    ],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(phi3.PRESETS["tiny"], **change)


def test_transformers_really_applies_the_window_that_we_are_compared_with():
    distance = torch.arange(T)[:, None] - torch.arange(T)
    for weights in reference(TestPhi3.cases["mha-window-eps"])(batch()[0], output_attentions=True).attentions:
        assert torch.equal((weights > 0).all(0).all(0), (distance >= 0) & (distance < 7))


def test_bf16_rounds_where_transformers_rounds():
    """Bit by bit: the norm, and the rotary embedding from positions on."""
    norm, theirs = phi3.RMSNorm(64, 1e-3).bfloat16(), Phi3RMSNorm(64, 1e-3).bfloat16()
    norm.weight.data.uniform_(0.5, 1.5)
    theirs.weight.data.copy_(norm.weight.data)
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16)
    assert torch.equal(norm(x), theirs(x))
    config, positions = phi3.PRESETS["tiny"], torch.arange(4_000, 4_050).expand(2, -1)
    q = x[:, None, :, : config.head_dim]  # (B, 1, T, head_dim)
    rope = Phi3RotaryEmbedding(Phi3Config(**phi3.config_to_hf(config)))(x, positions)
    expected, _ = apply_rotary_pos_emb(q, q, *rope)
    assert torch.equal(phi3.rotate(q, *phi3.rotary(positions, positions[:, -1:], config, torch.bfloat16)), expected)


def test_adapters_on_every_linear():
    model = phi3.Model(phi3.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 2 * 4
    tokens = torch.randint(0, 512, (2, 16))
    loss, _ = model(tokens, labels=tokens)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
