"""gpt-oss is numerically that of transformers, and its checkpoints go in and out unchanged."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from adapters_in_peft import assert_4_bits, assert_same_in_peft_and_merged
from numerics import assert_close, assert_gradients_close
from parity import SMALL, ExpertFamilyTests, T, batch, reference
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP, GptOssRMSNorm

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.models import gpt_oss
from litmini.ops.attention import Documents, record_kernels

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 100.0,
    "truncate": False,
}
SHAPE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16}
SHAPE |= {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7, "rope_parameters": YARN}
ALL = {**SHAPE, "num_experts_per_tok": 4}  # in bf16 no rounding sends a token elsewhere
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


class TestGptOss(ExpertFamilyTests):
    module = gpt_oss
    cases: ClassVar = {
        "gqa": GptOssConfig(**ALL),
        "mqa-tied": GptOssConfig(**{**ALL, "num_key_value_heads": 1}, tie_word_embeddings=True),
        "one-of-many": GptOssConfig(
            **{**SHAPE, "num_local_experts": 8, "num_experts_per_tok": 1, "num_hidden_layers": 1}
        ),
        "no-biases-plain-rotary": GptOssConfig(**{**ALL, "rope_parameters": PLAIN}, attention_bias=False),
        "limits-truncate-window": GptOssConfig(
            **{**ALL, "sliding_window": 19, "rope_parameters": {**YARN, "truncate": True}, "num_hidden_layers": 3},
            swiglu_alpha=0.9,
            swiglu_limit=0.4,
            rms_norm_eps=1e-2,
        ),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": GptOssConfig(**SHAPE, hidden_act="gelu").to_dict(),
        "rope_type = 'linear'": {**SHAPE, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "mscale = 2.0": {**SHAPE, "rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0}},
        "partial_rotary_factor = 0.5": {**SHAPE, "partial_rotary_factor": 0.5},
        "layer_types = ": GptOssConfig(**SHAPE, layer_types=["full_attention", "sliding_attention"]).to_dict(),
        "attention_dropout = 0.1": GptOssConfig(**SHAPE, attention_dropout=0.1).to_dict(),
        "quantization_config": {**SHAPE, "quantization_config": {"quant_method": "mxfp4"}},
    }
    counts: ClassVar = {"openai/gpt-oss-20b": 20_914_757_184, "openai/gpt-oss-120b": 116_829_156_672}


@pytest.fixture
def base(tmp_path, tokenizer_dir):
    """A checkpoint of the case whose dimensions 4 bits take."""
    theirs = reference(GptOssConfig(**{**SHAPE, "intermediate_size": 64, "head_dim": 32}))
    theirs.save_pretrained(tmp_path / "base")
    for file in tokenizer_dir.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "base"


def test_sinks_and_windows_matter(base):
    model, (tokens, _) = load_model(base, torch.float32), batch()
    with torch.no_grad():
        logits = model(tokens)
        for change in ({"window": 1_000}, {"limit": 0.01}, {"alpha": 0.1}):
            other = gpt_oss.Model(replace(model.config, **change)).eval()
            other.load_state_dict(model.state_dict())
            assert (other(tokens) - logits).abs().max() > 0.1, change
        for block in model.model["layers"].children():
            block.self_attn.sinks.fill_(-1e9)
        assert (model(tokens) - logits).abs().max() > 0.1


def test_sinks_by_flexattention_equal_those_of_the_cpu(base):
    """On a GPU, packed sequences take FlexAttention, or explicit matmuls where it is not: forward, here without a GPU."""
    model, (tokens, _) = load_model(base, torch.float32), batch()
    documents = (torch.arange(T) // 40 + 1).expand(2, T)
    positions = torch.cat((torch.arange(40), torch.arange(T - 40))).expand(2, T)
    with torch.no_grad():
        expected = model(tokens, positions=positions, documents=documents)
        for kernel in ("flex", "explicit"):
            with record_kernels() as kernels:
                found = model(tokens, positions=positions, documents=Documents.of(documents, kernel))
            assert kernels == {kernel}
            assert_close(found, expected)
        with record_kernels() as kernels:
            model.bfloat16()(tokens, positions=positions, documents=Documents.of(documents))
        assert kernels == {"flex"}


def test_gradients_of_explicit_matmuls_over_a_packed_mask_equal_those_document_by_document(base):
    model, (tokens, labels) = load_model(base, torch.float32), batch()
    documents = (torch.arange(T) // 40 + 1).expand(2, T)
    positions = torch.cat((torch.arange(40), torch.arange(T - 40))).expand(2, T)
    gradients = []
    for given in (documents, Documents.of(documents, "explicit")):
        model.zero_grad()
        model(tokens, positions=positions, documents=given, labels=labels)[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient.abs().max() > 0 for name, gradient in gradients[0].items() if "sinks" in name)
    assert_gradients_close(gradients[1], gradients[0])


@pytest.mark.parametrize("targets", [["experts.gate_up_proj", "experts.down_proj"], ["q_proj", "experts.down_proj"]])
def test_adapters_over_experts_are_the_same_in_peft_and_merged(base, tmp_path, targets):
    names = [target.rpartition(".")[2] for target in targets]
    assert_same_in_peft_and_merged(base, tmp_path, LoraConfig(4, 8.0, 0.0, names))


def test_4_bits_take_linears_and_experts_and_leave_the_rest(base):
    assert_4_bits(base, {"down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"}, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_router_and_experts_round_where_those_of_transformers_do(dtype):
    theirs = GptOssMLP(GptOssConfig(**SHAPE, experts_implementation="grouped_mm")).to(dtype)
    moe = gpt_oss.SparseMoE(gpt_oss.config_from_hf(GptOssConfig(**SHAPE).to_dict())).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {f"mlp.{name}": t for name, t in theirs.state_dict().items()}
    moe.load_state_dict({n.removeprefix("mlp."): t for n, t in gpt_oss.from_hf(state.items(), None)})
    x = torch.randn(2, 9, 64, dtype=dtype)
    assert_close(moe(x)[0], theirs(x)[0])
    norm, their_norm = gpt_oss.RMSNorm(64, 1e-3).to(dtype), GptOssRMSNorm(64, 1e-3).to(dtype)
    for one in (norm, their_norm):
        one.weight.data = torch.linspace(0.5, 1.5, 64).to(dtype)
    assert torch.equal(norm(x), their_norm(x))


def test_the_published_config():
    """config.json of openai/gpt-oss-20b, without its quantization_config."""
    published: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 201088,
    }
    preset = replace(gpt_oss.PRESETS["openai/gpt-oss-20b"], balance_coef=0.9)
    assert gpt_oss.config_from_hf(published) == preset
    assert gpt_oss.config_from_hf(GptOssConfig(**published).to_dict()) == preset
    assert gpt_oss.config_from_hf(GptOssConfig(**gpt_oss.config_to_hf(preset)).to_dict()) == preset
    assert gpt_oss.config_from_hf({}) == gpt_oss.config_from_hf(GptOssConfig().to_dict())
    assert preset.yarn is not None and math.isclose(preset.yarn.attention_factor, 0.1 * math.log(32) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"n_active": 9}, r"n_active 9 is outside 1..n_experts 4"),
        ({"window": 0}, "window 0 is below 1"),
    ],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(gpt_oss.PRESETS["tiny"], **change)
