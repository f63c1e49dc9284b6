"""Configurations of Llama and Mistral: config.json in both spellings, refusals, presets and initial weights."""

import json
from dataclasses import replace

import pytest
import torch
from test_llama import CASES, reference
from transformers import LlamaConfig, MistralConfig

from litmini.models import llama


def old_generation(config: dict, type_key: str) -> dict:
    """The same `config.json` as transformers 4 wrote it."""
    rope = dict(config["rope_parameters"])
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    return {**old, "rope_scaling": None if kind == "default" else {type_key: kind, **rope}}


@pytest.mark.parametrize("case", ["gqa", "linear", "llama3", "mistral-window-linear-tied"])
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_both_generations_of_config_json(case, type_key):
    theirs = reference(**CASES[case]).config
    new = json.loads(theirs.to_json_string())
    config = llama.config_from_hf(new)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (config.rope_scaling is None) == (theirs.rope_parameters["rope_type"] == "default")
    old = old_generation(new, type_key)
    assert "rope_parameters" not in old
    assert llama.config_from_hf(old) == config


def test_values_that_old_files_leave_out_are_those_of_transformers():
    shape = {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"intermediate_size": 8}
    for kind, theirs in (("llama", LlamaConfig(**shape)), ("mistral", MistralConfig(**shape, num_key_value_heads=4))):
        config = llama.config_from_hf({"model_type": kind, **shape, "num_key_value_heads": None})
        everything = llama.config_from_hf(theirs.to_dict())
        assert config == replace(everything, max_positions=config.max_positions)
    assert config.window == 4096


def test_rope_scaling_added_by_hand_wins_as_in_transformers():
    raw = llama.config_to_hf(llama.PRESETS["tiny"])
    raw |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5}
    config = llama.config_from_hf(raw)
    assert config == llama.config_from_hf(LlamaConfig(**raw).to_dict())
    assert config.rope_scaling == llama.RopeScaling("linear", 2.0) and config.rope_theta == 5e5


def test_null_is_the_default():
    raw = llama.config_to_hf(llama.PRESETS["tiny"])
    nulls = dict.fromkeys(("head_dim", "pretraining_tp", "attention_dropout", "partial_rotary_factor", "rope_scaling"))
    assert llama.config_from_hf({**raw, **nulls}) == llama.PRESETS["tiny"]


@pytest.mark.parametrize("name", llama.PRESETS)
def test_config_survives_the_way_out_and_in(name):
    config = llama.PRESETS[name]
    raw = json.loads(json.dumps(llama.config_to_hf(config)))
    assert llama.config_from_hf(raw) == config
    assert llama.config_from_hf(old_generation(raw, "rope_type")) == config
    assert llama.config_from_hf({k: v for k, v in raw.items() if k != "rope_parameters"}) == config  # transformers 4
    family = MistralConfig if config.model_type == "mistral" else LlamaConfig
    assert llama.config_from_hf(family(**raw).to_dict()) == config  # and transformers 5 reads the same from it


def test_config_with_every_field_changed_survives():
    scaling = llama.RopeScaling("llama3", 4.0, 2.0, 8.0, 64)
    config = llama.Config(96, 64, 3, 4, 1, 24, 80, 512, 123.0, scaling, 1e-3, True, True, True)
    assert llama.config_from_hf(llama.config_to_hf(config)) == config
    assert llama.config_from_hf(LlamaConfig(**llama.config_to_hf(config)).to_dict()) == config


UNKNOWN = {
    "hidden_act = 'gelu'": {"hidden_act": "gelu"},
    "rope_type = 'yarn'": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "rope_type = 'dynamic'": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope_type = 'longrope'": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": []}},
    "partial_rotary_factor = 0.5": {"partial_rotary_factor": 0.5},
    "partial_rotary_factor = 0.25": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
    "quantization_config = {'quant_method': 'gptq'}": {"quantization_config": {"quant_method": "gptq"}},
    "sliding_window = 64": {"sliding_window": 64},
    "attention_dropout = 0.1": {"attention_dropout": 0.1},
    "pretraining_tp = 2": {"pretraining_tp": 2},
    "layer_types = ['full_attention', 'sliding_attention']": {"layer_types": ["full_attention", "sliding_attention"]},
}


@pytest.mark.parametrize("message", UNKNOWN)
def test_what_is_not_implemented_raises(message):
    raw = {**llama.config_to_hf(llama.PRESETS["tiny"]), "rope_parameters": None, **UNKNOWN[message]}
    with pytest.raises(ValueError) as error:
        llama.config_from_hf(raw)
    assert message in str(error.value)


def test_everything_not_implemented_is_in_one_error():
    raw = {**llama.config_to_hf(llama.PRESETS["tiny"]), "hidden_act": "relu", "pretraining_tp": 4}
    with pytest.raises(ValueError, match=r"hidden_act = 'relu', pretraining_tp = 4"):
        llama.config_from_hf(raw)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"window": 0}, "window 0 is below 1"),
    ],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(llama.PRESETS["tiny"], **change)


COUNTS = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
}


def test_parameter_counts_are_the_published_ones():
    assert COUNTS.keys() == llama.PRESETS.keys() - {"tiny"}
    for name, count in COUNTS.items():
        with torch.device("meta"):
            model = llama.Model(llama.PRESETS[name])
        assert sum(p.numel() for p in model.parameters()) == count, name


def test_forward_on_the_meta_device():
    """Shapes and costs of any size can be had without its memory."""
    with torch.device("meta"):
        model = llama.Model(llama.PRESETS["mistralai/Mistral-7B-v0.1"]).bfloat16()
        logits = model(torch.zeros(2, 5000, dtype=torch.int64))
    assert logits.shape == (2, 5000, 32_000) and logits.dtype == torch.bfloat16


def test_init_weights():
    config = replace(llama.PRESETS["tiny"], vocab_size=4096, attn_bias=True, mlp_bias=True)
    model, again = llama.Model(config), llama.Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    model.init_weights(torch.Generator().manual_seed(3))
    again.init_weights(torch.Generator().manual_seed(3))
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
        if "norm" in name:
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            assert abs(p.std() - 0.02) < 1e-3 and abs(p.mean()) < 2e-3, name
