"""--compile in generation: the same answers, from compiled groups of blocks."""

import shutil

import pytest
import torch
from numerics import assert_close
from test_generate import PROMPTS, generate_batch, random_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.generation import compile as compiled_decoding
from litmini.generation.compile import compile_decoding
from litmini.methods.adapters import add_adapters
from litmini.models import llama
from litmini.ops.kv_cache import KVCache

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def decode(model: llama.Model, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of each token after the first `start`, which are read at once."""
    cache = KVCache(model.config, 1, tokens.shape[1] + start, next(model.parameters()).dtype)
    with torch.inference_mode():  # as generation does
        parts = [model(tokens[:, :start], cache=cache)[:, -1:]]
        parts += [model(part, cache=cache) for part in tokens[:, start:].split(1, 1)]
    return torch.cat(parts, 1).float()


def test_compiled_logits_are_no_less_exact():
    """In bf16, beyond the window too, and for other prompts without another compilation."""
    torch.compiler.reset()
    exact, model = random_model("window"), random_model("window").to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())  # the same numbers, computed with in fp32
    cases = [(torch.randint(0, 64, (1, length)), start) for length, start in ((20, 4), (31, 9))]
    truth = [decode(exact, *case) for case in cases]
    plain = [decode(model, *case) for case in cases]
    compile_decoding(model)
    compiled = [decode(model, *cases[0])]
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled.append(decode(model, *cases[1]))
        (answer,) = generate_batch(model, [PROMPTS[0]], 12, [])
    assert len(answer) == 12
    for true, eager, found in zip(truth, plain, compiled, strict=True):
        assert not torch.equal(found, eager)  # it was compiled
        assert 0 < (found - true).square().mean() < 1.2 * (eager - true).square().mean()


def test_bases_of_adapters_stay_what_their_sums_know():
    """A product that is rounded before the change of its adapter comes on top loses most of it."""
    model = llama.Model(llama.PRESETS["tiny"])
    add_adapters(model, LoraConfig(rank=4, targets=["q_proj", "down_proj"]))
    before = dict(model.named_parameters())
    compile_decoding(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    block = model.model.layers[0]
    kinds = (block.self_attn.q_proj.base, block.mlp.down_proj.base, block.self_attn.k_proj)
    assert [type(module).__name__ for module in kinds] == ["Linear", "Linear", "GEMVLinear"]


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        y = self.linear(x)
        return x + self.scale * (y.sin() if self.scale > 1.5 else y.cos()) + shift


class Tower(nn.Module):
    """Blocks, and what a model may do between them."""

    def __init__(self, scales: list[float], between: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(scale) for scale in scales)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.layers):
            x = block(x, shift=torch.full((), float(i)))
            if self.between:
                x = x * 0.5
        return x


@torch.inference_mode()
def test_blocks_that_differ_have_graphs_of_their_own(monkeypatch):
    """And those that do not share them."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(compiled_decoding, "LARGEST_GROUP", 2)
    tower, inputs = Tower([1.0, 2.0, 1.0, 2.0, 2.0, 1.0]), torch.randn(3, 1, 1, 32)
    expected = [tower(x) for x in inputs]
    compile_decoding(tower)
    tower(inputs[0])  # read as it is written
    for x, y in zip(inputs, expected, strict=True):
        assert_close(tower(x), y)
    assert counters["stats"]["unique_graphs"] == 2


@torch.inference_mode()
@pytest.mark.parametrize(("n_blocks", "between", "size"), [(10, False, 5), (7, False, 1), (8, False, 4), (8, True, 1)])
def test_groups_are_of_blocks_in_a_row(n_blocks, between, size, monkeypatch):
    """Not where a model does something between them; any length may come after any other."""
    ran = []

    def run(forwards, x, others):
        ran.append(len(forwards))
        return compiled_decoding._run(forwards, x, others)

    monkeypatch.setattr(torch, "compile", lambda function, **options: run)
    tower = Tower([1.0] * n_blocks, between)
    inputs = [torch.randn(1, length, 32) for length in (4, 1, 3, 1, 1)]
    expected = [tower(x) for x in inputs]
    compile_decoding(tower)
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(tower(x), y)
    assert ran == [size] * (n_blocks // size) * 3


@torch.inference_mode()
def test_a_forward_that_failed_leaves_nothing_for_the_next(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    tower, x = Tower([1.0] * 4), torch.randn(1, 1, 32)
    expected = tower(x)
    compile_decoding(tower)
    tower(x)
    for place in (1, 2):
        wrapped, tower.layers[place].forward = tower.layers[place].forward, None
        with pytest.raises(TypeError):
            tower(x)
        tower.layers[place].forward = wrapped
        assert torch.equal(tower(x), expected)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("order", "message"),
    [((0, 2, 1, 3), None), ((0, 1, 3), "another order"), ((0, 1, 1, 2, 3), None), ((3, 0, 1, 2), None)],
)
def test_blocks_in_another_order_are_never_a_group(order, message, monkeypatch):
    """From the first forward on: graphs of one block. Later: an error, and no wrong result."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def forward(x: Tensor, order: tuple[int, ...] = order) -> Tensor:
        for i in order:
            x = tower.layers[i](x, shift=torch.zeros(()))
        return x

    tower, x = Tower([1.0, 2.0, 3.0, 4.0]), torch.randn(1, 1, 32)
    expected, usual = forward(x), forward(x, (0, 1, 2, 3))
    compile_decoding(tower)
    if message:
        assert torch.equal(forward(x, (0, 1, 2, 3)), usual)
        with pytest.raises(UserError, match=message):
            forward(x)
    else:
        for _ in range(2):
            assert torch.equal(forward(x), expected)
            assert torch.equal(forward(x, (0, 1, 2, 3)), usual)


@torch.inference_mode()
def test_a_model_that_keeps_what_its_blocks_give_is_told(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    tower, x = Tower([1.0] * 4), torch.randn(1, 1, 32)
    compile_decoding(tower)

    def forward() -> Tensor:
        kept = [x]
        for block in tower.layers:
            kept.append(block(kept[-1], torch.zeros(())))
        return torch.stack(kept).mean(0)

    forward()
    with pytest.raises(UserError, match="leave --compile out"):
        forward()
