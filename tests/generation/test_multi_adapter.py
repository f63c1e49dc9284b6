"""Several adapters over one base: each row as with its adapter alone, swapped and removed without a trace."""

import pytest
import torch
from numerics import assert_close

import litmini
from litmini.checkpoints.hf import load_model
from litmini.checkpoints.peft import save_adapter
from litmini.config.finetune import LoraConfig
from litmini.config.generate import SamplingConfig
from litmini.errors import UserError
from litmini.generation.batch import Batch
from litmini.generation.generate import finish_all
from litmini.generation.multi_adapter import MultiLoRA
from litmini.generation.request import Request
from litmini.methods.adapters import add_adapters
from litmini.methods.dora import DoRALinear
from litmini.methods.lora import LoRALinear
from litmini.ops.cross_entropy import IGNORE

TOKENS = torch.arange(80).reshape(4, 20) * 7 % 512
KINDS = {
    "lora": (LoraConfig(rank=4, targets=["q_proj", "down_proj"]), None),
    "dora": (LoraConfig(rank=2, targets=["all-linear"]), DoRALinear),
    "head": (LoraConfig(rank=2, targets=["v_proj"], modules_to_save=["lm_head"]), None),
}


@pytest.fixture(scope="module")
def saved(tiny_dir, tmp_path_factory):
    directories = {}
    for seed, (name, (config, layer)) in enumerate(KINDS.items()):
        model = load_model(tiny_dir, torch.float32)
        add_adapters(model, config, layer)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        directories[name] = tmp_path_factory.mktemp(name)
        save_adapter(model, directories[name], str(tiny_dir))
    return directories


@torch.no_grad()
def test_each_row_is_as_with_its_adapter_alone(tiny_dir, saved):
    model = load_model(tiny_dir, torch.float32)
    base = model(TOKENS)
    alone = {name: litmini.load(tiny_dir, path, dtype="fp32")[0](TOKENS) for name, path in saved.items()}
    alone[None] = base
    multi_lora = MultiLoRA(model)
    for name, path in saved.items():
        multi_lora.add(name, path)
    assert torch.equal(model(TOKENS), base), "outside of use() it is the base"
    for rows in (["lora", "dora", None, "head"], ["head"] * 4, ["dora", "lora", "dora", "lora"], [None] * 4):
        with multi_lora.use(rows):
            y = model(TOKENS)
        for i, name in enumerate(rows):
            assert_close(y[i], alone[name][i])
    assert torch.equal(model(TOKENS), base)


@torch.no_grad()
def test_in_bf16_a_row_is_rounded_as_with_its_adapter_alone(tiny_dir, saved):
    alone = {name: litmini.load(tiny_dir, saved[name], dtype="bf16")[0](TOKENS) for name in ("lora", "dora")}
    model = load_model(tiny_dir, torch.bfloat16)
    multi_lora = MultiLoRA(model)
    for name in alone:
        multi_lora.add(name, saved[name])
    for name, y in alone.items():
        with multi_lora.use([name] * 4):
            assert torch.equal(model(TOKENS), y)


@torch.no_grad()
def test_swapped_and_removed_without_a_trace(tiny_dir, saved):
    model = load_model(tiny_dir, torch.float32)
    base, modules = model(TOKENS), dict(model.named_modules())
    multi_lora = MultiLoRA(model)
    multi_lora.add("one", saved["lora"])
    multi_lora.add("two", saved["dora"])
    with multi_lora.use(["one"] * 4):
        first = model(TOKENS)
    multi_lora.add("one", saved["head"])  # under the same name
    with multi_lora.use(["one"] * 4):
        second = model(TOKENS)
    assert (first - second).abs().max() > 0.1
    multi_lora.remove("two")
    multi_lora.remove("one")
    assert dict(model.named_modules()) == modules and torch.equal(model(TOKENS), base)
    with pytest.raises(UserError, match=r"no adapter one; there are: none"), multi_lora.use(["one"]):
        pass


def test_rows_without_a_name_are_an_error(tiny_dir, saved):
    """Not the bare base: whoever serves several customers would not notice."""
    multi_lora = MultiLoRA(load_model(tiny_dir, torch.float32))
    multi_lora.add("lora", saved["lora"])
    for rows in (["lora"], ["lora"] * 5):
        with (
            multi_lora.use(rows),
            pytest.raises(UserError, match=rf"{len(rows)} names of adapters for a batch of 4 sequences"),
        ):
            multi_lora.model(TOKENS)


def test_an_adapter_that_does_not_fit_leaves_the_others(tiny_dir, saved, tmp_path):
    model = load_model(tiny_dir, torch.float32)
    multi_lora = MultiLoRA(model)
    multi_lora.add("good", saved["lora"])
    with pytest.raises(UserError, match="no adapter directory"):
        multi_lora.add("good", tmp_path)
    with multi_lora.use(["good"] * 4), torch.no_grad():
        expected = litmini.load(tiny_dir, saved["lora"], dtype="fp32")[0](TOKENS)
        assert_close(model(TOKENS), expected)


@pytest.mark.parametrize(
    "covers", [{"targets": ["lm_head", "q_proj"]}, {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
@pytest.mark.parametrize("layer", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("saved_too", [[], ["embed_tokens"]])
def test_adapters_over_the_head_generate_as_alone(tiny_dir, tmp_path, covers, layer, saved_too):
    """A prompt is read without any logits: then the head gets no sequences."""
    model = load_model(tiny_dir, torch.float32)
    config = LoraConfig(rank=2, **{**covers, "modules_to_save": covers.get("modules_to_save", []) + saved_too})
    add_adapters(model, config, layer)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    save_adapter(model, tmp_path, str(tiny_dir))
    base = load_model(tiny_dir, torch.float32)
    prompts = [[5, 9, 33, 1, 60], [12], [3, 50]]

    def requests(*names: str | None) -> list[Request]:
        return [Request(p, SamplingConfig(max_new_tokens=12), [], None, n) for p, n in zip(prompts, names, strict=True)]

    plain, adapted = requests(None, None, None), requests(None, None, None)
    finish_all(base, plain)
    finish_all(litmini.load(tiny_dir, tmp_path, dtype="fp32")[0], adapted)
    multi_lora = MultiLoRA(base)
    multi_lora.add("head", tmp_path)
    both = requests("head", None, "head")
    batch = Batch(base, multi_lora=multi_lora)
    batch.add(both[:1])
    batch.step()
    batch.add(both[1:])
    while batch.requests:
        batch.step()
    assert [r.ids for r in both] == [adapted[0].ids, plain[1].ids, adapted[2].ids]
    assert all(a.ids != p.ids for a, p in zip(adapted, plain, strict=True))


@torch.no_grad()
def test_labelled_positions_are_not_taken_for_sequences(tiny_dir, saved):
    """Of two labelled positions in one of two sequences, the head would give each to another adapter."""
    multi_lora = MultiLoRA(load_model(tiny_dir, torch.float32))
    multi_lora.add("head", saved["head"])
    labels = torch.full_like(TOKENS[:2], IGNORE)
    labels[0, :2] = 3
    with multi_lora.use(["head", None]), pytest.raises(UserError, match="2 names of adapters"):
        multi_lora.model(TOKENS[:2], labels=labels)
