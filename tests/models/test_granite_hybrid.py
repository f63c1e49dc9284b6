"""Granite 4 is numerically that of transformers: Mamba2 and attention layers, dense and with experts."""

import json
import shutil
from dataclasses import replace
from typing import ClassVar

import peft
import pytest
import torch
from numerics import assert_close, assert_rounds_alike
from parity import SMALL, ExpertFamilyTests, batch, reference
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMoE

from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.methods.adapters import add_adapters, experts_left_out
from litmini.models import granite_hybrid

SHAPE = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
SHAPE |= {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 24, "mamba_n_groups": 2}
SHAPE |= {"shared_intermediate_size": 80, "intermediate_size": 32, "layer_types": ["mamba", "attention"]}
SHAPE |= {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6, "logits_scaling": 0.7}
DENSE = {**SHAPE, "num_local_experts": 0, "num_experts_per_tok": 0}
EXPERTS = {**SHAPE, "num_local_experts": 8, "num_experts_per_tok": 3}


class TestGraniteHybrid(ExpertFamilyTests):
    module = granite_hybrid
    cases: ClassVar = {
        "dense": GraniteMoeHybridConfig(**DENSE),
        "dense-tied-kernel-biases-one-group": GraniteMoeHybridConfig(
            **DENSE | {"mamba_n_groups": 1, "mamba_d_conv": 2, "mamba_proj_bias": True, "mamba_conv_bias": False},
            tie_word_embeddings=True,
            mamba_chunk_size=16,
        ),
        "all-attention-rotary": GraniteMoeHybridConfig(
            **DENSE | {"layer_types": ["attention"] * 2, "num_key_value_heads": 1},
            position_embedding_type="rope",
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        ),
        "experts": GraniteMoeHybridConfig(**EXPERTS),
        "40-experts-tied-mamba-only": GraniteMoeHybridConfig(
            **EXPERTS | {"num_local_experts": 40, "num_experts_per_tok": 8, "layer_types": None},
            tie_word_embeddings=True,
        ),
        "all-experts-attention-first": GraniteMoeHybridConfig(
            **EXPERTS | {"num_experts_per_tok": 8, "layer_types": ["attention", "mamba"], "mamba_d_head": "auto"}
        ),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": GraniteMoeHybridConfig(**DENSE, hidden_act="gelu").to_dict(),
        "position_embedding_type = 'alibi'": {**DENSE, "position_embedding_type": "alibi"},
        "rope_type = 'yarn'": {**DENSE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "attention_bias = True": GraniteMoeHybridConfig(**DENSE, attention_bias=True).to_dict(),
        "attention_dropout = 0.1": GraniteMoeHybridConfig(**DENSE, attention_dropout=0.1).to_dict(),
        "normalization_function = 'layernorm'": {**DENSE, "normalization_function": "layernorm"},
        "mamba_d_head = 32": {**DENSE, "mamba_d_head": 32},
        r"time_step_limit = \[0.0, 0.1\]": {**DENSE, "time_step_limit": [0.0, 0.1]},
        r"layer_types = \['mamba', 'sliding_attention'\]": {**DENSE, "layer_types": ["mamba", "sliding_attention"]},
        r"layer_types = \['mamba'\]": {**DENSE, "layer_types": ["mamba"]},
        "quantization_config": {**DENSE, "quantization_config": {"quant_method": "fp8"}},
    }
    counts: ClassVar = {
        "ibm-granite/granite-4.0-350m": 352_379_904,
        "ibm-granite/granite-4.0-1b": 1_631_750_144,
        "ibm-granite/granite-4.0-micro": 3_402_836_480,
        "ibm-granite/granite-4.0-h-350m": 340_332_224,
        "ibm-granite/granite-4.0-h-1b": 1_461_538_368,
        "ibm-granite/granite-4.0-h-micro": 3_191_396_096,
        "ibm-granite/granite-4.0-h-tiny": 6_939_037_248,
        "ibm-granite/granite-4.0-h-small": 32_207_337_984,
    }

    def their_gradients(self, theirs) -> dict[str, torch.Tensor]:
        """transformers 5 has other names in memory, too."""
        names = {"experts.gate_up_proj": "input_linear.weight", "experts.down_proj": "output_linear.weight"}
        names |= {"router.weight": "router.layer.weight"}
        found = {}
        for name, gradient in super().their_gradients(theirs).items():
            block, moe, part = name.partition("block_sparse_moe.")
            found[block + moe + names.get(part, part)] = gradient
        return found

    @pytest.mark.parametrize("padded", [False, True])
    def test_training_loss_and_gradients_with_the_balance_loss(self, case, padded, directory):
        if not self.cases[case].num_local_experts:
            pytest.skip("no experts")
        super().test_training_loss_and_gradients_with_the_balance_loss(case, padded, directory)


H_350M = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "layer_types": ["attention" if i in (10, 13, 17, 27) else "mamba" for i in range(32)],
    "logits_scaling": 3,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 48,
    "mamba_proj_bias": False,
    "max_position_embeddings": 32768,
    "model_type": "granitemoehybrid",
    "normalization_function": "rmsnorm",
    "num_attention_heads": 12,
    "num_experts_per_tok": 0,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "num_local_experts": 0,
    "output_router_logits": False,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.246,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.001,
    "shared_intermediate_size": 2048,
    "tie_word_embeddings": True,
    "vocab_size": 100352,
}


def test_the_published_config_of_h_350m():
    """As transformers 4 and 5 write it, and with the older name of `layer_types`."""
    preset = replace(
        granite_hybrid.PRESETS["ibm-granite/granite-4.0-h-350m"], ffn_dim=2048
    )  # of experts: there are none
    assert granite_hybrid.config_from_hf(H_350M) == preset
    assert granite_hybrid.config_from_hf(json.loads(GraniteMoeHybridConfig(**H_350M).to_json_string())) == preset
    assert (
        granite_hybrid.config_from_hf(GraniteMoeHybridConfig(**granite_hybrid.config_to_hf(preset)).to_dict()) == preset
    )
    older = {"layers_block_type" if key == "layer_types" else key: value for key, value in H_350M.items()}
    assert granite_hybrid.config_from_hf(older) == preset


def test_values_that_are_left_out_are_those_of_transformers():
    for raw in ({}, {"num_hidden_layers": 3}, {"position_embedding_type": "rope", "rope_theta": 5e5}):
        found, theirs = granite_hybrid.config_from_hf(raw), GraniteMoeHybridConfig(**raw)
        assert found == granite_hybrid.config_from_hf(theirs.to_dict())
        assert not found.attention and theirs.layer_types == ["linear_attention"] * found.n_layers


@pytest.mark.parametrize("key", ["mamba_d_conv", "mamba_d_state", "mamba_n_groups", "mamba_n_heads", "mamba_expand"])
@pytest.mark.parametrize("value", [0, "auto", -1, None])
def test_sizes_that_nothing_can_have_are_refused_by_key_and_value(key, value):
    with pytest.raises(ValueError, match=rf"{key} (= {value!r}|is null), expected a whole number"):
        granite_hybrid.config_from_hf({**DENSE, key: value})


def test_impossible_values_raise():
    changes = {"n_kv_heads": 3, "n_groups": 3, "ssm_head_dim": 9, "n_active": 9, "attention": (3,)}
    for key, value in changes.items():
        with pytest.raises(ValueError, match=key):
            replace(granite_hybrid.PRESETS["tiny"], **{key: value})
    with pytest.raises(ValueError, match="head_dim 15 is odd"):
        replace(granite_hybrid.PRESETS["tiny"], head_dim=15, has_rotary=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_round_where_those_of_transformers_do(dtype):
    theirs = GraniteMoeHybridMoE(GraniteMoeHybridConfig(**EXPERTS, experts_implementation="grouped_mm")).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    moe = granite_hybrid.SparseMoE(granite_hybrid.config_from_hf(EXPERTS)).to(dtype)
    names = {name: f"{name}.weight" for name in ("experts.gate_up_proj", "experts.down_proj")}
    moe.load_state_dict({names.get(name, name): tensor for name, tensor in theirs.state_dict().items()})
    x = torch.randn(2, 9, 64, dtype=dtype)
    assert_rounds_alike(moe(x)[0], theirs(x))


@pytest.mark.parametrize(
    "key", ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_divisor"]
)
def test_each_multiplier_matters(key):
    config = granite_hybrid.config_from_hf(DENSE)
    model = granite_hybrid.Model(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    other = granite_hybrid.Model(replace(config, **{key: 2 * getattr(config, key)})).eval()
    other.load_state_dict(model.state_dict())
    tokens, _ = batch()
    with torch.no_grad():
        assert (model(tokens) - other(tokens)).abs().max() > 1e-3 * model(tokens).abs().max()


@pytest.fixture(params=["dense", "experts"])
def base(request, tmp_path, tokenizer_dir):
    reference(TestGraniteHybrid.cases[request.param]).save_pretrained(tmp_path / "base")
    shutil.copytree(tokenizer_dir, tmp_path / "base", dirs_exist_ok=True)
    return tmp_path / "base", request.param


def test_adapters_over_state_space_projections_and_experts_in_peft_and_merged(base, tmp_path):
    (source, kind), (tokens, _) = base, batch()
    model = load_model(source, torch.float32)
    targets = ["all-linear", *(["gate_up_proj", "down_proj"] if kind == "experts" else [])]
    names = add_adapters(model, LoraConfig(rank=4, targets=targets))
    assert {"model.layers.0.mamba.in_proj", "model.layers.0.mamba.out_proj"} <= set(names)
    assert len(names) == 2 + 4 + 2 * 2 + (4 if kind == "experts" else 0)
    assert experts_left_out(model) == ""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, adapter, str(source))
    export(source, tmp_path / "merged", adapter, dtype=torch.float32)
    assert load_file(tmp_path / "merged/model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    load_adapter(again := load_model(source, torch.float32), adapter)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        plain = theirs(tokens, use_cache=False).logits
        tuned = peft.PeftModel.from_pretrained(theirs, adapter).eval()(tokens, use_cache=False).logits
        assert (tuned - plain).abs().max() > 0.05
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        for found in (model.eval()(tokens), again(tokens), merged(tokens, use_cache=False).logits):
            assert_close(found, tuned)


def test_all_linear_says_what_it_leaves_out():
    model = granite_hybrid.Model(granite_hybrid.PRESETS["tiny"])
    add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert "no adapter covers the experts (down_proj, gate_up_proj), 294,912 parameters" in experts_left_out(model)


def test_a_kernel_of_another_size_than_the_tensors_is_named(base):
    source, _ = base
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"mamba_d_state": 16}))
    with pytest.raises(UserError, match=r"layers.0.mamba.in_proj.weight has shape \(360, 64\).* implies \(328, 64\)"):
        load_model(source, torch.float32)
