"""Llama and Mistral are numerically those of transformers, and their checkpoints go in and out unchanged."""

import copy
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from numerics import Float64, assert_close, assert_gradients_as_accurate, assert_gradients_close
from parity import FamilyTests
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from litmini.checkpoints.hf import load_model, save_model
from litmini.errors import UserError
from litmini.models import llama
from litmini.ops import cpu_attention

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}  # within a head of 16: kept, blended and stretched frequencies
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
CASES = {
    "gqa": {},
    "mqa-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "mha-biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2},
    "attention-bias-tied": {"attention_bias": True, "tie_word_embeddings": True},
    "wide-heads": {"head_dim": 24},
    "narrow-heads-of-three": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
    "linear": {"rope_parameters": LINEAR},
    "llama3": {"rope_parameters": LLAMA3, "num_hidden_layers": 3},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 7},
    "mistral-window-linear-tied": {
        "model_type": "mistral",
        "sliding_window": 16,
        "head_dim": 8,
        "rope_parameters": LINEAR,
        "tie_word_embeddings": True,
    },
}
VOCAB, T = 97, 61  # T: several windows, and twice the length that llama3's scaling starts from


def hf_config(**changes) -> LlamaConfig | MistralConfig:
    settings = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **changes}
    mistral = settings.pop("model_type", "llama") == "mistral"
    return (MistralConfig if mistral else LlamaConfig)(**settings, attn_implementation="eager")


def reference(**changes) -> LlamaForCausalLM | MistralForCausalLM:
    """transformers' model in fp32 with every parameter away from its default."""
    config = hf_config(**changes)
    model = (MistralForCausalLM if config.model_type == "mistral" else LlamaForCausalLM)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                sharp = 2.0 if "q_proj" in name or "k_proj" in name else 1.0  # so that attention is far from even
                parameter.normal_(std=sharp / math.sqrt(parameter.shape[1]))
    return model


class LlamaCases(FamilyTests):
    """For family_table.py; the tests are those of this file, which came first and go further."""

    module = llama
    cases: ClassVar = {name: hf_config(**changes) for name, changes in CASES.items()}


def ours(theirs) -> llama.Model:
    model = llama.Model(llama.config_from_hf(json.loads(theirs.config.to_json_string())))
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model.eval()


def random_batch(rows: int = 2, length: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels shifted by one with some of them left out."""
    tokens = torch.randint(0, VOCAB, (rows, length))
    labels = torch.cat((tokens[:, 1:], torch.full((rows, 1), -100)), 1)
    return tokens, labels.masked_fill(torch.rand(labels.shape) < 0.2, -100)


def trained_gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_logits_loss_and_gradients_are_those_of_transformers(case, kernel, monkeypatch):
    for name in ("EXPLICIT_LENGTH", "EXPLICIT_LENGTH_FP32"):
        monkeypatch.setattr(cpu_attention, name, 512 if kernel == "eager" else 0)
    theirs = reference(**CASES[case])
    theirs.set_attn_implementation(kernel)
    model, (tokens, labels) = ours(theirs), random_batch()

    expected = theirs(tokens, use_cache=False).logits
    assert expected.abs().max() > 1  # the bound below means something
    assert_close(model(tokens), expected)

    loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten())
    loss.backward()
    loss_sum, n_targets = model(tokens, labels=labels)
    assert n_targets == (labels != -100).sum()
    assert_close(loss_sum / n_targets, loss)
    (loss_sum / n_targets).backward()
    assert_gradients_close(trained_gradients(model), trained_gradients(theirs))


def test_transformers_really_applies_the_window_that_we_are_compared_with():
    theirs = reference(**CASES["mistral-window"])
    tokens, _ = random_batch()
    distance = torch.arange(T)[:, None] - torch.arange(T)
    for weights in theirs(tokens, output_attentions=True).attentions:
        assert torch.equal((weights > 0).all(0).all(0), (distance >= 0) & (distance < 7))


@pytest.mark.parametrize("case", ["linear", "llama3"])
def test_rope_scaling_matters_in_the_comparison(case):
    """Otherwise the comparison with transformers would not notice a scaling that is ignored."""
    model, (tokens, _) = ours(reference(**CASES[case])), random_batch()
    plain = llama.Model(replace(model.config, rope_scaling=None))
    plain.load_state_dict(model.state_dict())
    assert (model(tokens) - plain(tokens)).abs().max() > 0.1
    if case == "llama3":
        one = torch.ones(1, 1, dtype=torch.int64)
        ratios = torch.asin(llama.rotary(one, model.config, torch.float32)[1])
        ratios = ratios / torch.asin(llama.rotary(one, plain.config, torch.float32)[1])
        ratios = ratios[0, 0, 0, :8]
        assert_close(ratios[0], torch.tensor(1.0))
        assert 1 / 8 + 0.01 < ratios[1] < 0.99
        assert_close(ratios[3:], torch.full((5,), 1 / 8))


@pytest.mark.parametrize("case", ["gqa", "llama3", "mistral-window"])
def test_right_padded_batch(case):
    theirs = reference(**CASES[case])
    model, (tokens, labels) = ours(theirs), random_batch(3)
    lengths = torch.tensor([T, 33, 5])[:, None]
    real = torch.arange(T) < lengths
    labels = labels.masked_fill(~(torch.arange(T) < lengths - 1), -100)
    expected = theirs(tokens, attention_mask=real.long(), use_cache=False).logits
    loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()

    positions = torch.where(real, torch.arange(T), torch.arange(T) - lengths)
    batch = {"positions": positions, "documents": real.long()}
    assert_close(model(tokens, **batch)[real], expected[real])  # logits up to 10
    assert_close(model(tokens)[real], expected[real])  # causal: padding comes after
    found, _ = model(tokens, **batch, labels=labels)
    assert_close(found, loss)
    found.backward()
    assert_gradients_close(trained_gradients(model), trained_gradients(theirs))


@pytest.mark.parametrize("case", ["gqa", "mistral-window"])
def test_left_padded_batch_without_a_cache(case):
    theirs = reference(**CASES[case])
    model, (tokens, _) = ours(theirs), random_batch()
    padding = torch.tensor([[0], [20]])
    positions = torch.arange(T) - padding  # below 0: padding
    real = positions >= 0
    expected = theirs(tokens, attention_mask=real.long(), position_ids=positions.clamp(min=0), use_cache=False).logits
    assert_close(model(tokens, positions)[real], expected[real])


@pytest.mark.parametrize("case", ["gqa", "mha-biases", "llama3", "mistral-window"])
@pytest.mark.parametrize("mixed", [False, True])
def test_bf16_is_as_near_to_fp32_as_that_of_transformers(case, mixed, tmp_path):
    """Root mean square error of logits, at most 1.5 times theirs; mixed: fp32 weights under autocast."""
    reference(**CASES[case]).bfloat16().save_pretrained(tmp_path)
    load = partial(AutoModelForCausalLM.from_pretrained, tmp_path, attn_implementation="eager")
    exact, dtype = load(dtype=torch.float32), torch.float32 if mixed else torch.bfloat16
    theirs = load(dtype=dtype)
    assert theirs.model.rotary_emb.inv_freq.dtype == torch.float32  # a fair reference
    model, (tokens, _) = ours(theirs).to(dtype), random_batch(4)
    with torch.no_grad():
        expected = exact(tokens).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits, their_logits = model(tokens), theirs(tokens).logits
    error, allowed = ((x.float() - expected).square().mean().sqrt() for x in (logits, their_logits))
    assert logits.dtype == torch.bfloat16
    assert 0 < error <= 1.5 * allowed, f"error {error:.4f}, that of transformers {allowed:.4f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_rounds_where_that_of_transformers_does(dtype):
    x, weight = torch.randn(4, 9, 64).to(dtype), torch.empty(64).uniform_(0.5, 1.5).to(dtype)
    theirs, norm = LlamaRMSNorm(64, 1e-3).to(dtype), llama.RMSNorm(64, 1e-3).to(dtype)
    for one in (theirs, norm):
        one.weight.data.copy_(weight)
    assert torch.equal(norm(x), theirs(x))


POSITIONS = torch.cat((torch.arange(64), torch.arange(8190, 8254), torch.tensor([16_384, 65_535, 131_071])))[None]


@pytest.mark.parametrize("preset", ["tiny", "HuggingFaceTB/SmolLM2-1.7B", "meta-llama/Llama-3.2-1B"])
@pytest.mark.parametrize("autocast", [False, True])
def test_rotary_of_a_bf16_model_is_computed_in_fp32(preset, autocast):
    small = replace(llama.PRESETS["tiny"], n_layers=1)
    published = llama.PRESETS[preset]
    config = replace(small, rope_theta=published.rope_theta, rope_scaling=published.rope_scaling, head_dim=64)
    model, seen = llama.Model(config).bfloat16(), []
    model.model["layers"][0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(torch.zeros_like(POSITIONS), POSITIONS, documents=torch.ones_like(POSITIONS))
    fp32 = llama.rotary(POSITIONS, config, torch.float32)
    for found, exact in zip(seen[0], fp32, strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, exact.bfloat16())

    theirs = LlamaRotaryEmbedding(LlamaConfig(**{**llama.config_to_hf(config), "max_position_embeddings": 131_072}))
    for found, expected in zip(fp32, theirs(torch.zeros(1), POSITIONS), strict=True):
        bound = 0 if config.rope_scaling is None else 1e-4  # the blend may round the other way, in one ulp
        torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=bound)


def test_rotary_far_away_is_near_to_float64():
    """bf16 angles are off by whole turns out there; fp32 ones by the rounding of one multiplication."""
    config = llama.PRESETS["HuggingFaceTB/SmolLM2-135M"]
    positions = torch.arange(8192, 16_384)[None]
    exponents = torch.arange(0, 64, 2, dtype=torch.float64) / 64
    angles = positions[:, None, :, None].double() / config.rope_theta**exponents
    for found, exact in zip(llama.rotary(positions, config, torch.float32), (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(found.double(), torch.cat((exact, exact), -1), rtol=0, atol=2e-3)


def save_theirs(theirs, directory: Path, tokenizer_dir: Path) -> dict[str, torch.Tensor]:
    """A sharded checkpoint written by transformers; returns its tensors."""
    theirs.save_pretrained(directory, max_shard_size="20KB")
    shutil.copyfile(tokenizer_dir / "tokenizer.json", directory / "tokenizer.json")
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("case", ["mha-biases", "mqa-tied", "llama3", "mistral-window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [20_000, 10**9])
def test_import_and_export_are_bit_identical(case, dtype, shard_bytes, tmp_path, tokenizer_dir):
    theirs = reference(**CASES[case]).to(dtype)
    before = save_theirs(theirs, tmp_path / "in", tokenizer_dir)
    model = load_model(tmp_path / "in", dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
    assert (model.lm_head.weight is model.model["embed_tokens"].weight) == model.config.tied
    (tmp_path / "out").mkdir()
    tensors = model.named_parameters()
    save_model(tmp_path / "out", llama.config_to_hf(model.config), tensors, tmp_path / "in", shard_bytes)

    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 if shard_bytes == 20_000 else len(files) == 1
    after = {k: v for file in files for k, v in load_file(file).items()}
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name

    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert loaded.dtype == dtype
    tokens, _ = random_batch()
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "in", attn_implementation="eager")
    assert torch.equal(loaded(tokens).logits, exact(tokens).logits)
    assert llama.config_from_hf(loaded.config.to_dict()) == model.config


def test_weights_that_do_not_fit_the_config_are_all_in_one_error(tmp_path, tokenizer_dir):
    save_theirs(reference(), tmp_path, tokenizer_dir)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "intermediate_size": 88, "num_hidden_layers": 1, "mlp_bias": True}))
    with pytest.raises(UserError) as error:
        load_model(tmp_path, torch.float32)
    for expected in (
        "model.layers.0.mlp.gate_proj.weight has shape (80, 64), config.json implies (88, 64)",
        "model.layers.0.mlp.down_proj.weight has shape (64, 80), config.json implies (64, 88)",
        "unexpected model.layers.1.mlp.up_proj.weight (80, 64)",
        "unexpected model.layers.1.input_layernorm.weight (64,)",
        "missing model.layers.0.mlp.gate_proj.bias",
    ):
        assert expected in str(error.value)


@pytest.mark.real
def test_the_real_smollm2_equals_transformers(smollm2):
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager")
    model = load_model(smollm2, torch.float32)
    trained = ("layers.0.self_attn.k_proj.weight", "layers.14.mlp.down_proj.weight", "model.norm.weight")
    trained += ("layers.29.input_layernorm.weight",)
    for one in (theirs, model):
        one.requires_grad_(False)
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(name.endswith(trained))
    exact_model, tokens = copy.deepcopy(theirs).double(), torch.randint(0, 49_152, (1, 48))
    expected = theirs(tokens, labels=tokens, use_cache=False)
    assert_close(model(tokens), expected.logits)
    expected.loss.backward()
    labels = torch.cat((tokens[:, 1:], torch.full((1, 1), -100)), 1)
    loss_sum, n_targets = model(tokens, labels=labels)
    (loss_sum / n_targets).backward()
    assert_close((loss_sum / n_targets).detach(), expected.loss.detach())
    assert sum(p.grad is not None for p in model.parameters()) == len(trained)
    with Float64():
        exact_model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert_gradients_as_accurate(*map(trained_gradients, (model, theirs, exact_model)))
