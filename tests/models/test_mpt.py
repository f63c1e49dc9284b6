"""MPT is numerically that of transformers, and its checkpoints go in and out unchanged."""

import json
from dataclasses import replace

import pytest
import torch
from parity import SMALL, FamilyTests, T, batch, reference
from transformers import MptConfig
from transformers.models.mpt.modeling_mpt import MptModel, build_mpt_alibi_tensor

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.models import mpt

CLIPPED = {"alibi_bias_max": 16, "clip_qkv": 0.8}
CASES = {
    "plain": {},
    "six-heads": {"d_model": 48, "n_heads": 6},
    "twelve-heads-wide-epsilon": {"d_model": 48, "n_heads": 12, "layer_norm_epsilon": 0.1},
    "flatter-and-clipped": {"attn_config": CLIPPED, "n_layers": 3},
    "six-heads-flatter-untied": {
        "d_model": 48,
        "n_heads": 6,
        "attn_config": {"alibi_bias_max": 12},
        "tie_word_embeddings": False,
    },
}
SMALL_MPT = {"vocab_size": SMALL["vocab_size"], "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}
# config.json of mosaicml/mpt-7b-storywriter, without what only MosaicML's own code reads
STORYWRITER = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 16,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": 6,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 65536,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "vocab_size": 50432,
}


@pytest.fixture(autouse=True)
def _their_slopes(monkeypatch):
    """transformers forgets to hand alibi_bias_max on, which MosaicML's own code (and vLLM) respect."""

    def build(self, num_heads, length, alibi_bias_max=8, device=None):
        return build_mpt_alibi_tensor(num_heads, length, self.config.attn_config.alibi_bias_max, device)

    monkeypatch.setattr(MptModel, "build_mpt_alibi_tensor", build)


def refuse(**changes) -> dict:
    return {**mpt.config_to_hf(mpt.PRESETS["tiny"]), **changes}


class TestMpt(FamilyTests):
    module = mpt
    cases = {name: MptConfig(**{**SMALL_MPT, **changes}) for name, changes in CASES.items()}  # noqa: RUF012
    fixed = tuple(name for name, c in cases.items() if c.attn_config.alibi_bias_max != 8)
    refused = {  # noqa: RUF012
        "attn_config.attn_type = 'multiquery_attention'": refuse(attn_config={"attn_type": "multiquery_attention"}),
        "attn_config.alibi = False": refuse(attn_config={"alibi": False}),
        "attn_config.rope = True": refuse(attn_config={"rope": True}),
        "attn_config.qk_ln = True": refuse(attn_config={"qk_ln": True}),
        "attn_config.qk_gn = True": refuse(attn_config={"qk_gn": True}),
        "attn_config.prefix_lm = True": refuse(attn_config={"prefix_lm": True}),
        "attn_config.softmax_scale = 0.5": refuse(attn_config={"softmax_scale": 0.5}),
        "attn_config.attn_uses_sequence_id = True": refuse(attn_config={"attn_uses_sequence_id": True}),
        "attn_config.sliding_window_size = 512": refuse(attn_config={"sliding_window_size": 512}),
        "attn_config.attn_pdrop = 0.1": refuse(attn_config={"attn_pdrop": 0.1}),
        "resid_pdrop = 0.1": refuse(resid_pdrop=0.1),
        "emb_pdrop = 0.1": refuse(emb_pdrop=0.1),
        "expansion_ratio = 2": refuse(expansion_ratio=2),
        "ffn_config = {'ffn_type': 'mptglu'}": refuse(ffn_config={"ffn_type": "mptglu"}),
        "norm_type = 'rmsnorm'": refuse(norm_type="rmsnorm"),
        "no_bias = False": refuse(no_bias=False),
        "logit_scale = 'inv_sqrt_d_model'": refuse(logit_scale="inv_sqrt_d_model"),
        "embedding_fraction = 0.5": refuse(embedding_fraction=0.5),
        "quantization_config = {'quant_method': 'gptq'}": refuse(quantization_config={"quant_method": "gptq"}),
    }
    counts = {  # noqa: RUF012
        "mosaicml/mpt-7b": 6_649_286_656,
        "mosaicml/mpt-7b-instruct": 6_649_286_656,
        "mosaicml/mpt-7b-chat": 6_649_286_656,
        "mosaicml/mpt-7b-storywriter": 6_649_286_656,
        "mosaicml/mpt-30b": 29_957_200_896,
        "mosaicml/mpt-30b-instruct": 29_957_200_896,
        "mosaicml/mpt-30b-chat": 29_957_200_896,
    }


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 32, 40, 64, 112])
@pytest.mark.parametrize("alibi_max", [8, 16])
def test_slopes_are_those_of_transformers(n_heads, alibi_max):
    config = replace(mpt.PRESETS["tiny"], dim=n_heads * 8, n_heads=n_heads, alibi_max=alibi_max)
    slopes = mpt.alibi_slopes(config, torch.device("cpu"))
    assert slopes.dtype == torch.float32
    assert torch.equal(-slopes, build_mpt_alibi_tensor(n_heads, 2, alibi_max)[:, 0, 0])  # one position away


def test_slopes_are_those_of_mosaicml():
    """By hand, from llm-foundry's gen_slopes: 12 heads take those of 16, every second one first."""
    config = replace(mpt.PRESETS["tiny"], dim=96, n_heads=12, alibi_max=16)
    expected = [2.0**-m for m in (2, 4, 6, 8, 10, 12, 14, 16, 1, 3, 5, 7)]
    assert mpt.alibi_slopes(config, torch.device("cpu")).tolist() == expected


def test_slopes_of_a_bf16_model_are_fp32():
    model, seen = mpt.Model(mpt.PRESETS["tiny"]).bfloat16(), []
    model.transformer["blocks"][0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(torch.zeros(1, 3, dtype=torch.int64))
    assert seen[0].dtype == torch.float32


@pytest.mark.parametrize("change", [{"clip_qkv": None}, {"alibi_max": 8}, {"n_heads": 8}, {"norm_eps": 1.0}])
def test_each_setting_matters_in_the_comparison(change, tmp_path, tokenizer_dir):
    theirs = reference(MptConfig(**{**SMALL_MPT, "attn_config": CLIPPED}))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    model, (tokens, _) = load_model(tmp_path, torch.float32), batch()
    assert model.config.clip_qkv == 0.8 and model.config.alibi_max == 16
    other = mpt.Model(replace(model.config, **change))
    other.load_state_dict(model.state_dict())
    assert (model(tokens) - other(tokens)).abs().max() > 0.1


def test_alibi_goes_on_beyond_the_length_of_pretraining():
    config = replace(mpt.PRESETS["tiny"], max_positions=8)
    model = mpt.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    assert model(torch.randint(0, 512, (1, T))).isfinite().all()


def test_values_that_old_files_leave_out_are_those_of_transformers():
    shape = {"vocab_size": 8, "d_model": 64, "n_layers": 1, "n_heads": 4}
    sparse = mpt.config_from_hf({"model_type": "mpt", **shape})
    assert sparse == mpt.config_from_hf(json.loads(MptConfig(**shape).to_json_string()))
    assert mpt.config_from_hf({"model_type": "mpt", **shape, "attn_config": None, "norm_type": "layernorm"}) == sparse


def test_published_config_gives_the_preset():
    assert mpt.config_from_hf(STORYWRITER) == mpt.PRESETS["mosaicml/mpt-7b-storywriter"]
    seven = {**STORYWRITER, "max_seq_len": 2048, "attn_config": {"alibi": True, "clip_qkv": None}}
    assert mpt.config_from_hf(seven) == mpt.PRESETS["mosaicml/mpt-7b"]


@pytest.mark.parametrize("name", mpt.PRESETS)
def test_transformers_reads_the_same_from_what_is_written(name):
    config = mpt.PRESETS[name]
    theirs = MptConfig(**json.loads(json.dumps(mpt.config_to_hf(config))))
    assert mpt.config_from_hf(json.loads(theirs.to_json_string())) == config


@pytest.mark.parametrize(
    "change, message",
    [({"n_heads": 3}, "dim 64 is not a multiple of n_heads 3"), ({"clip_qkv": -1.0}, "clip_qkv -1.0 is not above 0")],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(mpt.PRESETS["tiny"], **change)


def test_adapters_on_all_linears():
    model = mpt.Model(mpt.PRESETS["tiny"])
    model.init_weights()
    names = add_adapters(model, LoraConfig(rank=2))
    assert {name.rsplit(".", 1)[1] for name in names} == {"Wqkv", "out_proj", "up_proj", "down_proj"}
    tokens = torch.randint(0, 512, (2, 9))
    model(tokens, labels=tokens)[0].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
