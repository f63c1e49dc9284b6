"""Qwen 3.5 with experts is numerically that of transformers, alone and inside its multimodal checkpoints."""

import json
import shutil
from dataclasses import replace
from typing import ClassVar

import peft
import pytest
import torch
from numerics import assert_close, assert_rounds_alike
from parity import SMALL, ExpertFamilyTests, batch, reference
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model, save_trained
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.importers.convert import convert
from litmini.methods.adapters import add_adapters, experts_left_out
from litmini.models import qwen3_5_moe

SHAPE = {**SMALL, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256}
SHAPE |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
SHAPE |= {"linear_value_head_dim": 24, "layer_types": ["linear_attention", "full_attention"]}
SHAPE |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 40}
SHAPE |= {"num_experts": 8, "num_experts_per_tok": 3}
ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def as_published(theirs):
    """Let transformers save experts stacked, as it does with a model that it has loaded so; a new one it saves one by one."""
    theirs._weight_conversions = []
    return theirs


class TestQwen35Moe(ExpertFamilyTests):
    module = qwen3_5_moe
    cases: ClassVar = {
        "grouped-values": Qwen3_5MoeTextConfig(**SHAPE),
        "mqa-tied-40-experts": Qwen3_5MoeTextConfig(
            **SHAPE | {"num_key_value_heads": 1, "num_experts": 40, "num_experts_per_tok": 8}, tie_word_embeddings=True
        ),
        "interval-eps-half-rotated": Qwen3_5MoeTextConfig(
            **SHAPE | {"num_hidden_layers": 4, "layer_types": None},
            rms_norm_eps=1e-3,
            rope_parameters=ROPE | {"partial_rotary_factor": 0.5},
        ),
        "all-experts": Qwen3_5MoeTextConfig(**SHAPE | {"num_experts_per_tok": 8}),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": Qwen3_5MoeTextConfig(**SHAPE, hidden_act="gelu").to_dict(),
        "rope_type = 'yarn'": {**SHAPE, "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}},
        "attention_bias = True": Qwen3_5MoeTextConfig(**SHAPE, attention_bias=True).to_dict(),
        "attention_dropout = 0.1": Qwen3_5MoeTextConfig(**SHAPE, attention_dropout=0.1).to_dict(),
        "attn_output_gate = False": {**SHAPE, "attn_output_gate": False},
        "norm_topk_prob = False": {**SHAPE, "norm_topk_prob": False},
        r"mlp_only_layers = \[0\]": {**SHAPE, "mlp_only_layers": [0]},
        "decoder_sparse_step = 2": {**SHAPE, "decoder_sparse_step": 2},
        "layer_types = ": {**SHAPE, "layer_types": ["full_attention", "linear_attention"]},
        "quantization_config": {**SHAPE, "quantization_config": {"quant_method": "fp8"}},
    }
    counts: ClassVar = {  # of the text part: tower and multi-token prediction add some percent
        "Qwen/Qwen3.5-35B-A3B": 34_660_610_688,
        "Qwen/Qwen3.5-122B-A10B": 122_111_526_912,
        "Qwen/Qwen3.5-397B-A17B": 396_346_350_336,
    }

    amplified = 4.0

    @pytest.fixture
    def directory(self, tmp_path, tokenizer_dir):
        """Write a reference model as the published ones are, with stacked experts."""

        def write(theirs):
            target = tmp_path / "theirs"
            shutil.rmtree(target, ignore_errors=True)
            as_published(theirs).save_pretrained(target)
            shutil.copytree(tokenizer_dir, target, dirs_exist_ok=True)
            return target

        return write


def test_the_text_config_of_a_published_checkpoint():
    """That of Qwen3.5-35B-A3B, whose keys without meaning for the text are passed over."""
    published = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 512,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {**ROPE, "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_theta": 10000000},
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "use_cache": True,
        "vocab_size": 248320,
    }
    preset = qwen3_5_moe.PRESETS["Qwen/Qwen3.5-35B-A3B"]
    assert qwen3_5_moe.config_from_hf(published) == preset
    assert qwen3_5_moe.config_from_hf(Qwen3_5MoeTextConfig(**published).to_dict()) == preset
    assert qwen3_5_moe.config_from_hf(Qwen3_5MoeTextConfig(**qwen3_5_moe.config_to_hf(preset)).to_dict()) == preset


def test_values_that_are_left_out_are_those_of_transformers():
    for raw in ({}, {"layer_types": None}, {"num_hidden_layers": 3, "full_attention_interval": 2}):
        assert qwen3_5_moe.config_from_hf(raw) == qwen3_5_moe.config_from_hf(Qwen3_5MoeTextConfig(**raw).to_dict())


def test_impossible_values_raise():
    for change in ({"linear_v_heads": 6}, {"n_kv_heads": 3}, {"rotary_pct": 0.1}, {"n_active": 9}):
        with pytest.raises(ValueError, match=next(iter(change))):
            replace(qwen3_5_moe.PRESETS["tiny"], **change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shared_expert_rounds_where_that_of_transformers_does(dtype):
    theirs = Qwen3_5MoeSparseMoeBlock(Qwen3_5MoeTextConfig(**SHAPE, experts_implementation="grouped_mm")).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    moe = qwen3_5_moe.SparseMoE(qwen3_5_moe.config_from_hf(SHAPE)).to(dtype)
    names = {name: f"{name}.weight" for name in ("experts.gate_up_proj", "experts.down_proj")}
    moe.load_state_dict({names.get(name, name): tensor for name, tensor in theirs.state_dict().items()})
    x = torch.randn(2, 9, 64, dtype=dtype)
    y, logits = moe(x)
    assert logits.shape == (18, 8) and logits.dtype == dtype
    assert_rounds_alike(y, theirs(x))
    with torch.no_grad():
        moe.shared_expert_gate.weight.zero_()
    assert (moe(x)[0] - y).abs().max() > 0.1 * y.abs().max()  # the gate matters here


@pytest.fixture
def single(tmp_path, tokenizer_dir):
    """A checkpoint with experts one by one, as transformers saves a new model, and its reference."""
    theirs = reference(TestQwen35Moe.cases["grouped-values"])
    theirs.save_pretrained(tmp_path / "single")
    shutil.copytree(tokenizer_dir, tmp_path / "single", dirs_exist_ok=True)
    return tmp_path / "single", theirs


def test_experts_one_by_one_are_read_and_written_stacked(single, tmp_path):
    """As the files of FP8 checkpoints have them; what is written loads in transformers."""
    source, theirs = single
    names = load_file(source / "model.safetensors").keys()
    assert any(".experts.7.gate_proj.weight" in name for name in names)
    tokens, _ = batch()
    convert(source, tmp_path / "converted")
    written = load_file(tmp_path / "converted/model.safetensors")
    assert written["model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 64, 64)
    assert not any(".experts.7." in name for name in written)
    again, report = type(theirs).from_pretrained(tmp_path / "converted", output_loading_info=True, dtype=torch.float32)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        assert_close(again.eval()(tokens, use_cache=False).logits, expected)
        for directory in (source, tmp_path / "converted"):
            assert_close(load_model(directory, torch.float32)(tokens), expected)


def test_an_expert_that_is_missing_is_named(single):
    source, _ = single
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected model.layers.1.mlp.experts.gate_up_proj.weight without 3.up_proj"):
        load_model(source, torch.float32)


def read_all(directory) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.fixture
def base(tmp_path, tokenizer_dir):
    """A multimodal checkpoint, as all published ones are, with weights for multi-token prediction; and its model."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    text = json.loads(TestQwen35Moe.cases["interval-eps-half-rotated"].to_json_string())
    ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=vision, **ids)
    whole = as_published(Qwen3_5MoeForConditionalGeneration(config).eval())
    for name, parameter in whole.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.data += "norm" in name
    target = tmp_path / "base"
    whole.save_pretrained(target)
    shutil.copytree(tokenizer_dir, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in tensors
    more = {"mtp.fc.weight": torch.randn(64, 128).bfloat16()}
    more |= {f"mtp.layers.0.mlp.experts.{i}.up_proj.weight": torch.randn(32, 64) for i in range(8)}
    save_file(tensors | more, target / "model.safetensors", metadata={"format": "pt"})
    return target, whole


def test_the_text_part_of_a_multimodal_checkpoint(base, tmp_path):
    """Adapters over experts, shared expert, linear attention and attention, in PEFT and merged; all else as it was."""
    source, whole = base
    tokens = torch.randint(0, 90, (2, 70))
    model = load_model(source, torch.float32)
    with torch.no_grad():
        assert_close(model(tokens), whole(tokens, use_cache=False).logits)
    targets = ["in_proj_qkv", "in_proj_b", "out_proj", "q_proj", "shared_expert_gate", "gate_up_proj", "down_proj"]
    names = add_adapters(model, LoraConfig(rank=2, targets=targets))
    assert {name.split("layers.0.")[-1] for name in names if "layers.0." in name} >= {
        *STACKS,
        "mlp.shared_expert.down_proj",
    }
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, adapter, str(source))
    export(source, tmp_path / "merged", adapter, dtype=torch.float32)
    load_adapter(again := load_model(source, torch.float32), adapter)
    merged = Qwen3_5MoeForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tuned = peft.PeftModel.from_pretrained(whole, adapter).eval()
    with torch.no_grad():
        ours = model.eval()(tokens)
        assert_close(ours, tuned(tokens, use_cache=False).logits)
        assert_close(merged(tokens, use_cache=False).logits, ours)
        assert_close(again(tokens), ours)
    after, before = read_all(tmp_path / "merged"), read_all(source)
    assert after.keys() == before.keys()
    beside = [name for name in before if "language_model" not in name and name != "lm_head.weight"]
    assert len([name for name in beside if name.startswith("mtp.")]) == 9
    assert all(torch.equal(after[name], before[name]) for name in beside)


def test_what_is_trained_has_the_layout_of_its_base(base, tmp_path):
    source, _ = base
    (tmp_path / "full").mkdir()
    save_trained(load_model(source, torch.float32), tmp_path / "full", source)
    after, before = read_all(tmp_path / "full"), read_all(source)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_logits_do_not_depend_on_where_a_file_has_its_tensors(single, tmp_path):
    """safetensors files hold them at any multiple of 8 bytes."""
    source, _ = single
    convert(source, tmp_path / "base")
    tensors, tokens = load_file(tmp_path / "base/model.safetensors"), batch()[0]
    found = []
    for size in range(8):  # so that the header has other lengths
        save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt", "note": "x" * 8 * size})
        with torch.no_grad():
            found.append(load_model(tmp_path / "base", torch.float32)(tokens))
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_all_linear_covers_the_shared_expert_and_says_what_is_left_out():
    model = qwen3_5_moe.Model(qwen3_5_moe.PRESETS["tiny"])
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 2 * 5 + 4 + 3 * 4
    assert "no adapter covers the experts (down_proj, gate_up_proj), 294,912 parameters" in experts_left_out(model)
