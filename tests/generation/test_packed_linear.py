import pytest
import torch
from numerics import assert_as_accurate
from torch import nn

from litmini.config.finetune import Ia3Config, LoraConfig
from litmini.config.generate import SamplingConfig
from litmini.generation.batch import Batch
from litmini.generation.generate import finish_all, raise_first
from litmini.generation.packed_linear import PackedLinear, can_pack, pack_linears
from litmini.generation.request import Request
from litmini.methods.adapters import add_adapters
from litmini.methods.base_layer import ModulesToSaveLayer
from litmini.methods.dora import DoRALinear
from litmini.methods.ia3 import add_ia3
from litmini.methods.lora import LoRALinear
from litmini.methods.nf4 import quantize_linears
from litmini.methods.trainable_tokens import add_tokens
from litmini.models import llama

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
    packed = PackedLinear(linear)
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
    pack_linears(model, batched=True)
    assert names and {name for name, module in model.named_modules() if isinstance(module, PackedLinear)} == names
    assert {name for name, _ in model.named_parameters() if "norm" not in name} == {"model.embed_tokens.weight"}
    assert completions(model) == expected


@needs_avx512
def test_linears_under_adapters_and_of_other_dtypes_stay():
    model = nn.Sequential(LoRALinear(nn.Linear(16, 16), rank=2, alpha=4), nn.Linear(16, 16).half(), nn.Linear(16, 16))
    pack_linears(model, batched=True)
    assert [type(m) for m in (model[0].base, model[1], model[2])] == [nn.Linear, nn.Linear, PackedLinear]


@needs_avx512
def test_modules_trained_beside_adapters_stay():
    linear = nn.Linear(16, 24, bias=False).bfloat16()
    layer = ModulesToSaveLayer(linear)
    model, x = nn.Sequential(layer), torch.randn(3, 16).bfloat16()
    expected = model(x)
    pack_linears(model, batched=True)
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
    pack_linears(models[1], batched=True)
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
            pack_linears(model, batched=True)
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
    pack_linears(model, batched=True)
    assert type(model[0]) is nn.Linear


@needs_avx512
def test_a_model_that_decodes_one_token_stays_plain_in_bf16():
    """There torch's own GEMV is as fast."""
    for dtype, expected in ((torch.bfloat16, nn.Linear), (torch.float32, PackedLinear)):
        model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
        pack_linears(model, batched=False)
        assert type(model[0]) is expected
