"""Gemma 4 (text) is numerically that of transformers, and its checkpoints go in and out unchanged."""

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import parity
import pytest
import torch
import varlen_kernel  # noqa: F401  (registers FlashAttention's operator on the CPU)
from adapters_in_peft import assert_4_bits, assert_same_in_peft_and_merged
from numerics import assert_close
from parity import SMALL, FamilyTests, T, batch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts, Gemma4TextRouter

from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model, save_trained
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.importers.convert import convert
from litmini.methods.trainable_tokens import add_tokens
from litmini.models import gemma4
from litmini.ops.attention import Documents, record_kernels
from litmini.ops.kv_cache import KVCache
from litmini.training.low_memory import checkpoint_activations

LOCAL, GLOBAL = "sliding_attention", "full_attention"
ROPES = {  # so far apart that a swap shows
    GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 3_000.0},
    LOCAL: {"rope_type": "default", "rope_theta": 30.0},
}
SHAPE = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32}
SHAPE |= {"sliding_window": 7, "max_position_embeddings": 256, "pad_token_id": None, "rope_parameters": ROPES}
SHAPE |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 97, "final_logit_softcapping": 3.0}
SHAPE |= {"layer_types": [LOCAL, GLOBAL], "model_type": "gemma4_text"}
SMALL_ONES = {**SHAPE, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4, "layer_types": [LOCAL, GLOBAL] * 2}
SMALL_ONES |= {"num_kv_shared_layers": 2}
LARGE = {**SHAPE, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 4, "moe_intermediate_size": 32}
ALL = {**SMALL_ONES, **LARGE, **SMALL_ONES, **EXPERTS, "use_double_wide_mlp": True}


def config(*parts: dict[str, Any], **changes: Any) -> Gemma4TextConfig:
    settings = dict(SHAPE)
    for part in (*parts, changes):
        settings |= part
    return Gemma4TextConfig(**deepcopy(settings))


def scaled(theirs):
    """Layer scalars away from 1, which are no parameters there; and scores, which are not scaled, of the usual size."""
    for i, layer in enumerate(theirs.model.layers):
        layer.layer_scalar.fill_(0.7 + 0.2 * i)
        layer.self_attn.q_norm.weight.data.mul_(0.4)
    return theirs


class TestGemma4(FamilyTests):
    module = gemma4
    cases: ClassVar = {
        "e2b": config(
            SMALL_ONES,
            num_hidden_layers=6,
            num_kv_shared_layers=3,
            num_key_value_heads=1,
            layer_types=[LOCAL, LOCAL, GLOBAL] * 2,
            use_double_wide_mlp=True,
        ),
        "e4b": config(SMALL_ONES),
        "31b": config(LARGE),
        "26b-a4b": config(LARGE, EXPERTS),
        "one-of-many": config(EXPERTS, num_experts=8, top_k_experts=1, num_hidden_layers=1, layer_types=[GLOBAL]),
        "all-at-once": config(ALL),
        "untied-no-cap-whole-rotary": config(
            tie_word_embeddings=False,
            final_logit_softcapping=None,
            rope_parameters={**ROPES, GLOBAL: {"rope_type": "default", "rope_theta": 300.0}},
        ),
        "last-is-global-eps": config(num_hidden_layers=3, layer_types=None, rms_norm_eps=1e-2, sliding_window=19),
        "heads-of-one-size": config(global_head_dim=16, rope_parameters=None),
    }
    refused: ClassVar = {
        "hidden_activation = 'gelu'": {**SHAPE, "hidden_activation": "gelu"},
        "rope_type = 'linear'": {**SHAPE, "rope_parameters": {**ROPES, GLOBAL: {"rope_type": "linear", "factor": 2.0}}},
        "factor = 2.0": {**SHAPE, "rope_parameters": {**ROPES, GLOBAL: {**ROPES[GLOBAL], "factor": 2.0}}},
        "rope_parameters = ": {**SHAPE, "rope_parameters": {**ROPES, LOCAL: ROPES[GLOBAL]}},
        "attention_bias = True": {**SHAPE, "attention_bias": True},
        "attention_dropout = 0.1": {**SHAPE, "attention_dropout": 0.1},
        "layer_types = ": {**SHAPE, "layer_types": [GLOBAL, LOCAL]},
        "vocab_size_per_layer_input = 90": {**SMALL_ONES, "vocab_size_per_layer_input": 90},
        "per_layer_config = ": {**SHAPE, "per_layer_config": {"0": {"head_dim": 32}, "1": {"head_dim": 32}}},
        "quantization_config": {**SHAPE, "quantization_config": {"load_in_4bit": True}},
    }
    counts: ClassVar = {  # without the towers, 5.1B, 8.0B, 31B and 26B with them
        "google/gemma-4-E2B": 4_628_569_379,
        "google/gemma-4-E4B": 7_463_013_418,
        "google/gemma-4-31B": 30_697_345_340,
        "google/gemma-4-26B-A4B": 25_233_141_790,
    }

    @pytest.fixture(autouse=True)
    def _scalars(self, monkeypatch):
        original = parity.reference
        monkeypatch.setattr(parity, "reference", lambda config: scaled(original(config)))


@pytest.fixture
def base(tmp_path, tokenizer_dir):
    """A checkpoint with all features, whose dimensions 4 bits take."""
    theirs = scaled(
        parity.reference(config(ALL, hidden_size_per_layer_input=64, intermediate_size=64, moe_intermediate_size=64))
    )
    theirs.save_pretrained(tmp_path / "base")
    for file in tokenizer_dir.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "base"


def packed(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two documents in each row."""
    documents = (torch.arange(T) // 40 + 1).expand_as(tokens)
    return {"positions": torch.cat((torch.arange(40), torch.arange(T - 40))).expand_as(tokens), "documents": documents}


@pytest.mark.parametrize(
    "change",
    [
        {"window": 8},
        {"global_every": 1},
        {"n_active": 3},
        {"rotary_pct": 0.5},
        {"rope_theta": 30.0},
        {"rope_local_theta": 300.0},
        {"logit_softcap": None},
    ],
)
def test_each_number_matters_in_the_comparison(change):
    """Otherwise the comparison with transformers would not notice that one is ignored."""
    theirs = scaled(parity.reference(config(LARGE, EXPERTS, num_key_value_heads=1, global_head_dim=16)))
    own = gemma4.config_from_hf(json.loads(theirs.config.to_json_string()))
    state, (tokens, _) = dict(gemma4.from_hf(theirs.state_dict().items(), own)), batch()
    model = gemma4.Model(replace(own, k_eq_v=True, **change))
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert all("v_proj" in name for name in missing)  # of a layer that is local in the other pattern
    assert (model(tokens) - theirs(tokens, use_cache=False).logits).abs().max() > 0.01


def test_gradients_of_shared_layers_reach_the_keys_and_values_that_they_read(base):
    """Requirement 47: without what the last two layers give, the first two get other gradients."""
    (tokens, labels), gradients = batch(), []
    for detached in (False, True):
        model = load_model(base, torch.float32)
        assert model.sources == [0, 1, 0, 1]
        for block in list(model.model["layers"])[2:] if detached else ():
            block.self_attn.register_forward_pre_hook(
                lambda _, args: (*args[:3], tuple(x.detach() for x in args[3]), args[4])
            )
        model(tokens, labels=labels)[0].backward()
        gradients.append([block.self_attn.k_proj.weight.grad for block in list(model.model["layers"])[:2]])
    for whole, alone in zip(*gradients, strict=True):
        assert (whole - alone).norm() > 0.1 * alone.norm()


def test_activation_checkpointing_gives_the_same_gradients(base):
    model, (tokens, labels) = load_model(base, torch.float32).train(), batch()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(tokens, labels=labels, **packed(tokens))[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        checkpoint_activations(model)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("static", [False, True])
def test_sequences_of_different_lengths_in_a_cache(base, static):
    """Of a GPU, too, where every forward reads all slots; and one of them goes on alone in another cache."""
    model, (tokens, _) = load_model(base, torch.float32), batch()
    lengths, n = torch.tensor([20, 13]), 12
    with torch.no_grad():
        expected = [
            model(row[None, : length + n])[0, length - 1 :] for row, length in zip(tokens, lengths, strict=True)
        ]
        cache = KVCache(model.config, 2, T, torch.float32, chunk=20, static=static)
        positions = torch.arange(20) - (20 - lengths[:, None])  # padding stands on the left
        prompts = torch.stack([row[p.clamp(min=0)] for row, p in zip(tokens, positions, strict=True)])
        parts = [model(prompts, positions=positions, cache=cache)[:, -1:]]
        for i in range(n):
            if i == n // 2:
                cache = KVCache.gather(model.config, [(cache, 1, 13 + i), (cache, 0, 20 + i)])
                tokens, lengths, expected = tokens.flip(0), lengths.flip(0), expected[::-1]
                parts = [part.flip(0) for part in parts]
            new = torch.stack([row[length + i] for row, length in zip(tokens, lengths, strict=True)])[:, None]
            parts.append(model(new, positions=(lengths + i)[:, None], cache=cache))
    assert_close(torch.cat(parts, 1), torch.stack(expected))


def test_heads_of_512_take_flexattention_where_they_are_global():
    """On a GPU, FlashAttention takes heads up to 256; forward, here without a GPU."""
    model = gemma4.Model(replace(gemma4.PRESETS["tiny"], head_dim=256, global_head_dim=512))
    model.init_weights(torch.Generator().manual_seed(0))
    tokens, _ = batch()
    with torch.no_grad():
        expected = model(tokens, **packed(tokens))
        of = {**packed(tokens), "documents": Documents.of(packed(tokens)["documents"], "flex")}
        assert_close(
            model(tokens, **of | {"documents": Documents.of(packed(tokens)["documents"], "explicit")}), expected
        )
        with record_kernels() as kernels:
            model.bfloat16()(tokens, **of | {"documents": Documents.of(packed(tokens)["documents"])})
        assert kernels == {"varlen", "flex"}


@pytest.mark.parametrize(
    "targets",
    [
        ["all-linear", "gate_up_proj", "experts.down_proj"],
        ["q_proj", "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"],
    ],
)
def test_adapters_are_the_same_in_peft_and_merged(base, tmp_path, targets):
    names = [target.rpartition(".")[2] for target in targets]
    assert_same_in_peft_and_merged(base, tmp_path, LoraConfig(4, 8.0, 0.0, names))


def test_4_bits_take_linears_and_experts_and_leave_the_rest(base):
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    linears |= {"per_layer_input_gate", "per_layer_model_projection", "per_layer_projection"}
    assert_4_bits(base, linears, 0.6)


def test_unused_keys_and_values_of_shared_layers_are_carried_through(base, tmp_path):
    """Published files have them; transformers leaves them out."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    unused = {f"model.layers.3.self_attn.{name}.weight": torch.randn(8, 4) for name in ("k_proj", "v_proj")}
    unused["model.layers.2.self_attn.k_norm.weight"] = torch.randn(16).bfloat16()
    save_file(tensors | unused, file, metadata={"format": "pt"})
    model, (tokens, _) = load_model(base, torch.float32), batch()
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert_close(model(tokens), theirs(tokens).logits)
    (tmp_path / "trained").mkdir()
    save_trained(model, tmp_path / "trained", base)
    for result in (export(base, tmp_path / "out"), tmp_path / "trained", convert(base, tmp_path / "converted")):
        found = load_file(result / "model.safetensors")
        assert found.keys() == (tensors | unused).keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in (tensors | unused).items())


def test_new_tokens_are_refused_beside_per_layer_embeddings():
    model = gemma4.Model(gemma4.PRESETS["tiny"])
    with pytest.raises(UserError, match="new tokens would need rows in model.embed_tokens_per_layer, too"):
        add_tokens(model, [512], 512)
    add_tokens(gemma4.Model(replace(gemma4.PRESETS["tiny"], ple_dim=0)), [512], 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_and_experts_round_where_those_of_transformers_do(dtype):
    theirs_config = config(EXPERTS, top_k_experts=2, experts_implementation="grouped_mm")
    theirs = torch.nn.ModuleDict(
        {"router": Gemma4TextRouter(theirs_config), "experts": Gemma4TextExperts(theirs_config)}
    )
    own = gemma4.config_from_hf(json.loads(theirs_config.to_json_string()))
    ours = torch.nn.ModuleDict({"router": gemma4.Router(own), "experts": gemma4.Experts(own)})
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {f"layer.{name}": tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({n.removeprefix("layer."): t for n, t in gemma4.from_hf(state.items(), own)})
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x = torch.randn(19, 64, dtype=dtype)
    _, their_weights, their_choice = theirs["router"](x)
    logits, weights, chosen = ours["router"](x)
    assert logits.dtype == dtype and torch.equal(chosen, their_choice)
    assert_close(weights, their_weights)
    assert_close(ours["experts"](x, weights, chosen), theirs["experts"](x, their_choice, their_weights))


PUBLISHED_E2B: dict[str, Any] = {  # text_config of google/gemma-4-E2B
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "expert_intermediate_size": None,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1536,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 6144,
    "layer_types": ([LOCAL] * 4 + [GLOBAL]) * 7,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_text",
    "num_attention_heads": 8,
    "num_experts": None,
    "num_global_key_value_heads": None,
    "num_hidden_layers": 35,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        GLOBAL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        LOCAL: {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": True,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}
PUBLISHED_26B = PUBLISHED_E2B | {
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "hidden_size": 2816,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 2112,
    "layer_types": ([LOCAL] * 5 + [GLOBAL]) * 5,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 704,
    "num_attention_heads": 16,
    "num_experts": 128,
    "num_global_key_value_heads": 2,
    "num_hidden_layers": 30,
    "num_key_value_heads": 8,
    "num_kv_shared_layers": 0,
    "sliding_window": 1024,
    "top_k_experts": 8,
    "use_bidirectional_attention": "vision",
    "use_double_wide_mlp": False,
}


@pytest.mark.parametrize("name, published", [("E2B", PUBLISHED_E2B), ("26B-A4B", PUBLISHED_26B)])
def test_published_config_is_the_preset(name, published):
    preset = gemma4.PRESETS[f"google/gemma-4-{name}"]
    assert gemma4.config_from_hf(published) == preset
    as_written = json.loads(Gemma4TextConfig(**deepcopy(published)).to_json_string())
    assert "per_layer_config" in as_written and "global_head_dim" not in as_written
    assert gemma4.config_from_hf(as_written) == preset
    ours = Gemma4TextConfig(**gemma4.config_to_hf(preset))
    assert gemma4.config_from_hf(json.loads(ours.to_json_string())) == preset


def test_what_is_missing_is_the_default_of_transformers():
    own = gemma4.config_from_hf({"model_type": "gemma4_text"})
    assert own == gemma4.config_from_hf(json.loads(Gemma4TextConfig().to_json_string()))
    assert (own.global_every, own.global_head_dim, own.rotary_pct, own.logit_softcap) == (6, 512, 0.25, None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"n_global_kv_heads": 3}, "n_heads 4 is not a multiple of n_global_kv_heads 3"),
        ({"k_eq_v": False}, "n_global_kv_heads 1 goes with k_eq_v only"),
        ({"head_dim": 15}, "head_dim 15 or global_head_dim 32 is odd"),
        ({"n_active": 9}, r"n_active 9 is outside 1..n_experts 4"),
        ({"window": 0}, "window 0 or global_every 2 is below 1"),
        ({"rotary_pct": 1.5}, r"rotary_pct 1.5 is outside 0..1"),
        ({"n_shared": 3}, "n_shared 3 of 4 layers leaves no keys and values to some"),
        ({"n_shared": 4}, "n_shared 4 of 4 layers leaves no keys and values to some"),
    ],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(gemma4.PRESETS["tiny"], **change)
