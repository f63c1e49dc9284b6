"""Less memory: stochastic rounding, steps in the backward pass, averages and activations elsewhere, scaled losses."""

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.optim import PagedAdamW8bit
from lightning_fabric import Fabric
from numerics import ulps
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_parts import Listening, make_setup

from litmini.config.finetune import DataConfig, FinetuneFullConfig, FinetuneLoraConfig
from litmini.config.training import OptimConfig, TrainConfig
from litmini.distributed.fabric import make_fabric, mixed_precision
from litmini.errors import UserError
from litmini.models import llama
from litmini.runs.training_state import load_state, save_state
from litmini.training import low_memory
from litmini.training.loop import fit
from litmini.training.memory import full_rows
from litmini.training.objective import LanguageModeling
from litmini.training.optimizer import make_optimizer
from litmini.training.setup import Progress


@pytest.fixture(scope="module")
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def tiny(dtype=torch.float32):
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to(dtype)


def train(fabric, model, optim: OptimConfig, steps=4, progress=None, prepare=lambda optimizer: None, rate=1e-3):
    """A few steps on one batch; returns (optimizer, rows of metrics)."""
    wrapped, optimizer = fabric.setup(model, make_optimizer(model, optim))
    progress = prepare(optimizer) or Progress()
    batches = [[full_rows(2, 16, 512)]] * steps
    setup = make_setup(fabric, wrapped, optimizer, batches, rate, progress=progress, max_grad_norm=optim.max_grad_norm)
    fit(setup, LanguageModeling())
    return optimizer, setup.recorder.rows


def flat(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def test_small_updates_are_lost_in_bf16_and_count_when_rounded_by_chance():
    """Requirement 17."""
    ends = {}
    for name, dtype, options in (
        ("fp32", torch.float32, {}),
        ("bf16", torch.bfloat16, {}),
        ("rounded", torch.bfloat16, {"stochastic_rounding": True}),
    ):
        model = torch.nn.Linear(64, 64, bias=False, dtype=dtype)
        torch.nn.init.ones_(model.weight)
        optimizer = make_optimizer(model, OptimConfig(lr=1e-4, **options))
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        ends[name] = float(model.weight.detach().float().mean())
    assert ends["fp32"] == pytest.approx(1 - 100 * 1e-4, abs=1e-4)
    assert ends["bf16"] == 1
    assert ends["rounded"] == pytest.approx(ends["fp32"], abs=3e-4)


def test_rounding_resumes_to_the_bit_and_keeps_averages_in_fp32(fabric, tmp_path):
    optim = OptimConfig(stochastic_rounding=True)
    whole, part, rest = (tiny(torch.bfloat16) for _ in range(3))
    train(fabric, whole, optim)
    optimizer, _ = train(fabric, part, optim, steps=2)
    save_state(tmp_path, Progress(step=2), part, optimizer)
    assert {v.dtype for state in optimizer.state.values() for v in state.values()} == {torch.float32}
    assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    train(fabric, rest, optim, prepare=lambda optimizer: load_state(tmp_path, rest, optimizer))
    assert torch.equal(flat(rest), flat(whole)) and not torch.equal(flat(part), flat(whole))


@pytest.fixture
def paged(monkeypatch):
    """Optimizers with state that says whether it is paged, as on a GPU: there it is managed memory."""
    made = []

    def buffer(self, p, dtype):
        made.append(torch.zeros_like(p, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(PagedAdamW8bit, "get_state_buffer", buffer)
    return made


def take_steps(model, optimizer, count: int) -> None:
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def is_paged(optimizer, paged) -> bool:
    moments = [state[name] for state in optimizer.state.values() for name in ("state1", "state2")]
    return bool(moments) and all(any(one is buffer for buffer in paged) for one in moments)


def test_paged_state_stays_paged_when_a_run_resumes(paged, tmp_path):
    model, again = tiny(), tiny()
    optimizer, resumed = (PagedAdamW8bit(one.parameters(), lr=1e-3) for one in (model, again))
    take_steps(model, optimizer, 2)
    save_state(tmp_path, Progress(step=2), model, optimizer)
    load_state(tmp_path, again, resumed)
    for one, other in ((model, optimizer), (again, resumed)):
        assert is_paged(other, paged)
        take_steps(one, other, 1)
    assert torch.equal(flat(again), flat(model)) and is_paged(resumed, paged)


def test_paged_state_stays_paged_parameter_by_parameter(paged, monkeypatch):
    """Managed memory is memory of the CPU to torch, so that a copy to a parameter's device would be another tensor."""
    monkeypatch.setattr(low_memory, "_to", lambda value, device: value.clone() if torch.is_tensor(value) else value)
    model = tiny()
    groups = [{"params": list(model.parameters())}]
    optimizer = low_memory.PerParameter(groups, lambda own: PagedAdamW8bit(own, lr=1e-3))
    take_steps(model, optimizer, 2)
    assert is_paged(optimizer, paged)


class Reads(TorchDispatchMode):
    """Counts the values that the host reads."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_rounding_waits_for_no_step_but_the_first_after_resuming(tmp_path):
    """On a GPU, the number of steps is on the device."""
    model, again = tiny(torch.bfloat16), tiny(torch.bfloat16)
    optimizer, resumed = (make_optimizer(one, OptimConfig(stochastic_rounding=True)) for one in (model, again))

    def reads(model, optimizer) -> int:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Reads() as seen:
            optimizer.step()
        return seen.count

    assert [reads(model, optimizer) for _ in range(2)] == [0, 0]
    save_state(tmp_path, Progress(step=2), model, optimizer)
    load_state(tmp_path, again, resumed)
    assert [reads(again, resumed) for _ in range(2)] == [len(list(again.parameters())), 0]
    assert [reads(model, optimizer) for _ in range(2)] == [0, 0] and torch.equal(flat(again), flat(model))


def test_resuming_leaves_offloaded_state_on_the_cpu(fabric, tmp_path):
    """It may be more than a GPU holds; the meta device stands for one."""
    model = tiny()
    optimizer, _ = train(fabric, model, OptimConfig(offload=True), steps=1)
    save_state(tmp_path, Progress(step=1), model, optimizer)
    again = tiny().to("meta")
    resumed = make_optimizer(again, OptimConfig(offload=True))
    load_state(tmp_path, again, resumed)
    found = {v.device.type for state in resumed.state.values() for v in state.values()}
    assert found == {"cpu"} and len(resumed.state) == len(list(again.parameters()))


@pytest.mark.parametrize("option", [{"in_backward": True}, {"offload": True}])
@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw8bit"])
def test_parameter_by_parameter_equals_all_at_once(fabric, option, name):
    plain, other = tiny(), tiny()
    _, rows = train(fabric, plain, OptimConfig(name=name, max_grad_norm=None))
    peaks = []
    for p in other.parameters():
        p.register_post_accumulate_grad_hook(
            lambda p: peaks.append(sum(q.grad is not None for q in other.parameters()))
        )
    _, other_rows = train(fabric, other, OptimConfig(name=name, max_grad_norm=None, **option))
    assert torch.equal(flat(plain), flat(other))
    assert (max(peaks) == 1) == ("in_backward" in option)  # gradients at once
    for a, b in zip(rows, other_rows, strict=True):
        assert a["loss"] == b["loss"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=ulps())


def test_a_gradient_that_is_not_finite_is_not_used_in_backward(fabric):
    model = tiny()
    model.model["norm"].weight.data[0] = float("nan")
    before = flat(model)
    with pytest.raises(UserError, match="not finite"):
        train(fabric, model, OptimConfig(in_backward=True, max_grad_norm=None))
    assert torch.equal(flat(model).nan_to_num(7), before.nan_to_num(7))


def test_steps_in_backward_refuse_accumulation_clipping_ranks_and_scaled_losses():
    config = dict(checkpoint_dir="c", out_dir="o", data=DataConfig("d"), optim=OptimConfig(in_backward=True))
    with pytest.raises(UserError, match="global_batch_size above .*, optim.max_grad_norm .*, several devices"):
        FinetuneFullConfig(**config, train=TrainConfig(global_batch_size=8, micro_batch_size=4), devices=2)
    one = TrainConfig(global_batch_size=4, micro_batch_size=4)
    config["optim"] = OptimConfig(in_backward=True, max_grad_norm=None)
    FinetuneFullConfig(**config, train=one)
    with pytest.raises(UserError, match="does not go with precision 16-mixed, whose loss is scaled.$"):
        FinetuneFullConfig(**config, train=one, precision="16-mixed")
    with pytest.raises(UserError, match="stochastic_rounding goes with"):
        make_optimizer(tiny(), OptimConfig(name="sgd", stochastic_rounding=True))


def test_fp16_is_refused_on_the_cpu_with_the_reason():
    config = FinetuneLoraConfig(checkpoint_dir="c", out_dir="o", data=DataConfig("d"), precision="16-mixed")
    with pytest.raises(UserError, match="needs a GPU.*bf16-mixed"):
        make_fabric(config)


def test_a_kernel_of_gpus_is_refused_on_the_cpu():
    config = FinetuneLoraConfig(checkpoint_dir="c", out_dir="o", data=DataConfig("d"), attention="varlen")
    with pytest.raises(UserError, match="--attention varlen needs a GPU: .*Leave it out"):
        make_fabric(config)


def test_the_precision_of_fp32_matmuls_is_a_setting(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    for precision in ("highest", "high"):
        make_fabric(
            FinetuneLoraConfig(
                checkpoint_dir="c", out_dir="o", data=DataConfig("d"), float32_matmul_precision=precision
            )
        )
    assert chosen == ["highest", "high"]


def test_losses_are_scaled_in_fp16(tmp_path):
    """On the CPU, where it is slow; it is for GPUs, where we have not run it."""
    rows = {}
    for name in ("bf16", "fp16", "too large"):
        precision = mixed_precision("16-mixed", "cpu") if name != "bf16" else None
        fabric = Fabric(accelerator="cpu", devices=1, **({"plugins": precision} if precision else {}))
        if name == "too large":
            precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        model = tiny()
        steps = 4 if name != "too large" else 16
        _, rows[name] = train(fabric, model, OptimConfig(max_grad_norm=0.1), steps=steps)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    for a, b in zip(rows["bf16"], rows["fp16"], strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=2e-2)
    norms = torch.tensor([row["grad_norm"] for row in rows["too large"]])
    assert not norms[0].isfinite() and norms[-1].isfinite()  # steps are left out until the scale fits
    assert rows["too large"][-1]["loss"] < rows["too large"][0]["loss"]


def test_the_scale_is_saved_and_restored():
    saved = []
    state = {"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3, "_growth_tracker": 2}
    for start in (None, state):
        fabric, model = Fabric(accelerator="cpu", devices=1, plugins=mixed_precision("16-mixed", "cpu")), tiny()
        wrapped, optimizer = fabric.setup(model, make_optimizer(model, OptimConfig()))
        recorder = Listening(checkpoint=lambda progress: saved.append(progress.loss_scale))
        batches, train = [[full_rows(1, 8, 512)]], TrainConfig(save_every=1)
        setup = make_setup(fabric, wrapped, optimizer, batches, 1e-3, train, Progress(loss_scale=start), recorder)
        fit(setup, LanguageModeling())
    assert (saved[0]["scale"], saved[0]["_growth_tracker"]) == (65536, 1)
    assert (saved[1]["scale"], saved[1]["_growth_tracker"]) == (16, 0)  # that was the third good step in a row


@pytest.mark.parametrize(
    "settings", [{"name": "adamw8bit"}, {"stochastic_rounding": True}, {"in_backward": True, "max_grad_norm": None}]
)
def test_what_knows_no_shards_refuses_them(settings):
    """Parameters that FSDP has shared out: these optimizers would take a share for the whole."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(8, 8, bias=False)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        why = ": bitsandbytes takes whole tensors, not shards" if "name" in settings else ""
        with pytest.raises(UserError, match=f"--strategy fsdp{why}"):
            make_optimizer(model, OptimConfig(**settings))
    finally:
        dist.destroy_process_group()
