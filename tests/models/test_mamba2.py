"""Mamba-2 is numerically that of transformers, and its checkpoints go in and out unchanged."""

import json
import shutil
from dataclasses import replace
from typing import ClassVar

import peft
import pytest
import torch
from numerics import assert_close, assert_rounds_alike
from parity import SMALL, FamilyTests, batch, reference
from transformers import AutoModelForCausalLM, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated

from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import Ia3Config, LoraConfig
from litmini.errors import UserError
from litmini.methods.adapters import add_adapters, experts_left_out
from litmini.methods.ia3 import add_ia3
from litmini.models import mamba2
from litmini.ops.linear_attention import make_runs

SHAPE = {key: value for key, value in SMALL.items() if key != "num_attention_heads"} | {"pad_token_id": None}
SHAPE |= {"num_heads": 8, "head_dim": 16, "state_size": 24, "n_groups": 2}


class TestMamba2(FamilyTests):
    module = mamba2
    cases: ClassVar = {
        "groups": Mamba2Config(**SHAPE),
        "one-group-tied-eps": Mamba2Config(
            **SHAPE | {"n_groups": 1}, tie_word_embeddings=True, layer_norm_epsilon=1e-2, chunk_size=16
        ),
        "kernel-biases-wide": Mamba2Config(
            **SHAPE | {"num_heads": 4, "head_dim": 48, "expand": 3}, conv_kernel=2, use_bias=True, use_conv_bias=False
        ),
        "residual-of-the-model's-dtype": Mamba2Config(**SHAPE | {"n_groups": 4}, residual_in_fp32=False),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": Mamba2Config(**SHAPE, hidden_act="gelu").to_dict(),
        "head_dim = 32": {**SHAPE, "head_dim": 32},
        "head_dim = 64": {key: value for key, value in SHAPE.items() if key != "head_dim"},
        "head_dim = 16": {**SHAPE, "num_heads": 4},
        r"time_step_limit = \[0.0, 0.1\]": json.loads(
            Mamba2Config(**SHAPE, time_step_limit=[0.0, 0.1]).to_json_string()
        ),
        "rms_norm = False": {**SHAPE, "rms_norm": False},
        "layer_types = ": {**SHAPE, "layer_types": ["linear_attention", "full_attention"]},
        "quantization_config": {**SHAPE, "quantization_config": {"quant_method": "fp8"}},
    }
    counts: ClassVar = {
        "AntonV/mamba2-130m-hf": 128_989_632,
        "AntonV/mamba2-370m-hf": 368_346_624,
        "AntonV/mamba2-780m-hf": 780_161_280,
        "AntonV/mamba2-1.3b-hf": 1_343_757_312,
        "AntonV/mamba2-2.7b-hf": 2_702_599_680,
        "mistralai/Mamba-Codestral-7B-v0.1": 7_285_403_648,
    }


CODESTRAL = {
    "architectures": ["Mamba2ForCausalLM"],
    "bos_token_id": 0,
    "chunk_size": 256,
    "conv_kernel": 4,
    "eos_token_id": 0,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.1,
    "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 8,
    "norm_before_gate": True,
    "num_heads": 128,
    "num_hidden_layers": 64,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "time_step_scale": 1.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 32768,
}


def test_the_published_config_of_codestral_mamba():
    """Its `norm_before_gate` is passed over, as in transformers: the gate comes before the norm."""
    preset = mamba2.PRESETS["mistralai/Mamba-Codestral-7B-v0.1"]
    assert mamba2.config_from_hf(CODESTRAL) == preset
    assert mamba2.config_from_hf(json.loads(Mamba2Config(**CODESTRAL).to_json_string())) == preset
    assert mamba2.config_from_hf(Mamba2Config(**mamba2.config_to_hf(preset)).to_dict()) == preset


def test_values_that_are_left_out_are_those_of_transformers():
    assert mamba2.config_from_hf({}) == mamba2.config_from_hf(Mamba2Config().to_dict())


@pytest.mark.parametrize("key", ["conv_kernel", "state_size", "n_groups", "num_heads", "expand"])
@pytest.mark.parametrize("value", [0, "auto", -1, None])
def test_sizes_that_nothing_can_have_are_refused_by_key_and_value(key, value):
    with pytest.raises(ValueError, match=rf"{key} (= {value!r}|is null), expected a whole number|{key} = {value!r}"):
        mamba2.config_from_hf({**SHAPE, key: value})


def test_a_kernel_of_another_size_than_the_tensors_is_named(tmp_path, tokenizer_dir):
    reference(TestMamba2.cases["groups"]).save_pretrained(tmp_path)
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"conv_kernel": 3}))
    with pytest.raises(UserError, match=r"backbone.layers.0.mixer.conv1d.weight .*\(224, 1, 4\).*\(224, 1, 3\)"):
        load_model(tmp_path, torch.float32)


def test_impossible_values_raise():
    for change in ({"n_groups": 3}, {"ssm_head_dim": 9}):
        with pytest.raises(ValueError, match=next(iter(change))):
            replace(mamba2.PRESETS["tiny"], **change)


@pytest.mark.parametrize("n_groups", [1, 4])
def test_the_gated_norm_rounds_where_that_of_transformers_does(n_groups):
    x, gate = torch.randn(2, 2, 50, 64, dtype=torch.bfloat16)
    norm, theirs = (
        mamba2.GatedRMSNorm(64, n_groups, 1e-3).bfloat16(),
        MambaRMSNormGated(64, 64 // n_groups, 1e-3).bfloat16(),
    )
    norm.weight.data.uniform_(0.5, 1.5)
    theirs.weight.data.copy_(norm.weight.data)
    assert_rounds_alike(norm(x, gate), theirs(x, gate))
    assert (norm(x, gate) - mamba2.GatedRMSNorm(64, 2, 1e-3).bfloat16()(x, gate)).abs().max() > 0.01


@pytest.fixture
def base(tmp_path, tokenizer_dir):
    reference(TestMamba2.cases["kernel-biases-wide"]).save_pretrained(tmp_path / "base")
    shutil.copytree(tokenizer_dir, tmp_path / "base", dirs_exist_ok=True)
    return tmp_path / "base"


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_adapters_over_the_projections_in_peft_and_merged(base, method, tmp_path):
    """LoRA over `in_proj`, which is all that PEFT allows, and IA3 over both."""
    model, (tokens, _) = load_model(base, torch.float32), batch()
    if method == "lora":
        names = add_adapters(model, LoraConfig(rank=4, targets=["all-linear"]))
        assert names == [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]
        assert experts_left_out(model) == "no adapter covers out_proj, 24,576 parameters, as PEFT has none there"
    else:
        names = add_ia3(model, Ia3Config(targets=["in_proj"], feedforward=["out_proj"]))
        assert len(names) == 4
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "ia3" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, adapter, str(base))
    export(base, tmp_path / "merged", adapter, dtype=torch.float32)
    load_adapter(again := load_model(base, torch.float32), adapter)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        plain = theirs(tokens, use_cache=False).logits
        tuned = peft.PeftModel.from_pretrained(theirs, adapter).eval()(tokens, use_cache=False).logits
        assert (tuned - plain).abs().max() > 0.05
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        for found in (model.eval()(tokens), again(tokens), merged(tokens, use_cache=False).logits):
            assert_close(found, tuned)


def test_lora_over_out_proj_is_refused_as_peft_refuses_it(base):
    with pytest.raises(UserError, match=r"lora.targets out_proj: PEFT has no LoRA there in this family"):
        add_adapters(load_model(base, torch.float32), LoraConfig(rank=4, targets=["in_proj", "out_proj"]))
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
        peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["out_proj"], task_type="CAUSAL_LM"))


def kept(run) -> int:
    """The bytes that are kept for the backward pass, each storage once."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def test_a_layer_keeps_little_for_the_backward_pass():
    """Inputs only: not what tokens do to one another in a chunk, nor the states between chunks."""
    config = replace(mamba2.PRESETS["AntonV/mamba2-130m-hf"], n_layers=1)
    ours = mamba2.Mamba2(config).bfloat16().requires_grad_(False)
    theirs = Mamba2Mixer(Mamba2Config(**mamba2.config_to_hf(config)), 0).bfloat16().requires_grad_(False)
    runs, x = make_runs(torch.arange(512)[None], None, None), torch.randn(1, 512, 768).bfloat16().requires_grad_()
    mine, reference = kept(lambda: ours(x, runs, None)), kept(lambda: theirs(x))
    assert mine < 40 * 512 * 1024 and mine < 0.25 * reference


def test_the_residual_stream_is_in_fp32(base):
    model, (tokens, _) = load_model(base, torch.bfloat16), batch()
    seen = []
    model.backbone["norm_f"].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert model(tokens).dtype == torch.bfloat16
    model.config = replace(model.config, has_fp32_residual=False)
    model(tokens)
    assert seen == [torch.float32, torch.bfloat16]
