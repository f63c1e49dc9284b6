"""`config.json` is read in both spellings, and nothing that it asks for is ignored."""

import pytest

from litmini.models import FAMILIES, family, llama
from litmini.models.hf_config import Yarn, layer_types, read_fields, read_rope, read_yarn, refuse, write_rope

TABLE = {"dim": "hidden_size", "n_heads": "heads", "n_kv_heads": ("kv", 2), "head_dim": ("head", None)}


@pytest.mark.parametrize("none", [None, 0])
def test_null_means_what_it_means_in_transformers(none):
    found = read_fields(TABLE, {"hidden_size": 64, "heads": 4, "kv": none, "head": none})
    assert found == {"dim": 64, "n_heads": 4, "n_kv_heads": 4, "head_dim": 16}


def test_missing_keys_take_the_table_s_value_or_raise():
    assert (
        read_fields({**TABLE, "cap": ("cap", 3, float)}, {"hidden_size": 64, "heads": 4, "cap": 5})["n_kv_heads"] == 2
    )
    with pytest.raises(KeyError, match="hidden_size"):
        read_fields(TABLE, {"heads": 4})


def test_both_spellings_of_rotary_settings():
    four = {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5}
    five = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500, "partial_rotary_factor": 0.5}}
    for hf in (four, five):
        found = read_rope(hf)
        assert (found["rope_type"], found["rope_theta"], found["partial_rotary_factor"]) == ("linear", 500.0, 0.5)
    assert read_rope({"rope_scaling": None}, theta=7.0, partial=0.25)["rope_theta"] == 7.0


def test_rotary_settings_by_type_of_layer():
    by_type = {"full_attention": {"rope_theta": 9.0}, "sliding_attention": {"rope_theta": 8.0, "rope_type": "yarn"}}
    full, local = (read_rope({"rope_parameters": by_type}, layer_type=kind) for kind in by_type)
    assert (full["rope_theta"], full["rope_type"]) == (9.0, "default")
    assert (local["rope_theta"], local["rope_type"]) == (8.0, "yarn")
    assert write_rope(9.0, local_theta=8.0)["rope_parameters"]["sliding_attention"]["rope_theta"] == 8.0


def test_yarn_goes_in_and_out():
    yarn = Yarn(4.0, 64, 1.3, 16.0, 2.0)
    assert read_yarn(read_rope(write_rope(9.0, yarn)), max_positions=0) == yarn
    assert read_yarn(read_rope(write_rope(9.0)), max_positions=0) is None


def test_all_refusals_come_in_one_error():
    implemented = {"act": ("silu", "gelu"), "bias": False, "scale": True, "missing": "x", "window": None}
    refuse("x.py", {"act": "gelu", "bias": 0, "scale": 1, "window": None}, {}, implemented, heads=True)
    hf = {"act": "relu", "bias": 1, "scale": None, "window": 0, "heads": 3, "quantization_config": {}}
    with pytest.raises(ValueError) as error:
        refuse("x.py", hf, {"truncate": False}, implemented, heads=False)
    assert str(error.value) == (
        "not implemented in x.py: act = 'relu', bias = 1, scale = None, window = 0, heads = 3, "
        "quantization_config = {}, truncate = False"
    )


def test_layers_of_a_window_pattern():
    assert layer_types(4, 2) == ["sliding_attention", "full_attention"] * 2


def test_rotary_settings_that_were_ignored_are_refused():
    """By type of layer in a family whose layers are all alike, and a rotated part of nothing."""
    raw = llama.config_to_hf(llama.PRESETS["tiny"])
    by_type = {"full_attention": {"rope_type": "yarn", "factor": 2.0}}
    with pytest.raises(ValueError, match="rope_parameters has settings of full_attention"):
        llama.config_from_hf({**raw, "rope_parameters": by_type})
    with pytest.raises(ValueError, match="partial_rotary_factor = 0"):
        llama.config_from_hf({**raw, "partial_rotary_factor": 0})


WRONG = {
    "llama": {
        "tie_word_embeddings": "false", "rms_norm_eps": "1e-5", "max_position_embeddings": "256", "hidden_size": 64.0,
        "num_hidden_layers": 2**31, "vocab_size": True, "num_attention_heads": 0, "attention_bias": "no",
        "rope_theta": "1e4", "rope_scaling": "yarn", "layer_types": "full_attention", "is_causal": "false",
        "rope_parameters": [], "head_dim": "16", "num_key_value_heads": -2,
    },
    "qwen2": {"use_sliding_window": "false", "sliding_window": "8", "max_window_layers": "0"},
    "falcon": {"new_decoder_architecture": "false", "multi_query": "true", "alibi": "false"},
    "mpt": {"attn_config": [["alibi", True]], "no_bias": "false", "n_heads": "4"},
    "qwen3_moe": {"norm_topk_prob": "false", "num_experts": None, "num_local_experts": "8", "router_aux_loss_coef": "0"},
    "gpt_neox": {"use_parallel_residual": "false", "rotary_pct": "0.25", "tie_word_embeddings": "false"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in WRONG.items() for key in keys])
def test_a_value_of_another_type_is_named(name, key):
    module = family(name)
    raw = module.config_to_hf(module.PRESETS["tiny"])
    if key.startswith("rope"):
        raw.pop("rope_parameters", None)
    with pytest.raises(ValueError, match=key):
        module.config_from_hf(raw | {key: WRONG[name][key]})


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_is_not_causal_is_refused_by_every_family(name):
    module = family(name)
    raw = module.config_to_hf(module.PRESETS["tiny"]) | ({"model_type": name} if name != "olmo3" else {})
    assert module.config_from_hf(raw | {"is_causal": True}) == module.config_from_hf(raw)
    for key, value in {"is_causal": False, "use_bidirectional_attention": True}.items():
        with pytest.raises(ValueError, match=f"not implemented in .*{key} = {value}"):
            module.config_from_hf(raw | {key: value})


@pytest.mark.parametrize("name", ["mistral", "mixtral", "phi3"])
def test_layers_that_are_named_must_be_those_of_the_window(name):
    module = family(name)
    raw = module.config_to_hf(module.PRESETS["tiny"]) | {"model_type": name}
    full, local = ["full_attention"] * 2, ["sliding_attention"] * 2
    for window, types in ((16, full), (None, local), (16, ["sliding_attention", "full_attention"])):
        with pytest.raises(ValueError, match="layer_types = "):
            module.config_from_hf(raw | {"sliding_window": window, "layer_types": types})
    assert module.config_from_hf(raw | {"sliding_window": 16, "layer_types": local}).window == 16
    assert module.config_from_hf(raw | {"sliding_window": None, "layer_types": full}).window is None
