import copy
import importlib
import sys
import weakref
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate, assert_close
from torch import nn

from litmini.config.finetune import Ia3Config, LoraConfig
from litmini.config.generate import SamplingConfig
from litmini.generation.batch import Batch
from litmini.generation.generate import finish_all, raise_first
from litmini.generation.packed_linear import PackedLinear, Product, can_pack, pack_linears
from litmini.generation.request import Request
from litmini.methods.adapters import add_adapters
from litmini.methods.base_layer import ModulesToSaveLayer
from litmini.methods.dora import DoRALinear
from litmini.methods.ia3 import add_ia3
from litmini.methods.lora import LoRALinear
from litmini.methods.nf4 import quantize_linears
from litmini.methods.trainable_tokens import add_tokens
from litmini.models import FAMILIES, llama

needs_avx512 = pytest.mark.skipif(not can_pack(nn.Linear(8, 8)), reason="weights are packed for AVX512 only")


def completions(model: nn.Module) -> list[list[int]]:
    requests = [Request(list(range(3, n)), SamplingConfig(max_new_tokens=12, ignore_eos=True), []) for n in (9, 5)]
    finish_all(model, requests)
    return [request.ids for request in requests]


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_linear(dtype, bias):
    linear = nn.Linear(96, 80, bias=bias).to(dtype)
    packed = PackedLinear(Product([linear]), 0, linear)
    exact = linear.double()(x := torch.randn(3, 40, 96).to(dtype).double())
    linear, x = linear.to(dtype), x.to(dtype)
    with torch.inference_mode():
        assert_as_accurate(packed(x), linear(x), exact)
        assert_as_accurate(packed(x[:1, :1]), linear(x[:1, :1]), exact[:1, :1])
        assert packed(x[:, :0]).shape == (3, 0, 80) and packed(x[:, :0]).dtype == dtype


@needs_avx512
def test_a_packed_model_generates_the_same_and_holds_each_weight_once():
    model = llama.Model(llama.PRESETS["tiny"]).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    expected = completions(model)
    names = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    pack_linears(model)
    assert names and {name for name, module in model.named_modules() if isinstance(module, PackedLinear)} == names
    assert {name for name, _ in model.named_parameters() if "norm" not in name} == {"model.embed_tokens.weight"}
    assert completions(model) == expected


@needs_avx512
def test_linears_under_adapters_and_of_other_dtypes_stay():
    model = nn.Sequential(LoRALinear(nn.Linear(16, 16), rank=2, alpha=4), nn.Linear(16, 16).half(), nn.Linear(16, 16))
    pack_linears(model)
    assert [type(m) for m in (model[0].base, model[1], model[2])] == [nn.Linear, nn.Linear, PackedLinear]


@needs_avx512
def test_modules_trained_beside_adapters_stay():
    linear = nn.Linear(16, 24, bias=False).bfloat16()
    layer = ModulesToSaveLayer(linear)
    model, x = nn.Sequential(layer), torch.randn(3, 16).bfloat16()
    expected = model(x)
    pack_linears(model)
    assert type(layer.full) is nn.Linear and torch.equal(model(x), expected)


class OwnHead(llama.Model):
    """A researcher's model that multiplies by the head's weight itself, and has a second linear beside it."""

    def __init__(self, config: llama.Config) -> None:
        super().__init__(config)
        self.value_head = nn.Linear(config.dim, 1)

    def forward(self, tokens, positions=None, documents=None, cache=None, labels=None):
        hidden = []
        hook = self.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        super().forward(tokens, positions, documents, cache)
        hook.remove()
        return nn.functional.linear(hidden[0], self.lm_head.weight)


@needs_avx512
def test_a_model_may_read_the_weight_of_a_packed_linear():
    models = [kind(llama.PRESETS["tiny"]).eval() for kind in (llama.Model, OwnHead)]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(0))
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    expected = completions(models[0])
    assert completions(models[1]) == expected
    weight = models[1].lm_head.weight.detach().clone()
    pack_linears(models[1])
    assert type(models[1].lm_head) is PackedLinear and torch.equal(models[1].lm_head.weight, weight)
    assert completions(models[1]) == expected


def by_hand(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: every forward reads everything, and the head all positions."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


ADAPTED = {
    "lora over the head": lambda model: add_adapters(model, LoraConfig(rank=2, targets=["q_proj", "lm_head"])),
    "dora": lambda model: add_adapters(model, LoraConfig(rank=2), DoRALinear),
    "ia3": lambda model: add_ia3(model, Ia3Config()),
    "head in full": lambda model: add_adapters(
        model, LoraConfig(rank=2, targets=["v_proj"], modules_to_save=["lm_head"])
    ),
    "tokens": lambda model: add_tokens(model, [5, 9], 512),
    "4 bits": lambda model: [
        quantize_linears(model),
        add_adapters(model, LoraConfig(rank=2, modules_to_save=["lm_head"])),
    ],
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_over_linears_and_heads_keep_their_effect(name):
    """Not merged: prompts in parts, of which the head reads the last token, packed or not, as in a plain forward."""
    model = llama.Model(llama.PRESETS["tiny"]).eval()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    prompts = [list(range(3, 12)), list(range(3, 7)), [8]]
    plain = [by_hand(model, prompt, 6) for prompt in prompts]
    ADAPTED[name](model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    model.eval()
    expected = [by_hand(model, prompt, 6) for prompt in prompts]
    assert expected != plain
    for pack in (False, True):
        if pack:
            pack_linears(model)
        batch = Batch(model, chunk=3)
        requests = [
            Request(p, SamplingConfig(max_new_tokens=n, ignore_eos=True), [])
            for p, n in zip(prompts, (6, 1, 6), strict=True)
        ]
        batch.add(requests)
        while batch.requests:
            batch.step()
        raise_first(requests)
        assert [request.ids for request in requests] == [expected[0], expected[1][:1], expected[2]]


def test_other_processors_keep_plain_linears(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = nn.Sequential(nn.Linear(16, 16))
    pack_linears(model)
    assert type(model[0]) is nn.Linear


class Siblings(nn.Module):
    """Linears of one input, of different sizes, some with a bias; `inputs` are what each is called with."""

    def __init__(self, inputs: str) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(48, 64), nn.Linear(48, 16), nn.Linear(48, 16, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(48, 32, bias=False) for _ in range(2))
        self.inputs = inputs

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        other = x.flip(-1) if self.inputs == "two" else x
        q, k, v = self.q_proj(x), self.k_proj(other), self.v_proj(x)
        if self.inputs == "again":
            q, k = self.q_proj(x), self.k_proj(x)
        gate = self.gate_proj(x)
        return [q, k, v, gate] if self.inputs == "one of two" else [q, k, v, gate, self.up_proj(x)]


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("inputs", ["one", "two", "again", "one of two"])
def test_linears_of_one_input_are_one_product(dtype, inputs):
    """Where a model of a user's own gives them others, or leaves one out, each has its own output, too."""
    torch.manual_seed(0)
    model = Siblings(inputs).to(dtype)
    plain = copy.deepcopy(model)
    pack_linears(model)
    assert model.q_proj.product is model.k_proj.product is model.v_proj.product
    assert model.gate_proj.product is model.up_proj.product is not model.q_proj.product
    assert torch.equal(model.v_proj.weight, plain.v_proj.weight)
    with torch.inference_mode():
        for x in torch.randn(3, 2, 5, 48).to(dtype):
            exact = copy.deepcopy(plain).double()(x.double())
            for found, expected, true in zip(model(x), plain(x), exact, strict=True):
                assert_as_accurate(found, expected, true)


@needs_avx512
@pytest.mark.parametrize("family", sorted(set(FAMILIES.values())), ids=lambda name: name.rpartition(".")[2])
def test_a_familys_products_have_one_input_each_and_nothing_stays_of_them(family, monkeypatch):
    module = importlib.import_module(family)
    model, tokens = module.Model(module.PRESETS["tiny"]).eval(), torch.arange(12).view(2, 6)
    model.init_weights(torch.Generator().manual_seed(0))
    expected = model(tokens)
    pack_linears(model)
    products = {linear.product for linear in model.modules() if isinstance(linear, PackedLinear)}
    inputs, take = [], Product.take

    def counted(product: Product, i: int, x: torch.Tensor) -> torch.Tensor:
        inputs.append(product) if product._kept[0] is not x else None
        return take(product, i, x)

    monkeypatch.setattr(Product, "take", counted)
    with torch.inference_mode():
        assert_close(model(tokens), expected)
    assert len(inputs) == len(products) and set(inputs) == products
    assert all(product._kept == (None, {}) for product in products)
    if module is llama:  # q, k and v; o; gate and up; down; and the head
        assert len(products) == 4 * model.config.n_layers + 1


@needs_avx512
def test_linears_with_an_adapter_beside_them_are_in_no_product():
    model = llama.Model(llama.PRESETS["tiny"])
    add_adapters(model, LoraConfig(rank=2, targets=["k_proj", "up_proj"]))
    pack_linears(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.q_proj.product is attention.v_proj.product and type(attention.k_proj.base) is nn.Linear
    assert mlp.gate_proj.product.sizes == [model.config.ffn_dim]


@needs_avx512
def test_a_linear_in_two_places_is_packed_once():
    model, linear = nn.ModuleDict({"a": nn.Module(), "b": nn.Module()}), nn.Linear(16, 16)
    model["a"].q_proj = model["b"].q_proj = linear
    model["b"].k_proj = nn.Linear(16, 16)
    pack_linears(model)
    assert model["a"].q_proj is model["b"].q_proj and type(model["b"].k_proj) is PackedLinear


@needs_avx512
def test_linears_of_other_sizes_and_dtypes_are_in_another_product():
    """As where a user's own model reads keys and values elsewhere."""
    model = nn.Module()
    model.q_proj, model.k_proj, model.v_proj = nn.Linear(16, 8), nn.Linear(24, 8), nn.Linear(24, 8).bfloat16()
    plain, inputs = copy.deepcopy(model), [torch.randn(2, 16), torch.randn(2, 24), torch.randn(2, 24).bfloat16()]
    pack_linears(model)
    for found, expected, x in zip(model.children(), plain.children(), inputs, strict=True):
        assert type(found) is PackedLinear
        assert_close(found(x), expected(x))


@needs_avx512
def test_what_is_packed_is_let_go_of_before_the_next_product(monkeypatch):
    model, make = llama.Model(llama.PRESETS["tiny"]), Product.__init__
    plain = weakref.WeakSet(module for module in model.modules() if type(module) is nn.Linear)
    waiting = len(plain)

    def counted(product: Product, linears: list[nn.Linear]) -> None:
        nonlocal waiting
        assert len(plain) == waiting
        waiting -= len(linears)
        make(product, linears)

    monkeypatch.setattr(Product, "__init__", counted)
    pack_linears(model)
    assert len(plain) == waiting == 0


@needs_avx512
@pytest.mark.parametrize("by", ["another thread", "Ctrl-C"])
def test_products_may_be_interrupted_at_any_line(by):
    """By a thread with another input, or for good: the next call may have the same input."""
    model, x = Siblings("one"), torch.randn(1, 48)
    pack_linears(model)
    expected, others = model(x), model(2 * x)
    lines = []

    def run(at: int) -> list[torch.Tensor]:
        """Return model(x), interrupted before the line number `at` of all that run in products."""
        lines.clear()

        def trace(frame: Any, what: str, _: Any) -> Any:
            if what == "line":
                lines.append(frame.f_lineno)
                if len(lines) == at and by == "Ctrl-C":
                    raise KeyboardInterrupt
                if len(lines) == at:
                    assert all(map(torch.equal, model(2 * x), others))
            return trace if frame.f_code is Product.take.__code__ else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return model(x)
        except KeyboardInterrupt:
            return run(0)
        finally:
            sys.settrace(before)

    run(0)
    for at in range(1, 1 + len(lines)):
        assert all(map(torch.equal, run(at), expected))
