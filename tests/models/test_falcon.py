"""Falcon, both generations of its decoder, is numerically that of transformers; its checkpoints go in and out unchanged."""

import json
from dataclasses import replace

import pytest
import torch
from numerics import assert_close
from parity import SMALL, FamilyTests, batch, reference
from safetensors.torch import load_file, save_file
from transformers import FalconConfig
from transformers.models.falcon.modeling_falcon import FalconRotaryEmbedding

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import falcon

NEW = {"new_decoder_architecture": True}
CASES = {
    "multi-query": {},  # 7B
    "multi-query-odd-heads-untied": {"hidden_size": 48, "num_attention_heads": 3, "tie_word_embeddings": False},
    "multi-query-narrow-ffn": {"ffn_hidden_size": 80, "layer_norm_epsilon": 0.1},
    "grouped-two-norms": {**NEW, "num_kv_heads": 2},  # 40B
    "grouped-two-norms-untied": {**NEW, "num_kv_heads": 2, "num_attention_heads": 8, "tie_word_embeddings": False},
    "grouped-one-norm-untied": {  # 11B
        **NEW,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "num_hidden_layers": 3,
    },
    "one-group-two-norms": {**NEW, "num_kv_heads": 1, "ffn_hidden_size": 80},
    "one-query-per-group": {**NEW, "num_kv_heads": 4},
}
# published config.json files, without what only their remote code reads
SEVEN = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 65024,
}
FORTY = {**SEVEN, "hidden_size": 8192, "new_decoder_architecture": True, "num_attention_heads": 128}
FORTY |= {"num_hidden_layers": 60, "num_kv_heads": 8}
ELEVEN = {**FORTY, "hidden_size": 4096, "num_attention_heads": 32, "num_ln_in_parallel_attn": 1, "activation": "gelu"}
ELEVEN |= {"ffn_hidden_size": 16384, "max_position_embeddings": 8192, "rope_scaling": None, "rope_theta": 500042.0}
ELEVEN |= {"tie_word_embeddings": False}


def refuse(**changes) -> dict:
    return {**falcon.config_to_hf(falcon.PRESETS["tiny"]), "rope_parameters": None, **changes}


class TestFalcon(FamilyTests):
    module = falcon
    cases = {name: FalconConfig(**{**SMALL, **changes}) for name, changes in CASES.items()}  # noqa: RUF012
    refused = {  # noqa: RUF012
        "activation = 'relu'": refuse(activation="relu"),
        "alibi = True": refuse(alibi=True),
        "bias = True": refuse(bias=True),
        "parallel_attn = False": refuse(parallel_attn=False),
        "multi_query = False": refuse(multi_query=False, new_decoder_architecture=False, num_ln_in_parallel_attn=None),
        "num_ln_in_parallel_attn = 2": refuse(new_decoder_architecture=False),
        "num_ln_in_parallel_attn = 3": refuse(num_ln_in_parallel_attn=3),
        "rope_type = 'linear'": refuse(rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_type = 'dynamic'": refuse(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "partial_rotary_factor = 0.5": refuse(partial_rotary_factor=0.5),
        "attention_dropout = 0.1": refuse(attention_dropout=0.1),
        "hidden_dropout = 0.1": refuse(hidden_dropout=0.1),
        "quantization_config = {'quant_method': 'gptq'}": refuse(quantization_config={"quant_method": "gptq"}),
    }
    counts = {  # noqa: RUF012
        "tiiuae/falcon-7b": 6_921_720_704,
        "tiiuae/falcon-7b-instruct": 6_921_720_704,
        "tiiuae/falcon-11B": 11_102_822_400,
        "tiiuae/falcon-40b": 41_303_293_952,
        "tiiuae/falcon-40b-instruct": 41_303_293_952,
    }


@pytest.mark.parametrize("change", [{"rope_theta": 1e6}, {"norm_eps": 1.0}, {"n_heads": 2, "n_kv_heads": 1}])
def test_each_setting_matters_in_the_comparison(change, tmp_path, tokenizer_dir):
    """The last one: the fused linear has the same shape, but other rows are queries."""
    theirs = reference(TestFalcon.cases["grouped-two-norms"])
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    model, (tokens, _) = load_model(tmp_path, torch.float32), batch()
    other = falcon.Model(replace(model.config, **change))
    other.load_state_dict(model.state_dict())
    assert (model(tokens) - other(tokens)).abs().max() > 0.1


def test_both_norms_of_a_block_matter():
    config = falcon.PRESETS["tiny"]
    model = falcon.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    tokens, _ = batch()
    before = model(tokens)
    for name in ("ln_attn", "ln_mlp"):
        norm = getattr(model.transformer["h"][0], name)
        torch.nn.init.constant_(norm.weight, 3.0)
        after = model(tokens)
        assert (after - before).abs().max() > 1e-3
        before = after


def test_a_tied_head_may_be_stored_a_second_time(tmp_path, tokenizer_dir):
    """As in the files of 7B and 40B on the hub, whose listed sizes count it twice."""
    theirs = reference(TestFalcon.cases["multi-query"])
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["transformer.word_embeddings.weight"].clone()}, file)
    model, (tokens, _) = load_model(tmp_path, torch.float32), batch()
    assert model.lm_head.weight is model.transformer["word_embeddings"].weight
    assert_close(model(tokens), theirs(tokens, use_cache=False).logits)


@pytest.mark.parametrize("preset", ["tiny", "tiiuae/falcon-7b", "tiiuae/falcon-11B"])
def test_rotary_is_that_of_transformers_in_fp32(preset):
    config, positions = falcon.PRESETS[preset], torch.cat((torch.arange(64), torch.arange(8190, 8254)))[None]
    theirs = FalconRotaryEmbedding(FalconConfig(**falcon.config_to_hf(config)))
    for dtype in (torch.float32, torch.bfloat16):
        expected = theirs(torch.zeros(1, dtype=dtype), positions)
        for found, exact in zip(falcon.rotary(positions, config, dtype), expected, strict=True):
            assert torch.equal(found[:, 0], exact)


def test_published_configs_give_the_presets():
    for name, raw in (("falcon-7b", SEVEN), ("falcon-40b", FORTY), ("falcon-11B", ELEVEN)):
        assert falcon.config_from_hf(raw) == falcon.PRESETS[f"tiiuae/{name}"]
        assert falcon.config_from_hf(json.loads(FalconConfig(**raw).to_json_string())) == falcon.config_from_hf(raw)


def test_values_that_old_files_leave_out_are_those_of_transformers():
    shape = {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    for more in ({}, NEW, {**NEW, "num_kv_heads": 2}):
        sparse = falcon.config_from_hf({"model_type": "falcon", **shape, **more})
        assert sparse == falcon.config_from_hf(json.loads(FalconConfig(**shape, **more).to_json_string()))


@pytest.mark.parametrize("name", falcon.PRESETS)
def test_both_generations_of_config_json(name):
    config, raw = falcon.PRESETS[name], json.loads(json.dumps(falcon.config_to_hf(falcon.PRESETS[name])))
    for left_out in (("rope_parameters",), ("rope_theta", "rope_scaling")):  # transformers 4, transformers 5
        assert falcon.config_from_hf({k: v for k, v in raw.items() if k not in left_out}) == config
    assert falcon.config_from_hf(json.loads(FalconConfig(**raw).to_json_string())) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_heads": 3}, "dim 64 is not a multiple of n_heads 3"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"n_heads": 64}, "head_dim 1 is odd"),
        ({"n_norms": 3}, "n_norms 3 is neither 1 nor 2"),
    ],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(falcon.PRESETS["tiny"], **change)


def test_adapters_on_all_linears():
    model = falcon.Model(falcon.PRESETS["tiny"])
    model.init_weights()
    names = add_adapters(model, LoraConfig(rank=2))
    assert {name.rsplit(".", 1)[1] for name in names} == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    tokens = torch.randint(0, 512, (2, 9))
    model(tokens, labels=tokens)[0].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
