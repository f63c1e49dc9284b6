"""Batches on their way to the device: made ahead by a thread, with bounds and positions that the host computes."""

import threading

import pytest
import torch
import varlen_kernel
from lightning_fabric import Fabric
from numerics import assert_close
from training_parts import make_setup

from litmini.config.training import OptimConfig
from litmini.models import llama
from litmini.ops import varlen
from litmini.ops.attention import Documents
from litmini.ops.cross_entropy import IGNORE, Targets
from litmini.tasks.setup import attention_kernels
from litmini.training.loop import evaluate, fit
from litmini.training.objective import LanguageModeling
from litmini.training.optimizer import make_optimizer
from litmini.training.setup import Feed, on_device

CPU = torch.device("cpu")


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 500, (2, 16), generator=generator)
    labels = torch.where(torch.rand(2, 16, generator=generator) < 0.5, IGNORE, tokens)
    documents = torch.tensor([[1] * 5 + [2] * 11, [1] * 12 + [0] * 4])
    positions = torch.tensor([[*range(5), *range(11)], [*range(12), *range(4)]])
    return {"tokens": tokens, "positions": positions, "documents": documents, "labels": labels}


class Batches:
    """Micro-batches of 4 steps, and who asked for which."""

    total_steps = 4

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def batches(self, step: int, rank: int, world: int) -> list[dict[str, torch.Tensor]]:
        self.asked.append((step, threading.current_thread().name))
        if step == 3 and rank == 9:
            raise ValueError("damaged shard")
        return [batch(10 * step + rank), batch(10 * step + rank + world)]


def test_what_a_thread_makes_ahead_is_what_the_step_would_get():
    data = Batches()
    feed = Feed(data, CPU, 1, 2, prefetch=True)
    for step in (1, 2, 3):  # resumed after the first step
        for (host, _), expected in zip(feed.take(step), Batches().batches(step, 1, 2), strict=True):
            assert all(torch.equal(host[name], expected[name]) for name in expected)
    assert [step for step, _ in data.asked] == [1, 2, 3]  # each once, and none after the last
    again = Feed(Batches(), CPU, 1, 2, prefetch=True)
    again.take(0)
    assert torch.equal(again.take(2)[0][0]["tokens"], Batches().batches(2, 1, 2)[0]["tokens"])  # not the one made ahead
    assert all(name.startswith("batches") for _, name in data.asked)


def test_an_error_of_the_thread_is_raised_at_its_step():
    feed = Feed(Batches(), CPU, 9, 2, prefetch=True)
    feed.take(2)
    with pytest.raises(ValueError, match="damaged shard"):
        feed.take(3)


def test_on_a_cpu_batches_stay_as_they_are():
    data = batch(0)
    assert on_device(data, CPU) is data
    feed = Feed(Batches(), CPU, 0, 1)
    assert all(host is ready for host, ready in feed.take(0))


def test_bounds_and_positions_come_from_the_host():
    ready = on_device(batch(0), CPU, "varlen")
    documents, targets = ready["documents"], ready["labels"]
    assert isinstance(documents, Documents) and isinstance(targets, Targets)
    assert documents.bounds.dtype == torch.int32 and documents.bounds[:5].tolist() == [0, 5, 16, 28, 32]
    assert len(documents.bounds) == 64 and (documents.bounds[4:] == 32).all() and documents.longest == 16
    assert targets.index.tolist() == (batch(0)["labels"] != IGNORE).flatten().nonzero().flatten().tolist()
    alone = on_device({"tokens": batch(0)["tokens"]}, CPU, "varlen")["documents"]  # pretraining: whole sequences
    assert alone.bounds[:3].tolist() == [0, 16, 32] and alone.longest == 16
    assert (alone.ids == 1).all()  # no padding


def losses(kernel: str | None) -> tuple[list[float], float]:
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, make_optimizer(model, OptimConfig(name="sgd")))
    setup = make_setup(fabric, wrapped, optimizer, [[batch(0), batch(1)]] * 3, 0.5)
    setup.attention = kernel
    fit(setup, LanguageModeling())
    validation = evaluate(fabric, wrapped, LanguageModeling(), [batch(2)], kernel)
    return [row["loss"] for row in setup.recorder.rows], validation


def test_training_and_validation_through_varlen_equal_the_cpu_path(monkeypatch):
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    varlen_kernel.calls.clear()
    found, validation = losses("varlen")
    assert len(varlen_kernel.calls) == 2 * (2 * 3 + 1)  # layers x (micro-batches x steps + validation)
    expected, expected_validation = losses(None)
    assert_close(torch.tensor(found), torch.tensor(expected))
    assert_close(torch.tensor(validation), torch.tensor(expected_validation))


READS = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


def test_a_step_waits_for_the_device_once(monkeypatch):
    """What is on the device is read in one place: loss, gradient norm and the losses of micro-batches, after the step."""
    import litmini.training.loop as loop

    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    model = llama.Model(llama.PRESETS["tiny"])
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, make_optimizer(model, OptimConfig(name="sgd")))
    setup = make_setup(fabric, wrapped, optimizer, [[batch(0), batch(1)]], 0.5)
    ready = [on_device(batch(i), CPU, "varlen") for i in (0, 1)]
    reads: list[str] = []
    for name in READS:
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, n=name, p=plain, **how: reads.append(n) or p(self, *args, **how)
        )
    monkeypatch.setattr(varlen_kernel, "_check", lambda *args: None)  # the stand-in reads the bounds
    monkeypatch.setattr(varlen_kernel, "_documents", lambda bounds: [slice(0, 16), slice(16, 32)])
    loop._take_step(setup, LanguageModeling(), ready, 32, None)
    assert reads == ["tolist"]


def test_finding_the_kernel_leaves_the_random_state_and_other_gpus_alone(monkeypatch):
    """torch.random.fork_rng would initialize every GPU of the machine."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"initialized {device}"))
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights()
    before = torch.get_rng_state()
    assert attention_kernels(model, CPU, "sdpa") == "sdpa"
    assert torch.equal(torch.get_rng_state(), before)
