"""DoRA, rsLoRA, PiSSA, patterns, whole modules and LoRA+: against PEFT, both ways, merged and on 4-bit bases."""

import dataclasses
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from numerics import assert_close, difference
from torch import nn

import litmini
from litmini.checkpoints.export import export
from litmini.checkpoints.hf import load_model, save_model, save_trained
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import LoraConfig
from litmini.config.training import OptimConfig
from litmini.errors import UserError
from litmini.generation.multi_adapter import MultiLoRA
from litmini.methods import registry
from litmini.methods.adapters import (
    adapters,
    add_adapters,
    experts_left_out,
    learning_rate_ratios,
    merge_adapters,
    remove_adapters,
    restore_adapters,
)
from litmini.methods.base_layer import AdapterLayer, ModulesToSaveLayer, dense, module_name
from litmini.methods.dora import DoRALinear
from litmini.methods.lora import LoRALinear
from litmini.methods.nf4 import NF4Linear, quantize_linears
from litmini.methods.pissa import PiSSALinear
from litmini.models import gpt_oss, granite_hybrid, llama, mixtral, qwen2, qwen3_5_moe, qwen3_moe
from litmini.training.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 512
METHODS = {  # our settings, our class, PEFT's settings
    "lora": ({}, None, {}),
    "rslora": ({"rank_stabilized": True}, None, {"use_rslora": True}),
    "dora": ({}, DoRALinear, {"use_dora": True}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 3.0}},
        None,
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 3.0}},
    ),
    "whole modules": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        None,
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "a whole module whose name ends others": ({"modules_to_save": ["norm"]}, None, {"modules_to_save": ["model.norm"]}),
    "whole norms, rsdora": (
        {"rank_stabilized": True, "modules_to_save": ["input_layernorm"]},
        DoRALinear,
        {"use_rslora": True, "use_dora": True, "modules_to_save": ["input_layernorm"]},
    ),
}


def changed(model: nn.Module) -> nn.Module:
    """Every trained parameter moved at random."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def ours(directory, settings, layer, dtype=torch.float32):
    model = load_model(directory, dtype)
    config = LoraConfig(rank=4, alpha=12, targets=["q_proj", "up_proj", "down_proj"], **settings)
    add_adapters(model, config, layer)
    return model, config


def theirs(directory, settings):
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj", "down_proj"], **settings
    )
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("method", METHODS)
def test_from_us_to_peft(tiny_dir, tmp_path, method):
    settings, layer, _ = METHODS[method]
    model, _ = ours(tiny_dir, settings, layer)
    base = load_model(tiny_dir, torch.float32)(TOKENS)
    if layer is None or "layernorm" not in str(settings):
        assert torch.equal(model(TOKENS), base), "it starts as the base, exactly"
    expected = changed(model)(TOKENS)
    save_adapter(model, tmp_path, base=str(tiny_dir))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(reference, tmp_path).eval()(TOKENS).logits
    assert_close(found, expected)
    assert (expected - base).abs().max() > 0.1
    again = load_model(tiny_dir, torch.float32)
    load_adapter(again, tmp_path)
    assert torch.equal(again(TOKENS), expected)


@pytest.mark.parametrize("method", METHODS)
def test_from_peft_to_us_with_equal_gradients_and_counts(tiny_dir, tmp_path, method):
    settings, layer, peft_settings = METHODS[method]
    reference = changed(theirs(tiny_dir, peft_settings))
    reference.save_pretrained(tmp_path)
    model = load_model(tiny_dir, torch.float32)
    load_adapter(model, tmp_path)
    assert_close(model(TOKENS), reference(TOKENS).logits)
    fresh, _ = ours(tiny_dir, settings, layer)
    count = sum(p.numel() for p in fresh.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in reference.parameters() if p.requires_grad)
    for module in adapters(model).values():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not name.startswith("base"))
    model(TOKENS).square().mean().backward()
    reference(TOKENS).logits.square().mean().backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
    compared = 0
    for name, module in adapters(model).items():
        if isinstance(module, ModulesToSaveLayer):
            pairs = {f"modules_to_save.default.{n}": p.grad for n, p in module.full.named_parameters()}
        else:
            kinds = [key.removesuffix(".weight") for key in module.peft_keys]
            pairs = {f"{kind}.default.weight": getattr(module, kind).grad for kind in kinds}
        for suffix, gradient in pairs.items():
            expected = gradients[f"base_model.model.{name}.{suffix}"]
            assert_close(gradient, expected)
            compared += 1
    assert compared == len(gradients)


@pytest.mark.parametrize("method", METHODS)
def test_merged_restored_and_exported(tiny_dir, tmp_path, method):
    settings, layer, _ = METHODS[method]
    model, _ = ours(tiny_dir, settings, layer)
    base = load_model(tiny_dir, torch.float32)(TOKENS)
    expected = changed(model)(TOKENS)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", base=str(tiny_dir))
    replaced = merge_adapters(model)
    assert_close(model(TOKENS), expected)
    restore_adapters(model, replaced)
    assert torch.equal(model(TOKENS), expected)
    removed = remove_adapters(model)
    assert torch.equal(model(TOKENS), base)
    restore_adapters(model, removed)
    assert torch.equal(model(TOKENS), expected)
    export(tiny_dir, tmp_path / "merged", tmp_path / "adapter")
    assert_close(load_model(tmp_path / "merged", torch.float32)(TOKENS), expected)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_modules_trained_in_full_unties_them(tokenizer_dir, tmp_path, name):
    """Requirement 15."""
    config = dataclasses.replace(llama.PRESETS["tiny"], tied=True)
    tied = llama.Model(config)
    tied.init_weights(torch.Generator().manual_seed(0))
    for part in ("tied", "adapter"):
        (tmp_path / part).mkdir()
    save_model(tmp_path / "tied", llama.config_to_hf(config), tied.named_parameters(), tokenizer_dir)
    model, _ = ours(tmp_path / "tied", {"modules_to_save": [name]}, None)
    expected = changed(model)(TOKENS)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "tied"))
    export(tmp_path / "tied", tmp_path / "merged", tmp_path / "adapter")
    assert_close(load_model(tmp_path / "merged", torch.float32)(TOKENS), expected)


def test_pissa(tiny_dir, tmp_path):
    base = load_model(tiny_dir, torch.float32)
    expected = base(TOKENS)
    model, _ = ours(tiny_dir, {"init": "pissa"}, None)
    assert_close(model(TOKENS), expected)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, PiSSALinear)
    weight = base.get_parameter("model.layers.0.self_attn.q_proj.weight")
    u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
    error = difference(layer.delta(), u[:, :4] * s[:4] @ v[:4])
    assert error < 1e-2  # of the randomized decomposition, not of rounding
    again, _ = ours(tiny_dir, {"init": "pissa"}, None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    trained = changed(model)(TOKENS)
    save_adapter(model, tmp_path, base=str(tiny_dir))
    for scaled in (False, True):
        if scaled:  # the scale survives at twice the rank
            model, _ = ours(tiny_dir, {"init": "pissa", "rank_stabilized": True}, None)
            trained = changed(model)(TOKENS)
            save_adapter(model, tmp_path, base=str(tiny_dir))
        reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
        with torch.no_grad():
            found = peft.PeftModel.from_pretrained(reference, tmp_path).eval()(TOKENS).logits
        assert_close(found, trained)


def trained_dora(base, dtype=torch.float32):
    layer = DoRALinear(base, 4, 8.0)
    changed(layer)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dora_with_zero_rows_bias_and_4_bit_base(bias, packed):
    """Requirement 18."""
    base: nn.Module = nn.Linear(64, 48, bias=bias).requires_grad_(False)
    base.weight.data[5:9] = 0
    if packed:
        base = NF4Linear(base)
    x = torch.randn(3, 7, 64, requires_grad=True)
    assert torch.equal(DoRALinear(base, 4, 8.0)(x), base(x)), "at the start the output is the base's"
    layer = trained_dora(base)
    y = layer(x)
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    weight = (base.dequantize() if packed else base.weight) + layer.delta()
    plain = nn.functional.linear(x, layer.lora_magnitude_vector[:, None] * weight / weight.norm(dim=1, keepdim=True))
    assert_close(y, plain if base.bias is None else plain + base.bias)
    assert_close(layer.merge()(x), y)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
def test_small_changes_are_not_rounded_away_in_bf16(cls, bits, mixed):
    """Requirement 17: beside products rounded to 8 bits, most of such a change would be lost, and most of its training."""
    torch.manual_seed(0)
    base, x = nn.Linear(64, 48).requires_grad_(False).bfloat16(), torch.randn(4000, 64).bfloat16()
    layer = cls(NF4Linear(base) if bits == 4 else base, 4, 8.0)
    start = layer.merged_weight()
    nn.init.normal_(layer.lora_B, std=0.0002)
    if cls is DoRALinear:
        layer.lora_magnitude_vector.data *= 1.0004
    change = nn.functional.linear(x.float(), layer.merged_weight() - start).detach()
    plain = nn.functional.linear(x.float(), start)
    assert change.std() < 0.003 * plain.std()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        y = layer(x.float() if mixed else x)
    assert y.dtype == torch.bfloat16
    part = ((y - base.bias).float() - plain).mul(change).sum() / change.square().sum()
    assert part.item() == pytest.approx(1, abs=0.1)


def test_frozen_dora_computes_its_magnitude_scale_once(tiny_dir, tmp_path, monkeypatch):
    model, _ = ours(tiny_dir, {}, DoRALinear)
    save_adapter(changed(model), tmp_path, base=str(tiny_dir))
    loaded, _ = litmini.load(tiny_dir, tmp_path, dtype="fp32")
    expected = loaded(TOKENS)
    monkeypatch.setattr(DoRALinear, "norm", lambda *_: pytest.fail("computed again"))
    assert torch.equal(loaded(TOKENS), expected)


def test_magnitude_scale_follows_what_is_trained_beside_a_frozen_magnitude():
    layer, x = trained_dora(nn.Linear(16, 12).requires_grad_(False)), torch.randn(3, 16)
    layer.lora_magnitude_vector.requires_grad_(False)
    layer(x)
    layer.lora_B.data += 1
    assert_close(layer(x), layer.merge()(x))
    layer.requires_grad_(False)(x)
    assert layer.double().magnitude_scale().dtype == torch.float64, "computed again for what .to() made of it"


def test_dropout_waits_for_training(tiny_dir):
    model = load_model(tiny_dir, torch.float32)
    add_adapters(model, LoraConfig(rank=4, dropout=0.5, init="pissa"))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(TOKENS), model(TOKENS))


def test_a_head_that_a_merge_untied_is_saved(tokenizer_dir, tmp_path):
    """Requirement 15."""
    config = dataclasses.replace(llama.PRESETS["tiny"], tied=True)
    tied = llama.Model(config)
    tied.init_weights(torch.Generator().manual_seed(0))
    for part in ("tied", "merged", "same"):
        (tmp_path / part).mkdir()
    save_model(tmp_path / "tied", llama.config_to_hf(config), tied.named_parameters(), tokenizer_dir)
    model = load_model(tmp_path / "tied", torch.float32)
    save_trained(model, tmp_path / "same", tmp_path / "tied")
    assert (tmp_path / "same/config.json").read_text() == (tmp_path / "tied/config.json").read_text()
    add_adapters(model, LoraConfig(rank=4, targets=["lm_head"]))
    expected = changed(model)(TOKENS)
    merge_adapters(model)
    save_trained(model, tmp_path / "merged", tmp_path / "tied")
    assert_close(load_model(tmp_path / "merged", torch.float32)(TOKENS), expected)


def test_small_updates_of_whole_modules_are_not_lost(tiny_dir):
    """Requirement 17: what is trained is in fp32, beside a base in bf16, and computes in bf16."""
    model, _ = ours(tiny_dir, {"modules_to_save": ["embed_tokens", "lm_head"]}, None, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    loss, _ = model(TOKENS, labels=TOKENS)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert model(TOKENS).dtype == torch.bfloat16


def test_a_small_module_may_have_the_rank_of_large_ones(tiny_dir):
    """As PEFT allows it, so that all-linear goes with a usual rank where a model has narrow projections."""
    model = load_model(tiny_dir, torch.float32)
    add_adapters(model, LoraConfig(rank=48, targets=["q_proj", "k_proj"]))
    (narrow, *_) = [layer for name, layer in adapters(model).items() if name.endswith("k_proj")]
    assert isinstance(narrow, LoRALinear) and narrow.base.out_features < 48 == narrow.lora_A.shape[0]
    x = torch.randn(3, narrow.base.in_features)
    with torch.no_grad():
        narrow.lora_B.normal_()
        assert_close(narrow(x), x @ narrow.merged_weight().T)
    for settings in ({"rank": 65}, {"rank": 48, "init": "pissa"}):
        with pytest.raises(UserError, match="the smaller size of"):
            add_adapters(load_model(tiny_dir, torch.float32), LoraConfig(targets=["q_proj", "k_proj"], **settings))


def test_lora_plus(tiny_dir):
    model, config = ours(tiny_dir, {"plus_ratio": 16.0}, None)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3), learning_rate_ratios(model, config))
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    for name, rate in rates.items():
        assert rate == pytest.approx(1.6e-2 if name.endswith("lora_B") else 1e-3)


@pytest.mark.parametrize(
    ("settings", "layer", "message"),
    [
        ({"rank_pattern": {"k_proj": 2}}, None, "rank_pattern k_proj matches no target; there are: down_proj, q_proj"),
        ({"rank_pattern": {"q_proj": 65}}, None, r"rank 65 is outside 1..64, the smaller size of .*q_proj"),
        ({"modules_to_save": ["head"]}, None, "modules_to_save head matches no module; there are: .*embed_tokens"),
        ({"modules_to_save": ["q_proj"]}, None, "q_proj: in both lora.targets and lora.modules_to_save"),
        ({"init": "pissa"}, DoRALinear, "pissa goes with plain LoRA only"),
    ],
)
def test_settings_that_do_not_go_together(tiny_dir, settings, layer, message):
    with pytest.raises(UserError, match=message):
        ours(tiny_dir, settings, layer)


def test_settings_that_do_not_go_with_4_bits(tiny_dir):
    for settings, message in (
        ({"init": "pissa"}, "needs plain 16-bit"),
        ({"modules_to_save": ["o_proj"]}, "in 4 bits"),
    ):
        model = load_model(tiny_dir, torch.float32)
        for name, module in list(model.named_modules()):
            if name.endswith(("q_proj", "o_proj")):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, NF4Linear(module))
        with pytest.raises(UserError, match=message):
            add_adapters(model, LoraConfig(rank=4, targets=["q_proj"], **settings))


class Gate(AdapterLayer):
    """A method of a few lines: y = g * base(x), with one trained g for each layer."""

    peft_keys = ("gate",)

    def __init__(self, base, *_):
        super().__init__()
        self.base, self.gate = base, nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.base(x) * self.gate

    def merged_weight(self):
        return dense(self.base) * self.gate

    @classmethod
    def merged_bias(cls, bias, tensors):
        return bias * tensors["gate"]

    def peft_tensors(self):
        return {"gate": self.gate}

    def load_peft(self, tensors):
        self.gate.data.copy_(tensors["gate"])

    @classmethod
    def from_peft(cls, base, name, config, tensors):
        return cls(base)

    @classmethod
    def peft_config(cls, layers, model):
        return {"peft_type": "GATE", "target_modules": sorted({module_name(name) for name in layers})}

    @classmethod
    def reads(cls, config):
        return config.get("peft_type") == "GATE"


@torch.no_grad()
def test_a_new_method_is_one_class(tokenizer_dir, tmp_path, monkeypatch):
    """Added, saved, read, merged, exported and served beside others: nothing outside of methods/ knows it."""
    monkeypatch.setattr(registry, "METHODS", (*registry.METHODS, Gate))
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    model = qwen2.Model(qwen2.PRESETS["tiny"])  # with biases
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    save_model(base, qwen2.config_to_hf(model.config), model.named_parameters(), tokenizer_dir)
    add_adapters(model, LoraConfig(rank=4, targets=["q_proj", "up_proj"]), Gate)
    expected = changed(model)(TOKENS)
    save_adapter(model, adapter, base=str(base))
    loaded, _ = litmini.load(base, adapter, dtype="fp32")
    assert torch.equal(loaded(TOKENS), expected)
    merge_adapters(loaded)
    assert_close(loaded(TOKENS), expected)
    export(base, tmp_path / "merged", adapter)
    assert_close(load_model(tmp_path / "merged", torch.float32)(TOKENS), expected)
    multi_lora = MultiLoRA(load_model(base, torch.float32))
    multi_lora.add("gate", adapter)
    with multi_lora.use(["gate"] * 2):
        assert_close(multi_lora.model(TOKENS), expected)


@pytest.mark.parametrize("room", ["checkpoints", "generation", "tasks", "training"])
def test_no_room_asks_which_method_a_layer_is(room):
    methods = {cls.__name__ for cls in (*registry.METHODS, PiSSALinear)}
    for file in (ROOT / "litmini" / room).rglob("*.py"):
        if file.name != "from_python.py":  # which takes a method by name, as a script does
            assert not methods & set(re.findall(r"\w+", file.read_text())), file


def test_optimizer_and_gradient_memory_is_of_what_is_trained_only(tiny_dir):
    model, _ = ours(tiny_dir, {}, None, torch.bfloat16)
    optimizer = make_optimizer(model, OptimConfig())
    model(TOKENS, labels=TOKENS)[0].backward()
    optimizer.step()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    assert (moments, gradients) == (2 * trained, trained)


def test_counts_of_adapters(tiny_dir):
    model, _ = ours(tiny_dir, {"modules_to_save": ["lm_head"]}, DoRALinear)
    assert sum(isinstance(m, LoRALinear) for m in adapters(model).values()) == 6
    assert sum(isinstance(m, ModulesToSaveLayer) for m in adapters(model).values()) == 1


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_that_no_adapter_covers_are_said_with_their_parameters(quantized):
    """Requirement 45."""
    for targets, expected in (
        (["all-linear"], "(down_proj, gate_up_proj), 98,304 parameters"),
        (["q_proj", "down_proj"], "(gate_up_proj), 65,536 parameters"),
        (["gate_up_proj", "down_proj"], ""),
    ):
        model = gpt_oss.Model(gpt_oss.PRESETS["tiny"])
        if quantized:
            quantize_linears(model)
        assert experts_left_out(model) == ""  # it is trained as a whole
        add_adapters(model, LoraConfig(2, 2.0, 0.0, targets))
        said = experts_left_out(model)
        assert (f"no adapter covers the experts {expected}:" in said) if expected else said == ""


@pytest.mark.parametrize(
    "family",
    [gpt_oss, granite_hybrid, mixtral, qwen3_5_moe, qwen3_moe],
    ids=["gpt_oss", "granite_hybrid", "mixtral", "qwen3_5_moe", "qwen3_moe"],
)
def test_adapters_over_experts_between_peft_and_us(family, tokenizer_dir, tmp_path):
    config = family.PRESETS["tiny"]
    base = family.Model(config)
    base.init_weights(torch.Generator().manual_seed(0))
    for part in ("base", "theirs", "ours"):
        (tmp_path / part).mkdir()
    tensors = family.to_hf(((n, p.detach()) for n, p in base.named_parameters()), config)
    save_model(tmp_path / "base", family.config_to_hf(config), tensors, tokenizer_dir)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj"], target_parameters=stacks, task_type="CAUSAL_LM"
    )
    reference = changed(peft.get_peft_model(reference, settings)).eval()
    reference.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "base", torch.float32)
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        expected = reference(TOKENS).logits
        assert_close(model(TOKENS), expected)
        assert (base(TOKENS) - expected).abs().max() > 0.005
    save_adapter(model, tmp_path / "ours", "base")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()(TOKENS).logits
    assert_close(again, expected)
