"""Activation offloading: equal gradients, weights stay, every copy is waited for; with a stand-in of CUDA's streams."""

import weakref

import pytest
import torch
import torch.distributed as dist
from numerics import assert_gradients_close
from torch.distributed.device_mesh import init_device_mesh
from two import run_two, values

from litmini.config.finetune import LoraConfig
from litmini.distributed.fsdp import full_tensor, is_dtensor, shard
from litmini.methods.adapters import add_adapters
from litmini.models import llama, mixtral
from litmini.training.low_memory import checkpoint_activations
from litmini.training.memory import full_rows
from litmini.training.offload import offload_activations


class LateCopies:
    """Runs a copy only when someone waits for it, or for a later one: streams may be late. Until then, its target is NaN."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self.sources: list[torch.Tensor] = []
        self.weights = 0  # copies of the model's weights, as they are when they are copied
        self._model = model
        self._late: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._done = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> int:
        target.fill_(255)  # NaN in every floating dtype
        self.sources.append(source)
        if self._model is not None:
            self.weights += any(same(source, weight.detach()) for weight in self._model.parameters())
        self._late.append((target, source))
        return len(self._late)

    def wait(self, event: int) -> None:
        for target, source in self._late[self._done : event]:
            target.copy_(source)
        self._done = max(self._done, event)


def same(raw: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether bytes are a weight's, as it is or in bf16, or transposed."""
    forms = [w for t in (weight, weight.mT if weight.dim() > 1 else weight) for w in (t, t.bfloat16())]
    return not is_dtensor(weight) and any(torch.equal(raw, w.contiguous().view(-1).view(torch.uint8)) for w in forms)


def build(kind: str) -> torch.nn.Module:
    family = mixtral if "mixtral" in kind else llama
    config = family.PRESETS["tiny"]
    model = family.Model(type(config)(**{**vars(config), "n_layers": 4}))
    model.init_weights(torch.Generator().manual_seed(0))
    if "lora" in kind:
        torch.manual_seed(0)
        add_adapters(model, LoraConfig(rank=4, dropout=0.5, targets=["q_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    if "recomputed" in kind:
        checkpoint_activations(model)
    return model.train()


def gradients(model: torch.nn.Module, autocast: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = model(**full_rows(2, 16, 512))
    loss.backward()
    found = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class Block(torch.nn.Module):
    """Returns w x + factor w x, where the second x is the first one, changed in place by `factor`."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.weight = factor, torch.nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.0
        y = x * self.weight
        if self.factor == 1:
            return y + x * self.weight
        with torch.no_grad():
            x.mul_(self.factor)
        return y + x * self.weight


def test_what_changes_in_place_is_kept_as_it_was_each_time():
    model, x = torch.nn.ModuleList([Block(10.0), Block(1.0)]), torch.tensor([1.0, 4.0])  # the last block keeps its own
    offload_activations(model, 0, (Now(), Now()))
    model[1](model[0](x)).sum().backward()
    assert torch.equal(model[0].weight.grad, 11 * x * 2 * model[1].weight.detach())


class Now:
    """Copies at once."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def wait(self, event: None) -> None: ...


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "full recomputed", "lora recomputed", "mixtral"])
def test_gradients_are_equal_and_weights_stay(kind, autocast):
    expected = gradients(build(kind), autocast)
    model, back = build(kind), LateCopies()
    out = LateCopies(model)
    offload_activations(model, 0, (out, back))
    for _ in range(3):
        found = gradients(model, autocast)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not out.weights
    assert len(out.sources) == len(back.sources) >= 3 * 3  # three blocks of four, the last stays
    if "recomputed" in kind:  # a block keeps its input only
        assert len(out.sources) == 3 * 3


def test_no_buffer_outlives_its_step():
    """Sequences that are not packed have other sizes in each step: their buffers would fill the host's memory."""
    buffers = []

    class Seen(Now):
        def copy(self, target, source):
            buffers.append(weakref.ref(target.untyped_storage()))
            super().copy(target, source)

    model = build("full")
    offload_activations(model, 0, (Seen(), Now()))
    for length in (8, 16, 24):
        loss, _ = model(**full_rows(2, length, 512))
        loss.backward()
        assert len(buffers) > 9 and not [storage for storage in buffers if storage() is not None]


def test_an_input_of_several_matmuls_is_moved_once():
    model, out = build("full"), LateCopies()
    offload_activations(model, 0, (out, LateCopies()))
    gradients(model, False)
    assert len({(s.untyped_storage().data_ptr(), s._version) for s in out.sources}) == len(out.sources)


def test_small_tensors_stay_and_evaluation_moves_nothing():
    model, out = build("full"), LateCopies()
    offload_activations(model, 1 << 20, (out, LateCopies()))
    gradients(model, False)
    assert not out.sources
    model = build("full")
    offload_activations(model, 0, (out, LateCopies()))
    model.eval()(full_rows(2, 16, 512)["tokens"])
    with torch.no_grad():
        model.train()(**full_rows(2, 16, 512))
    assert not out.sources


def test_a_blocks_activations_are_let_go_of_when_the_next_has_run():
    model, out = build("full"), LateCopies()
    offload_activations(model, 0, (out, LateCopies()))
    loss, _ = model(**full_rows(2, 16, 512))
    gone = [weakref.ref(source.untyped_storage()) for source in out.sources]
    out.sources.clear()
    out._late.clear()
    assert len(gone) > 9 and not [storage for storage in gone if storage() is not None]
    assert loss.requires_grad


def offloaded_and_sharded(mixed: bool) -> int:
    """Compare gradients of a sharded model with and without offloading; return the number of copies."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    expected = gradients(shard(build("full"), mesh, mixed), mixed)
    model = shard(build("full"), mesh, mixed)
    out = LateCopies(model)
    offload_activations(model, 0, (out, LateCopies()))
    assert_gradients_close(gradients(model, mixed), expected)
    assert not out.weights
    dist.destroy_process_group()
    return len(out.sources)


@pytest.mark.xdist_group("two")
@pytest.mark.parametrize("mixed", [False, True])
def test_gathered_weights_stay(mixed):
    assert all(copies > 9 for copies in values(run_two(offloaded_and_sharded, mixed)))
