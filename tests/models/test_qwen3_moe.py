"""Qwen 3 MoE against transformers."""

from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close, assert_rounds_alike
from parity import SMALL, ExpertFamilyTests, batch, reference
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, Qwen3MoeSparseMoeBlock

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.methods.adapters import add_adapters, linears
from litmini.models import qwen3_moe

MOE = {**SMALL, "moe_intermediate_size": 32, "num_experts": 8, "num_key_value_heads": 2, "head_dim": 24}
MOE |= {"num_experts_per_tok": 3, "norm_topk_prob": True}


class TestQwen3Moe(ExpertFamilyTests):
    module: ClassVar[ModuleType] = qwen3_moe
    cases: ClassVar[dict[str, Any]] = {
        "gqa": Qwen3MoeConfig(**MOE),
        "mha-tied-40-experts": Qwen3MoeConfig(
            **{**MOE, "num_experts": 40, "num_experts_per_tok": 8, "num_key_value_heads": 4}, tie_word_embeddings=True
        ),
        "mqa-not-normalized": Qwen3MoeConfig(
            **{**MOE, "num_key_value_heads": 1, "norm_topk_prob": False, "head_dim": 16}, rms_norm_eps=1e-3
        ),
        "all-experts-theta": Qwen3MoeConfig(  # in bf16 no rounding sends a token elsewhere
            **{**MOE, "num_experts_per_tok": 8}, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
        ),
    }
    refused: ClassVar[dict[str, dict[str, Any]]] = {
        "hidden_act = 'gelu'": Qwen3MoeConfig(**MOE, hidden_act="gelu").to_dict(),
        "attention_bias = True": Qwen3MoeConfig(**MOE, attention_bias=True).to_dict(),
        "attention_dropout = 0.2": Qwen3MoeConfig(**MOE, attention_dropout=0.2).to_dict(),
        "use_sliding_window = True": Qwen3MoeConfig(**MOE, use_sliding_window=True).to_dict(),
        "decoder_sparse_step = 2": Qwen3MoeConfig(**MOE, decoder_sparse_step=2).to_dict(),
        r"mlp_only_layers = \[0\]": Qwen3MoeConfig(**MOE, mlp_only_layers=[0]).to_dict(),
        "rope_type = 'yarn'": {
            **Qwen3MoeConfig(**MOE).to_dict(),
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        "partial_rotary_factor = 0.5": {**Qwen3MoeConfig(**MOE).to_dict(), "partial_rotary_factor": 0.5},
        "quantization_config = {'quant_method': 'fp8'}": {
            **Qwen3MoeConfig(**MOE).to_dict(),
            "quantization_config": {"quant_method": "fp8"},
        },
    }
    counts: ClassVar[dict[str, int]] = {
        "Qwen/Qwen3-30B-A3B-Base": 30_532_122_624,
        "Qwen/Qwen3-30B-A3B": 30_532_122_624,
        "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    }

    def their_gradients(self, theirs) -> dict[str, torch.Tensor]:
        """transformers 5 groups experts in memory, too."""
        gradients = {}
        for name, gradient in super().their_gradients(theirs).items():
            name, experts, kind = name.partition(".experts.")
            if kind == "gate_up_proj":
                for i, (gate, up) in enumerate(zip(*gradient.chunk(2, 1), strict=True)):
                    gradients[f"{name}.experts.{i}.gate_proj.weight"] = gate
                    gradients[f"{name}.experts.{i}.up_proj.weight"] = up
            elif kind == "down_proj":
                gradients |= {f"{name}.experts.{i}.down_proj.weight": down for i, down in enumerate(gradient)}
            else:
                gradients[name + experts + kind] = gradient
        return gradients

    def test_autocast_computes_experts_in_bf16(self, case, directory):
        theirs = reference(self.cases[case])
        model, (tokens, labels) = load_model(directory(theirs), torch.float32).train(), batch(4)
        with torch.no_grad():
            exact = theirs(tokens, use_cache=False).logits
            rounded = theirs.bfloat16()(tokens, use_cache=False).logits.float()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
            loss, _ = model(tokens, labels=labels)
        assert 0 < (logits - exact).square().mean().sqrt() <= 1.5 * (rounded - exact).square().mean().sqrt()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())

    def test_a_gap_in_the_files_is_named(self, case, directory, monkeypatch):
        model = load_model(directory(reference(self.cases[case])), torch.float32)
        complete = dict(self.module.to_hf(model.named_parameters(), model.config))
        up = next(name for name in complete if ".experts.3." in name and complete[name].shape[0] != model.config.dim)
        grouped = up.partition(".3.")[0] + ".gate_up_proj.weight"
        for broken in ({n: t for n, t in complete.items() if n != up}, {**complete, up: complete[up][1:]}):
            monkeypatch.setattr(
                "litmini.checkpoints.hf.read_tensors", lambda *_, broken=broken, **__: iter(broken.items())
            )
            with pytest.raises(UserError) as error:
                load_model(directory(reference(self.cases[case])), torch.float32)
            assert f"missing {grouped}\n" in f"{error.value}\n"
            assert f"unexpected {grouped} without 3.{up.split('.')[-2]} " in str(error.value)
            assert (f"unexpected {up} " in str(error.value)) == (up in broken)

    def test_experts_are_stacked_from_files_in_any_order(self, case, directory):
        model = load_model(directory(reference(self.cases[case])), torch.float32)
        expected = dict(model.named_parameters())
        files = list(self.module.to_hf(expected.items(), model.config))
        for device in ("cpu", "meta"):
            order = torch.randperm(len(files)).tolist()
            stream = ((files[i][0], files[i][1].to(device)) for i in order)
            found = dict(self.module.from_hf(stream, model.config))
            assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
            assert device == "meta" or all(torch.equal(found[name], expected[name]) for name in expected)
            back = {n: t.shape for n, t in self.module.to_hf(found.items(), model.config)}
            assert back == {n: t.shape for n, t in files}

    def test_loading_holds_the_experts_of_one_layer(self, case, directory):
        model = load_model(directory(reference(self.cases[case])), torch.float32)
        live = most = 0
        files = sorted(self.module.to_hf(model.named_parameters(), model.config))  # the order in a file
        per_layer = 3 * model.config.n_experts

        def stream():
            nonlocal live, most
            for name, tensor in files:
                live += ".experts." in name
                most = max(most, live)
                yield name, tensor

        for name, tensor in self.module.from_hf(stream(), model.config):
            live -= len(tensor) * (2 if name.endswith("gate_up_proj.weight") else ".experts." in name)
        assert live == 0 and most <= per_layer


def test_experts_without_tokens_do_no_work():
    model = qwen3_moe.Model(replace(qwen3_moe.PRESETS["tiny"], n_layers=1))
    model.init_weights(torch.Generator().manual_seed(0))
    moe = model.model["layers"][0].mlp
    x = torch.randn(1, 3, 64, requires_grad=True)
    with torch.no_grad():
        moe.gate.weight[2:] = moe.gate.weight[:1] - 100 * x.detach().sum(1)  # no expert but 0 and 1
        logits = F.linear(x[0], moe.gate.weight)
        moe.gate.weight[2:] *= torch.where((logits[:, 2:] > logits[:, :1]).any(), -1, 1)
        if F.linear(x[0], moe.gate.weight).topk(2).indices.max() > 1:
            pytest.fail("the router must leave experts 2 and 3 alone")
        for weight in moe.experts.parameters():
            weight[2:] = torch.nan  # it would show
    y, _ = moe(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    for weight in moe.experts.parameters():
        assert (weight.grad[2:] == 0).all() and (weight.grad[:2] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_router_and_experts_round_where_those_of_transformers_do(dtype):
    theirs = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**MOE, experts_implementation="grouped_mm")).to(dtype)
    config = qwen3_moe.config_from_hf(Qwen3MoeConfig(**MOE).to_dict())
    moe, x = qwen3_moe.SparseMoE(config).to(dtype), torch.randn(2, 9, 64, dtype=dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    grouped = ("experts.gate_up_proj", "experts.down_proj")
    moe.load_state_dict({f"{n}.weight" if n in grouped else n: t for n, t in theirs.state_dict().items()})
    _, weights, chosen = theirs.gate(x)
    logits, our_weights, our_chosen = moe.gate(x.flatten(0, 1))
    assert logits.dtype == dtype and torch.equal(our_chosen, chosen)
    assert_rounds_alike(our_weights, weights)
    assert_rounds_alike(moe(x)[0], theirs(x))
    norm, their_norm = qwen3_moe.RMSNorm(64, 1e-3).to(dtype), Qwen3MoeRMSNorm(64, 1e-3).to(dtype)
    for one in (norm, their_norm):
        one.weight.data = torch.linspace(0.5, 1.5, 64).to(dtype)
    assert torch.equal(norm(x), their_norm(x))


def test_a_batch_without_targets_or_tokens_is_an_exact_zero():
    model = qwen3_moe.Model(qwen3_moe.PRESETS["tiny"]).train()
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    for documents in (torch.zeros_like(tokens), torch.ones_like(tokens)):
        loss, count = model(tokens, documents=documents, labels=torch.full_like(tokens, -100))
        loss.backward()
        assert loss == 0 and count == 0
        assert all((p.grad == 0).all() for p in model.parameters())


def test_even_routing_has_the_least_balance_loss():
    real = torch.ones(1, 8, dtype=torch.bool)
    even = torch.eye(4).repeat(2, 1) + torch.eye(4).roll(1, 1).repeat(2, 1)
    assert_close(qwen3_moe.balance_loss([even, even], 2, real), torch.tensor(2.0))
    assert qwen3_moe.balance_loss([torch.tensor([[9.0, 8, 0, 0]]).repeat(8, 1)], 2, real) > 3.9  # two experts do it all


def test_lora_leaves_router_and_experts_alone():
    model = qwen3_moe.Model(qwen3_moe.PRESETS["tiny"]).train()
    model.init_weights(torch.Generator().manual_seed(0))
    names = add_adapters(model, LoraConfig(rank=2, targets=["all-linear"]))
    assert len(names) == 8 and all(name.rpartition(".")[0].endswith("self_attn") for name in names)
    assert not any("mlp" in name for name in linears(model))
    tokens = torch.randint(0, 512, (2, 9))
    model(tokens, labels=tokens)[0].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"{name}.lora_{x}" for name in names for x in "AB"}


def test_missing_keys_have_the_values_of_transformers():
    minimal = {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    theirs = Qwen3MoeConfig(**minimal).to_dict()
    assert qwen3_moe.config_from_hf({**minimal, "model_type": "qwen3_moe"}) == qwen3_moe.config_from_hf(theirs)


def test_the_published_config_of_30b_a3b():
    """config.json of Qwen/Qwen3-30B-A3B, as transformers 4 wrote it."""
    published = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    config = qwen3_moe.config_from_hf(published)
    assert config == qwen3_moe.PRESETS["Qwen/Qwen3-30B-A3B"]
    assert config == qwen3_moe.config_from_hf(Qwen3MoeConfig(**published).to_dict())  # as transformers 5 writes it
    assert config == qwen3_moe.config_from_hf(Qwen3MoeConfig(**qwen3_moe.config_to_hf(config)).to_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"n_active": 9}, r"n_active 9 is outside 1..n_experts 8"),
    ],
)
def test_impossible_values_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(qwen3_moe.PRESETS["tiny"], **change)


def test_forward_on_the_meta_device():
    with torch.device("meta"):
        model = qwen3_moe.Model(qwen3_moe.PRESETS["Qwen/Qwen3-30B-A3B"]).bfloat16()
        logits = model(torch.zeros(2, 5000, dtype=torch.int64))
    assert logits.shape == (2, 5000, 151_936) and logits.dtype == torch.bfloat16
