"""LoRA against PEFT, both ways, and every way in which an adapter can fail to fit."""

import copy
import json

import peft
import pytest
import torch
import transformers
from numerics import assert_as_accurate, assert_close, in_fp64
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import litmini
from litmini.checkpoints.hf import load_model, save_model
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.methods.adapters import add_adapters, keep_casts, linears, merge_adapters, restore_adapters
from litmini.methods.dora import DoRALinear
from litmini.methods.lora import LoRALinear
from litmini.models import gpt2

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 512


def tiny(tiny_dir):
    return load_model(tiny_dir, torch.float32)


def randomised(model):
    """Give every adapter weights, B too."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_A.data.normal_(std=0.2, generator=generator)
            module.lora_B.data.normal_(std=0.2, generator=generator)
    return model


def peft_model(tiny_dir, **settings):
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(base, config)


def test_starts_as_the_base_exactly(tiny_dir):
    model = tiny(tiny_dir)
    expected = model(TOKENS)
    add_adapters(model, LoraConfig(rank=4, dropout=0.5))
    assert torch.equal(model.eval()(TOKENS), expected)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "orthogonal"}])
def test_peft_over_transposed_layers(tmp_path, tokenizer_dir, settings):
    """GPT-2's in transformers: `fan_in_fan_out` says how the base is stored there, and nothing of the adapter."""
    model = gpt2.Model(gpt2.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    tensors = gpt2.to_hf(((n, p.detach()) for n, p in model.named_parameters()), model.config)
    save_model(tmp_path, gpt2.config_to_hf(model.config), tensors, tokenizer_dir)
    theirs = peft_model(tmp_path, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **settings)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    theirs.eval().save_pretrained(tmp_path / "adapter")
    ours, _ = litmini.load(tmp_path, tmp_path / "adapter", dtype="fp32")
    assert_close(ours(TOKENS), theirs(TOKENS).logits)


def test_our_adapter_in_peft(tiny_dir, tmp_path):
    model = tiny(tiny_dir)
    base = model(TOKENS)
    config = LoraConfig(rank=4, alpha=12, targets=["q_proj", "down_proj"])
    add_adapters(model, config)
    randomised(model)
    save_adapter(model, tmp_path, base=str(tiny_dir))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path).eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    assert_close(model(TOKENS), expected)
    assert (expected - base).abs().max() > 0.1, "the adapter must matter for this test to mean anything"


def test_their_adapter_here_with_equal_gradients(tiny_dir, tmp_path):
    theirs = peft_model(tiny_dir, target_modules=["k_proj", "gate_proj"])
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    model = tiny(tiny_dir)
    load_adapter(model, tmp_path)
    assert_close(model(TOKENS), theirs(TOKENS).logits)
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    for module in adapters.values():
        module.lora_A.requires_grad_(True)
        module.lora_B.requires_grad_(True)
    model(TOKENS).square().mean().backward()
    theirs(TOKENS).logits.square().mean().backward()
    for name, module in adapters.items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        assert_close(module.lora_A.grad, other.lora_A.default.weight.grad)
        assert_close(module.lora_B.grad, other.lora_B.default.weight.grad)


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"], ["lm_head"]])
def test_trains_as_many_parameters_as_peft(tiny_dir, targets):
    model = tiny(tiny_dir)
    add_adapters(model, LoraConfig(rank=4, targets=targets))
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    target_modules = "all-linear" if targets == ["all-linear"] else targets
    theirs = peft_model(tiny_dir, target_modules=target_modules)
    assert ours == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_only_adapters_are_trained_and_they_are_in_fp32(tiny_dir):
    model = load_model(tiny_dir, torch.bfloat16)
    add_adapters(model, LoraConfig(rank=4))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_small_updates_are_not_lost(tiny_dir):
    """Requirement 17: an update far below bf16's resolution adds up, since adapters are in fp32."""
    model = load_model(tiny_dir, torch.bfloat16)
    add_adapters(model, LoraConfig(rank=4, targets=["q_proj"]))
    weight = next(p for p in model.parameters() if p.requires_grad)
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=1e-5)
    for _ in range(10):
        weight.grad = weight.detach().abs()
        optimizer.step()
    moved = (before - weight.detach())[before.abs() > 1e-3] / before[before.abs() > 1e-3].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=0.05, atol=0)


def test_dropout_is_on_the_adapter_only_and_only_in_training():
    base = nn.Linear(8, 8)
    layer = LoRALinear(base, 2, 4, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(64, 8)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer.train()(x), base(x))


def test_merged_equals_unmerged(tiny_dir):
    model = tiny(tiny_dir)
    add_adapters(model, LoraConfig(rank=4, targets=["all-linear", "lm_head"]))
    expected = randomised(model)(TOKENS)
    exact = in_fp64(model, TOKENS)
    replaced = merge_adapters(model)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert_as_accurate(model(TOKENS), expected, exact)
    restore_adapters(model, replaced)
    assert torch.equal(model(TOKENS), expected)


def test_merge_rounds_once():
    base = nn.Linear(16, 16, bias=True).to(torch.bfloat16)
    layer = LoRALinear(base, 4, 8)
    nn.init.normal_(layer.lora_B)
    exact = base.weight.float() + layer.scale * layer.lora_B @ layer.lora_A
    merged = layer.merge()
    spacing = 2.0 ** (torch.frexp(exact).exponent - 8)
    assert ((merged.weight.float() - exact).abs() < spacing).all(), "up or down by chance"
    assert torch.equal(merged.bias, base.bias)


def test_unknown_target_lists_what_is_there(tiny_dir):
    with pytest.raises(UserError, match=r"query.*there are:.*down_proj.*q_proj.*all-linear"):
        add_adapters(tiny(tiny_dir), LoraConfig(targets=["q_proj", "query"]))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": 10_000}, {"dropout": 1.0}, {"targets": []}])
def test_impossible_settings(tiny_dir, settings):
    with pytest.raises(UserError, match="lora\\."):
        add_adapters(tiny(tiny_dir), LoraConfig(**settings))


def test_head_is_no_inner_linear(tiny_dir):
    names = add_adapters(tiny(tiny_dir), LoraConfig(rank=2))
    assert "lm_head" not in names
    assert len(names) == len(linears(tiny(tiny_dir))) - 1


@pytest.fixture
def saved(tiny_dir, tmp_path):
    """An adapter directory with weights that matter."""
    model = tiny(tiny_dir)
    config = LoraConfig(rank=4, alpha=8, targets=["q_proj"])
    add_adapters(model, config)
    save_adapter(randomised(model), tmp_path, base="tiny")
    return tmp_path


def edit(directory, change):
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_load_through_the_front_door(tiny_dir, saved):
    model, _ = litmini.load(tiny_dir, saved, dtype="fp32")
    assert any(m.lora_B.any() for m in model.modules() if isinstance(m, LoRALinear))
    assert not any(p.requires_grad for p in model.parameters())


def test_renamed_keys_are_not_zeros(tiny_dir, saved):
    """Requirement 20: keys that fit nothing are an error, never an adapter that does nothing."""
    edit(saved, lambda t: t.update({k.replace("self_attn", "attn"): t.pop(k) for k in list(t)}))
    with pytest.raises(UserError, match="another base") as error:
        load_adapter(tiny(tiny_dir), saved)
    assert "layers.0.attn.q_proj" in str(error.value)
    assert "layers.1.attn.q_proj" in str(error.value)


def test_other_shapes_are_listed_with_both(tiny_dir, saved):
    edit(saved, lambda t: t.update({k: torch.ones(4, 9) for k in t if "lora_A" in k}))
    with pytest.raises(UserError, match=r"\(4, 9\).*\(4, 64\)"):
        load_adapter(tiny(tiny_dir), saved)


@pytest.mark.parametrize("key", ["base_model.model.x.lora_magnitude_vector", "something.else"])
def test_unexpected_tensors(tiny_dir, saved, key):
    edit(saved, lambda t: t.update({key: torch.ones(1)}))
    with pytest.raises(UserError, match="unexpected tensors"):
        load_adapter(tiny(tiny_dir), saved)


def test_half_a_pair(tiny_dir, saved):
    edit(saved, lambda t: t.pop(next(k for k in t if "lora_B" in k)))
    with pytest.raises(UserError, match="lora_A or lora_B is missing"):
        load_adapter(tiny(tiny_dir), saved)


def test_modules_without_tensors_are_listed_with_all_other_mismatches(tiny_dir, saved):
    """Strict in both directions: half an adapter is no adapter of this base."""

    def change(tensors):
        del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
        del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        tensors[name] = tensors[name][:3].clone()

    edit(saved, change)
    with pytest.raises(UserError, match="another base") as error:
        load_adapter(tiny(tiny_dir), saved)
    assert "layers.0.self_attn.q_proj: the adapter has no tensors for it" in str(error.value)
    assert "layers.1.self_attn.q_proj.lora_A: adapter has (3, 64), the model wants (4, 64)" in str(error.value)
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_to_transform": [1]}))
    with pytest.raises(UserError) as error:
        load_adapter(tiny(tiny_dir), saved)
    assert "no tensors for it" not in str(error.value), "PEFT was told to leave it out"


def test_a_module_in_full_lacks_a_parameter(tiny_dir, tmp_path):
    model = tiny(tiny_dir)
    model.lm_head.bias = nn.Parameter(torch.zeros(512))
    add_adapters(model, LoraConfig(rank=4, targets=["q_proj"], modules_to_save=["lm_head"]))
    save_adapter(randomised(model), tmp_path, base="tiny")
    edit(tmp_path, lambda t: t.pop("base_model.model.lm_head.bias"))
    again = tiny(tiny_dir)
    again.lm_head.bias = nn.Parameter(torch.zeros(512))
    with pytest.raises(UserError, match=r"lm_head.bias: adapter has None, the model wants \(512,\)"):
        load_adapter(again, tmp_path)


def test_an_adapter_that_does_nothing(tiny_dir, saved):
    edit(saved, lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items() if "lora_B" in k}))
    with pytest.raises(UserError, match="does nothing"):
        load_adapter(tiny(tiny_dir), saved)


@pytest.mark.parametrize(
    "setting", [{"bias": "all"}, {"lora_bias": True}, {"use_qalora": True}, {"layer_replication": [[0, 1]]}]
)
def test_features_that_are_not_here_are_refused(tiny_dir, saved, setting):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "olora", "r": 0, **setting}))
    with pytest.raises(UserError, match=next(iter(setting))) as error:
        load_adapter(tiny(tiny_dir), saved)
    assert "convert it with PEFT first" in str(error.value) and "no number above 0" in str(error.value), "all at once"


def test_unknown_methods_are_refused(tiny_dir, saved):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "VERA"}))
    with pytest.raises(UserError, match="adapter_config.json: peft_type = 'VERA' is not implemented; there are: LoRA"):
        load_adapter(tiny(tiny_dir), saved)


def test_no_adapter_directory(tiny_dir):
    with pytest.raises(UserError, match="no adapter_config.json"):
        load_adapter(tiny(tiny_dir), tiny_dir)


class Casts(TorchDispatchMode):
    """Counts conversions of fp32 tensors of a shape into 16 bits."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_to_copy" in str(function) and args[0].dtype == torch.float32 and tuple(args[0].shape) in self.shapes:
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layer", [LoRALinear, DoRALinear])
def test_factors_are_cast_once_for_each_step(layer, fused):
    """Of micro-batches and recomputed blocks the first casts them; gradients stay the same to the bit.

    A fused optimizer changes parameters without another version of theirs.
    """
    torch.manual_seed(0)
    adapted = layer(nn.Linear(24, 40).bfloat16().requires_grad_(False), 3, 6.0)
    nn.init.normal_(adapted.lora_B)
    other = copy.deepcopy(adapted)
    optimizers = {
        part: torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], 1e-3, fused=fused)
        for part in (adapted, other)
    }
    keep_casts(nn.ModuleList([adapted]), optimizers[adapted])
    batches = torch.randn(4, 8, 24).bfloat16()

    def step(layer: nn.Module) -> list[torch.Tensor]:
        for x in batches:
            layer(x).float().square().sum().backward()
        gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        optimizers[layer].step()
        layer.zero_grad()
        return gradients

    for _ in range(3):
        with Casts((3, 24), (40, 3)) as once:
            found = step(adapted)
        with Casts((3, 24), (40, 3)) as each:
            expected = step(other)
        assert each.count - once.count == 4 * 2 * 2 - 2  # A and B, in the forward and backward pass of 4 micro-batches
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    with torch.inference_mode():
        assert torch.equal(adapted(batches[0]), other(batches[0]))
    assert all(map(torch.equal, adapted.parameters(), other.parameters()))
