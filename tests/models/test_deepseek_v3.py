"""DeepSeek-V3 and GLM-4.7-Flash are numerically those of transformers, and their checkpoints go in and out unchanged."""

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import parity
import peft
import pytest
import torch
import varlen_kernel  # noqa: F401  (registers FlashAttention's operator on the CPU)
from adapters_in_peft import assert_same_in_peft_and_merged
from numerics import assert_close
from parity import SMALL, FamilyTests, T, batch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeLiteConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model, save_trained
from litmini.checkpoints.peft import load_adapter
from litmini.config.finetune import LoraConfig
from litmini.importers.convert import convert
from litmini.methods.adapters import adapters, add_adapters
from litmini.methods.nf4 import quantize_linears
from litmini.models import deepseek_v3
from litmini.ops.attention import Documents, record_kernels
from litmini.ops.kv_cache import KVCache
from litmini.training.low_memory import checkpoint_activations

PLAIN = {"rope_type": "default", "rope_theta": 100.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 16}
YARN |= {"beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
SHAPE: dict[str, Any] = {**SMALL, "intermediate_size": 80, "moe_intermediate_size": 32, "n_routed_experts": 8}
SHAPE |= {"num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": None, "rope_parameters": YARN}
SHAPE |= {"q_lora_rank": 24, "kv_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
SHAPE |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4, "first_k_dense_replace": 1}
ALL = {"n_group": 1, "num_experts_per_tok": 8}  # in bf16 no rounding sends a token elsewhere
FOUR_BIT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "v_head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
}


def config(*parts: dict[str, Any], kind: type = DeepseekV3Config, **changes: Any) -> Any:
    settings = dict(SHAPE)
    for part in (*parts, changes):
        settings |= part
    return kind(**deepcopy(settings))


def biased(theirs):
    """Biases of experts, which are no parameters there, that change choices."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.2, 0.2, generator=generator)
    return theirs


class TestDeepseekV3(FamilyTests):
    module = deepseek_v3
    cases: ClassVar = {
        "deepseek-v3": config(ALL),
        "moonlight": config(
            ALL,
            q_lora_rank=None,
            n_shared_experts=2,
            rope_parameters=PLAIN,
            routed_scaling_factor=1.5,
            rms_norm_eps=1e-2,
        ),
        "glm-4.7-flash": config(
            ALL, kind=Glm4MoeLiteConfig, rope_parameters=PLAIN, v_head_dim=24, mlp_layer_types=["dense", "sparse"]
        ),
        "groups-one-layer": config(num_hidden_layers=1, first_k_dense_replace=0),
        "halves-tied-biases-not-normalized": config(
            ALL, rope_interleave=False, tie_word_embeddings=True, attention_bias=True, norm_topk_prob=False
        ),
        "all-dense-one-mscale": config(
            first_k_dense_replace=2, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False}
        ),
    }
    refused: ClassVar = {
        "hidden_act = 'gelu'": config(hidden_act="gelu").to_dict(),
        "rope_type = 'linear'": config(rope_parameters={"rope_type": "linear", "factor": 2.0}).to_dict(),
        "partial_rotary_factor = 0.5": {**config().to_dict(), "partial_rotary_factor": 0.5},
        "attention_dropout = 0.1": config(attention_dropout=0.1).to_dict(),
        "scoring_func = 'softmax'": {**config().to_dict(), "scoring_func": "softmax"},
        "topk_method = 'greedy'": {**config().to_dict(), "topk_method": "greedy"},
        "moe_layer_freq = 2": {**config().to_dict(), "moe_layer_freq": 2},
        "num_key_value_heads = 2": config(num_key_value_heads=2).to_dict(),
        "mlp_layer_types = ": config(kind=Glm4MoeLiteConfig, mlp_layer_types=["sparse", "dense"]).to_dict(),
        "first_k_dense_replace = 2": {**config(kind=Glm4MoeLiteConfig).to_dict(), "first_k_dense_replace": 2},
        "quantization_config": {**config().to_dict(), "quantization_config": {"quant_method": "fp8"}},
    }
    counts: ClassVar = {
        "moonshotai/Moonlight-16B-A3B": 15_960_110_208,
        "zai-org/GLM-4.7-Flash": 29_943_393_920,  # without multi-token prediction
        "deepseek-ai/DeepSeek-V3": 671_026_419_200,
    }

    @pytest.fixture(autouse=True)
    def _biases(self, monkeypatch):
        original = parity.reference
        monkeypatch.setattr(parity, "reference", lambda config: biased(original(config)))

    def their_gradients(self, theirs) -> dict[str, torch.Tensor]:
        """transformers 5 groups experts in memory, too."""
        found = {}
        for name, gradient in super().their_gradients(theirs).items():
            grouped = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
            found[f"{name}.weight" if grouped else name] = gradient
        own = self.module.config_from_hf(json.loads(theirs.config.to_json_string()))
        return dict(self.module.to_hf(found.items(), own))


@pytest.fixture
def base(tmp_path, tokenizer_dir):
    """A checkpoint whose dimensions 4 bits take, with biases in fp32."""
    theirs = biased(parity.reference(config(FOUR_BIT, num_hidden_layers=3)))
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
        {"n_active": 3},
        {"n_active_groups": 2},
        {"n_groups": 4, "n_active_groups": 2},
        {"normalize": False},
        {"route_scale": 1.0},
        {"interleaved": False},
        {"mscale": 0.0},
        {"yarn": None},
    ],
)
def test_each_number_matters_in_the_comparison(change):
    """Otherwise the comparison with transformers would not notice that one is ignored."""
    theirs = biased(parity.reference(config()))
    own = deepseek_v3.config_from_hf(json.loads(theirs.config.to_json_string()))
    state, (tokens, _) = {}, batch()
    for name, tensor in theirs.state_dict().items():
        state[f"{name}.weight" if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) else name] = tensor
    logits = []
    for settings in (own, replace(own, **change)):
        model = deepseek_v3.Model(settings)
        model.load_state_dict(state)
        logits.append(model(tokens))
    expected = theirs(tokens, use_cache=False).logits
    assert_close(logits[0], expected)
    assert (logits[1] - expected).abs().max() > 0.05


def test_biases_choose_experts_and_are_not_trained(base):
    model, (tokens, labels) = load_model(base, torch.float32), batch()
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert names == [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)]
    with torch.no_grad():
        expected = model(tokens)
    model(tokens, labels=labels)[0].backward()
    assert all((p.grad is None) == (name in names) for name, p in model.named_parameters())
    for name in names:
        model.get_parameter(name).data.zero_()
    with torch.no_grad():
        assert (model(tokens) - expected).abs().max() > 0.1


def test_biases_stay_in_fp32(base, tmp_path):
    """As in transformers; rounded to bf16, they would choose other experts."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    stored = load_file(base / "model.safetensors")[name]
    assert not torch.equal(stored.bfloat16().float(), stored)
    model = load_model(base, torch.bfloat16)
    assert torch.equal(model.to(torch.bfloat16).get_parameter(name), stored)
    assert {p.dtype for n, p in model.named_parameters() if not n.endswith("correction_bias")} == {torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert torch.equal(theirs.get_buffer(name), stored)
    (tmp_path / "trained").mkdir()
    save_trained(model, tmp_path / "trained", base)
    as_bf16 = export(base, tmp_path / "out", dtype=torch.bfloat16)
    for result in (tmp_path / "trained", as_bf16, convert(base, tmp_path / "converted", torch.bfloat16)):
        found = load_file(result / "model.safetensors")
        assert torch.equal(found[name], stored) and found["model.norm.weight"].dtype == torch.bfloat16


def test_multi_token_prediction_is_carried_through(base, tmp_path):
    file = base / "model.safetensors"
    tensors = load_file(file)
    more = {"model.layers.3.eh_proj.weight": torch.randn(64, 128).bfloat16()}
    more["model.layers.3.mlp.experts.0.up_proj.weight"] = torch.randn(64, 64)
    save_file(tensors | more, file, metadata={"format": "pt"})
    model = load_model(base, torch.float32)
    (tmp_path / "trained").mkdir()
    save_trained(model, tmp_path / "trained", base)
    for result in (export(base, tmp_path / "out"), tmp_path / "trained", convert(base, tmp_path / "converted")):
        found = load_file(result / "model.safetensors")
        assert found.keys() == (tensors | more).keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in (tensors | more).items())


@pytest.mark.parametrize("static", [False, True])
def test_sequences_of_different_lengths_in_a_cache(base, static):
    """Of a GPU, too, where every forward reads all slots."""
    model, (tokens, _) = load_model(base, torch.float32), batch()
    lengths, n = torch.tensor([20, 13]), 8
    with torch.no_grad():
        expected = [
            model(row[None, : length + n])[0, length - 1 :] for row, length in zip(tokens, lengths, strict=True)
        ]
        cache = KVCache(model.config, 2, T, torch.float32, static=static)
        positions = torch.arange(20) - (20 - lengths[:, None])  # padding stands on the left
        prompts = torch.stack([row[p.clamp(min=0)] for row, p in zip(tokens, positions, strict=True)])
        parts = [model(prompts, positions=positions, cache=cache)[:, -1:]]
        for i in range(n):
            new = torch.stack([row[length + i] for row, length in zip(tokens, lengths, strict=True)])[:, None]
            parts.append(model(new, positions=(lengths + i)[:, None], cache=cache))
    assert_close(torch.cat(parts, 1), torch.stack(expected))


def test_packed_sequences_by_flashattention_equal_those_of_the_cpu(base):
    """On a GPU; forward, here without one."""
    model, (tokens, _) = load_model(base, torch.float32), batch()
    documents = Documents.of(packed(tokens)["documents"])
    with torch.no_grad():
        expected = model(tokens, **packed(tokens))
        for kernel in ("sdpa", "explicit", "flex"):
            wanted = replace(documents, kernel=kernel)
            assert_close(model(tokens, **packed(tokens) | {"documents": wanted}), expected)
        with record_kernels() as kernels:
            model.bfloat16()(tokens, **packed(tokens) | {"documents": documents})
        assert kernels == {"varlen"}


def test_activation_checkpointing_gives_the_same_gradients(base):
    model, (tokens, labels) = load_model(base, torch.float32).train(), batch()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(tokens, labels=labels, **packed(tokens))[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        checkpoint_activations(model)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "targets",
    [
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        ["all-linear"],
        ["all-linear", "gate_up_proj", "down_proj"],
    ],
)
def test_adapters_are_the_same_in_peft_and_merged(base, tmp_path, targets):
    ranks = {"shared_experts.up_proj": 2, "o_proj": 3}  # PEFT takes the names of shared experts for those of the others
    ranks = {name: rank for name, rank in ranks.items() if "all-linear" in targets}
    config = LoraConfig(4, 8.0, 0.1, targets, rank_pattern=ranks, alpha_pattern={"o_proj": 5.0})
    assert_same_in_peft_and_merged(base, tmp_path, config)


def test_what_peft_takes_for_experts_is_read_as_such(base, tmp_path):
    """For this family, it turns the names of an MLP's linears into experts, of twice the rank where two are one."""
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    targets = ["kv_b_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model, (tokens, _) = load_model(base, torch.float32), batch()
    load_adapter(model, tmp_path / "theirs")
    layers = {name.partition(".layers.")[2]: layer.lora_A.shape[-2] for name, layer in adapters(model).items()}
    assert {rank for name, rank in layers.items() if "gate_up" in name} == {8} and not any(
        "shared" in n for n in layers
    )
    with torch.no_grad():
        assert_close(model(tokens), theirs(tokens).logits)


def test_4_bits_take_linears_and_experts_and_leave_the_rest(base):
    model, (tokens, labels) = load_model(base, torch.float32), batch()
    with torch.no_grad():
        expected = model(tokens)
    names = quantize_linears(model)
    latents = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    mlps = {"gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    assert {name.rpartition(".")[2] for name in names} == latents | mlps
    with torch.no_grad():
        error = (model(tokens) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < 0.8
    add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    model(tokens, labels=labels)[0].backward()
    assert all((p.grad is not None) for name, p in model.named_parameters() if "lora" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_and_experts_round_where_those_of_transformers_do(dtype):
    settings = config(experts_implementation="grouped_mm")
    theirs = DeepseekV3MoE(settings)
    moe = deepseek_v3.SparseMoE(deepseek_v3.config_from_hf(json.loads(settings.to_json_string())))
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        torch.nn.init.normal_(tensor, std=0.2)
    state = theirs.state_dict()
    for name in ("gate_up_proj", "down_proj"):
        state[f"experts.{name}.weight"] = state.pop(f"experts.{name}")
    moe.load_state_dict(state)
    x = torch.randn(2, 9, 64, dtype=dtype)
    theirs = theirs.to(dtype)
    theirs.gate.e_score_correction_bias = moe.gate.e_score_correction_bias.data  # in fp32, as it is loaded
    assert_close(moe.to(dtype)(x), theirs(x))


def test_the_router_computes_in_fp32_under_autocast():
    model, (tokens, _) = deepseek_v3.Model(deepseek_v3.PRESETS["tiny"]), batch()
    model.init_weights(torch.Generator().manual_seed(0))
    seen = []
    model.model["layers"][1].mlp.gate.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
        router, (x, weights) = model.model["layers"][1].mlp.gate, seen[0]
    assert torch.equal(weights, router(x)[0]) and weights.dtype == torch.float32


MOONLIGHT: dict[str, Any] = {  # config.json of moonshotai/Moonlight-16B-A3B
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
FLASH: dict[str, Any] = {  # config.json of zai-org/GLM-4.7-Flash, without its token ids
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}
V3 = {  # what differs in that of deepseek-ai/DeepSeek-V3, but for its quantization_config
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "vocab_size": 129280,
}


@pytest.mark.parametrize(
    "name, published, kind",
    [
        ("moonshotai/Moonlight-16B-A3B", MOONLIGHT, DeepseekV3Config),
        ("zai-org/GLM-4.7-Flash", FLASH, Glm4MoeLiteConfig),
        ("deepseek-ai/DeepSeek-V3", MOONLIGHT | V3, DeepseekV3Config),
    ],
)
def test_published_config_is_the_preset(name, published, kind):
    preset = deepseek_v3.PRESETS[name]
    assert deepseek_v3.config_from_hf(published) == preset
    assert deepseek_v3.config_from_hf(json.loads(kind(**deepcopy(published)).to_json_string())) == preset
    ours = kind(**deepcopy(deepseek_v3.config_to_hf(preset)))
    assert deepseek_v3.config_from_hf(json.loads(ours.to_json_string())) == preset


@pytest.mark.parametrize("kind", [DeepseekV3Config, Glm4MoeLiteConfig])
def test_what_is_missing_is_the_default_of_transformers(kind):
    own = deepseek_v3.config_from_hf({"model_type": kind.model_type})
    assert own == deepseek_v3.config_from_hf(json.loads(kind().to_json_string()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_dim": 15}, "rope_dim 15 is odd"),
        ({"v_dim": 33}, r"v_dim 33 is above that of keys, 16 \+ 16: not implemented"),
        ({"n_groups": 3}, "n_experts 8 in n_groups 3: expected two or more in each"),
        ({"n_groups": 8}, "n_experts 8 in n_groups 8: expected two or more in each"),
        ({"n_active_groups": 3}, r"n_active_groups 3 is outside 1..n_groups 2"),
        ({"n_active": 5, "n_active_groups": 1}, r"n_active 5 is outside 1..4, the experts of n_active_groups"),
        ({"n_dense": 3}, r"n_dense 3 is outside 0..n_layers 2"),
    ],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(deepseek_v3.PRESETS["tiny"], **change)
