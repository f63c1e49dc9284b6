"""Training on a GPU: methods, host syncs, compilation, precisions, optimizers, sharding and resuming."""

import copy
from typing import Any

import pytest
import torch
from gpu_parts import (
    ON,
    REPEATED,
    assert_gradients,
    batch,
    counted_syncs,
    device_of_tests,
    loss_and_gradients,
    needs,
    needs_gpu,
    no_sync,
    ready,
    tiny,
)
from numerics import difference

from litmini.config.finetune import LoraConfig
from litmini.config.training import OptimConfig
from litmini.methods.adapters import add_adapters
from litmini.methods.dora import DoRALinear

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    return device_of_tests()


def adapted(method: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Return a model with adapters that change something, the same in each dtype and on each device."""
    model = tiny("llama", dtype if method != "qlora" else torch.bfloat16)
    if method == "qlora":
        from litmini.methods.nf4 import convert, quantize_linears

        quantize_linears(model)
        convert(model, dtype)
    add_adapters(model, LoraConfig(rank=4), DoRALinear if method == "dora" else None)
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad and p.ndim > 1):
        parameter.data.normal_(std=0.1, generator=generator)
    return model.to(device)


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_gradients_of_adapters(method, device):
    """QLoRA: of the same 4-bit weights, dequantised on each device."""
    if method == "qlora":
        needs("bitsandbytes")
    _, exact = loss_and_gradients(adapted(method, torch.float32), batch())
    _, reference = loss_and_gradients(adapted(method, torch.bfloat16), batch())
    _, found = loss_and_gradients(adapted(method, torch.bfloat16, device), ready(batch(), device))
    assert_gradients(found, reference, exact)


def test_nf4_quantised_on_the_device(device):
    """A GPU divides with another rounding, so that a few weights may go to the neighbouring value."""
    needs("bitsandbytes")
    from litmini.methods.nf4 import NF4Linear

    torch.manual_seed(0)
    base = torch.nn.Linear(256, 512, bias=False).bfloat16()
    here, there = NF4Linear(base), NF4Linear(base, on=device)
    assert there.weight.device == base.weight.device
    assert float((here.weight == there.weight).float().mean()) > 0.99
    same = (here.absmax == there.absmax).float().mean()
    assert float(same) > 0.99 and difference(there.dequantize().float(), here.dequantize().float()) < 0.05
    moved = copy.deepcopy(here).to(device)
    assert difference(moved.dequantize().float().cpu(), here.dequantize().float()) < 1e-2


def setup_of(device: torch.device, steps: int, precision: str = "32-true", **optim: Any) -> tuple[Any, Any]:
    """Return a `Setup` of LoRA and its model; `fit` makes batches as training does."""
    needs("lightning_fabric")
    from lightning_fabric import Fabric
    from training_parts import make_setup

    from litmini.distributed.fabric import mixed_precision
    from litmini.training.optimizer import make_optimizer

    config = OptimConfig(lr=1e-2, schedule="constant", **optim)
    plugins = mixed_precision(precision, device.type) if precision.endswith("mixed") else None
    fabric = Fabric(accelerator=device.type, devices=1, plugins=plugins, precision=None if plugins else precision)
    model = adapted("lora", torch.bfloat16 if precision == "32-true" else torch.float32)
    wrapped = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(make_optimizer(model, config))
    setup = make_setup(fabric, wrapped, optimizer, [[batch(i), batch(i + 50)] for i in range(steps)], optim=config)
    setup.attention = None if ON == "cuda" else "varlen"  # its stand-in
    return setup, model


def trained(device: torch.device, steps: int = 4, **how: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    from litmini.training.loop import fit
    from litmini.training.objective import LanguageModeling

    setup, model = setup_of(device, steps, **how)
    fit(setup, LanguageModeling())
    weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
    return [row["loss"] for row in setup.recorder.rows], weights


def test_training_equals_that_on_the_cpu(device):
    """Batches come from a thread, pinned."""
    found, expected = trained(device)[0], trained(torch.device("cpu"))[0]
    assert found == pytest.approx(expected, rel=0.02) and found[-1] < found[0]


def test_a_step_waits_for_the_device_once(device):
    """The first step may wait more often: kernels are compiled, and the optimizer makes its state."""
    needs("lightning_fabric")
    import litmini.training.loop as loop
    from litmini.training.objective import LanguageModeling

    setup, _ = setup_of(device, 1)
    objective, data = LanguageModeling(), ready(batch(), device)
    for _ in range(2):
        loop._take_step(setup, objective, [data, data], 100, None)
    with no_sync(device):
        loss = objective.loss(setup.model, data)
        setup.fabric.backward(loss)
    setup.optimizer.zero_grad()
    with counted_syncs(device) as syncs:
        loop._take_step(setup, objective, [data, data], 100, None)
    assert len(syncs) == (1 if device.type == "cuda" else 0), syncs


def test_compiled_equals_uncompiled_and_compiles_once(device, monkeypatch):
    """Of blocks there are two graphs, as the first one's input needs no gradient; a GPU compiles the loss, too."""
    import torch.compiler.config
    from torch._dynamo.utils import counters

    from litmini.training.compile import compile_training

    monkeypatch.setattr(torch.compiler.config, "dynamic_sources", "")
    torch._dynamo.reset()
    counters.clear()
    data = [ready(batch(seed), device) for seed in range(3)]
    _, exact = loss_and_gradients(adapted("lora", torch.float32), batch())
    _, reference = loss_and_gradients(adapted("lora", torch.bfloat16), batch())
    model = adapted("lora", torch.bfloat16, device)
    compile_training(model, torch.bfloat16, "inductor" if device.type == "cuda" else "aot_eager", static=True)
    _, found = loss_and_gradients(model, data[0])
    assert_gradients(found, reference, exact)
    graphs = counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= (2 if device.type == "cpu" else 4) and not counters["graph_break"], counters
    for other in data[1:]:
        loss_and_gradients(model, other)
    assert counters["stats"]["unique_graphs"] == graphs


def test_bf16_mixed(device):
    """Batches reach the model as they are."""
    losses = trained(device, 4, precision="bf16-mixed")[0]
    assert losses[-1] < losses[0]


def test_16_mixed(device):
    needs_gpu("16-mixed")
    losses = trained(device, 8, precision="16-mixed")[0]
    assert losses[-1] < losses[0]


def test_paged_adamw8bit(device):
    needs_gpu("paged_adamw8bit")
    needs("bitsandbytes")
    losses = trained(device, 6, name="paged_adamw8bit")[0]
    assert losses[-1] < losses[0]


def test_fsdp_with_one_rank(device):
    """In bf16-mixed, where blocks are gathered in bf16: the losses of the model that is not sharded."""
    needs("lightning_fabric")
    from litmini.distributed.fsdp import shard

    expected, reference = loss_and_gradients(tiny("llama", torch.float32), batch())
    if ON == "cuda":
        torch.cuda.set_device(device)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        model = shard(tiny("llama", torch.float32), mesh, mixed=True).train()
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = model(**ready(batch(), device))
        loss.backward()
        found = {n: p.grad.full_tensor().cpu() for n, p in model.named_parameters()}
    finally:
        dist.destroy_process_group()
    assert float(loss.detach()) == pytest.approx(expected, rel=0.01)
    assert max(difference(found[n], reference[n]) for n in found) < 0.2


def test_resume(device, tmp_path):
    """The state is restored bit by bit, and batches and seeds are those of the step.

    On a CPU the run is then the same; on a GPU up to the order of sums in FlashAttention's backward pass.
    """
    needs("lightning_fabric")
    from litmini.runs.training_state import load_state, named_state, save_state
    from litmini.training.loop import fit
    from litmini.training.objective import LanguageModeling

    losses, weights = trained(device)
    first, model = setup_of(device, 4)
    progress = fit(first, LanguageModeling(), stop_after=2)
    save_state(tmp_path, progress, model, first.optimizer)
    second, again = setup_of(device, 4)
    for parameter in again.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    second.progress = load_state(tmp_path, again, second.optimizer)
    saved, restored = (dict(named_state(m, s.optimizer)) for m, s in ((model, first), (again, second)))
    assert saved.keys() == restored.keys() and len(saved) > 2
    assert all(torch.equal(torch.as_tensor(saved[n]).cpu(), torch.as_tensor(restored[n]).cpu()) for n in saved)
    fit(second, LanguageModeling())
    rows = [row["loss"] for row in (*first.recorder.rows, *second.recorder.rows)]
    assert rows == (losses if not REPEATED else pytest.approx(losses, rel=REPEATED))
    if not REPEATED:
        assert all(torch.equal(p.detach(), weights[n]) for n, p in again.named_parameters() if p.requires_grad)
