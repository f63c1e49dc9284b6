"""Memory known in advance: the ledger of fake tensors against the same ledger on real ones, and what is said of it."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import matmul_kernel  # noqa: F401  (registers it)
import pytest
import torch
import varlen_kernel

from litmini.checkpoints.hf import load_model
from litmini.config.finetune import LoraConfig
from litmini.config.training import OptimConfig
from litmini.methods.adapters import add_adapters
from litmini.methods.nf4 import quantize_linears
from litmini.models import gemma2, gemma4, llama, mixtral
from litmini.system import mapped_files
from litmini.tasks.dry_run import resident_weights
from litmini.training.gpus import (
    CUDA_CONTEXT,
    GIB,
    SIZES,
    SMALLEST,
    Traffic,
    communication_volume,
    compare,
    fits_on,
    memory_per_device,
    on_gpu,
    tokens_per_day,
)
from litmini.training.low_memory import checkpoint_activations
from litmini.training.memory import Memory, _Ledger, as_on_gpu, estimate, full_rows, nbytes, optimizer_bytes
from litmini.training.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]


def build(method: str, family=llama):
    model = family.Model(family.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    if method == "qlora":
        quantize_linears(model)
    if method != "full":
        add_adapters(model, LoraConfig(rank=4, dropout=0.1))
    return model.train()


def measured(model, batch) -> tuple[dict[str, int], int]:
    """The parts at the peak of a real micro-step, and the bytes of gradients after it."""
    ledger = _Ledger(512, [*model.parameters(), *model.buffers()])
    with ledger:
        loss, _ = model(**batch)
        ledger.end_of_forward()
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    parts = ledger.parts({g.untyped_storage()._cdata for g in gradients})
    return parts, sum(g.nbytes for g in gradients)


def packed(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of three documents, a third of the tokens targets."""
    batch = full_rows(rows, length, 512)
    batch["documents"] = (torch.arange(length) * 3 // length + 1).expand(rows, length).contiguous()
    batch["labels"] = torch.where(torch.arange(length) % 3 == 0, batch["labels"], -100)
    return batch


@pytest.mark.parametrize(
    "batch", [full_rows(3, 48, 512), full_rows(1, 600, 512), packed(2, 90)], ids=["full", "long", "packed"]
)
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "recomputed"])
def test_fake_tensors_take_what_real_ones_take(method, batch):
    model = build("lora" if method == "recomputed" else method)
    if method == "recomputed":
        checkpoint_activations(model)
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    memory = estimate(model, batch, OptimConfig(), "32-true")
    assert before == {name: (p, p.data_ptr()) for name, p in model.named_parameters()}  # it is left as it was
    assert all(p.grad is None for p in model.parameters()) and model.training
    real, gradient_bytes = measured(model, batch)
    for part, size in real.items():
        assert getattr(memory, part) == pytest.approx(size, rel=0.01, abs=4096), part
    assert memory.trained == gradient_bytes
    assert memory.frozen + memory.trained == sum(p.nbytes for p in model.parameters()) + sum(
        b.nbytes for b in model.buffers()
    )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_are_counted_once(method):
    """A view of a weight is no activation: with few tokens, what comes and goes is far less than the weights."""
    memory = estimate(build(method), full_rows(1, 2, 512), OptimConfig(), "32-true")
    gradients = memory.trained if method == "full" else 0
    there = memory.activations + memory.temporary + memory.loss + memory.gradients - gradients
    assert 0 < there < 0.4 * (memory.frozen + memory.trained)


def test_what_accumulation_recomputing_and_steps_in_backward_change():
    model, batch = build("full"), full_rows(4, 64, 512)
    once = estimate(model, batch, OptimConfig(), "32-true")
    again = estimate(model, batch, OptimConfig(), "32-true", accumulate=True)
    assert again.gradients >= once.trained > once.gradients  # those of the last micro-batch
    fused = estimate(model, batch, OptimConfig(in_backward=True), "32-true")
    assert fused.gradients == 0 and fused.total <= once.total
    mixed = estimate(model, batch, OptimConfig(), "bf16-mixed")
    assert mixed.activations < once.activations
    checkpoint_activations(model)
    assert estimate(model, batch, OptimConfig(), "32-true").activations < once.activations / 2


def test_no_weight_is_needed_and_experts_are_counted():
    with torch.device("meta"):
        model = llama.Model(llama.PRESETS["tiny"])
    assert estimate(model, full_rows(2, 48, 512), OptimConfig(), "32-true").total == pytest.approx(
        estimate(build("full"), full_rows(2, 48, 512), OptimConfig(), "32-true").total, rel=0.01
    )
    model, batch = (
        build("full", mixtral).bfloat16(),
        full_rows(2, 48, 512),
    )  # torch has no shapes of its experts in fp32
    memory = estimate(model, batch, OptimConfig(), "bf16-true")
    real, _ = measured(model, batch)
    assert memory.activations == pytest.approx(real["activations"], rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"name": "sgd"},
        {"name": "adamw8bit"},
        {"stochastic_rounding": True},
        {"in_backward": True, "max_grad_norm": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_averages(settings, dtype):
    config = OptimConfig(**settings)
    model = torch.nn.Linear(256, 128, dtype=dtype)
    optimizer = make_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        if config.in_backward:
            optimizer._update(p)
    optimizer.step()
    kept = {
        id(v): v.nbytes for p in model.parameters() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)
    }
    expected = sum(optimizer_bytes(p, config) for p in model.parameters())
    if config.stochastic_rounding and dtype is torch.float32:
        assert expected == sum(kept.values()) - 8  # two counters
    else:
        assert expected == pytest.approx(
            sum(kept.values()), abs=2 * 4 + 2 * 256 * 4
        )  # counters, tables of bitsandbytes


def test_several_devices_and_cards():
    model = build("full")
    memory = Memory(
        frozen=0, trained=1000, optimizer=2000, gradients=1000, activations=300, loss=50, temporary=7, process=9
    )
    assert memory_per_device(memory, model, 1, "fsdp") == memory
    assert memory_per_device(memory, model, 4, "ddp").total == memory.total + 1000
    shared = memory_per_device(memory, model, 4, "fsdp")
    assert (shared.trained, shared.optimizer, shared.gradients, shared.activations) == (250, 500, 250, 300)
    assert shared.temporary > memory.temporary
    assert memory_per_device(memory, model, 4, "hsdp", 16) == shared == memory_per_device(memory, model, 1, "fsdp", 4)
    mixed = memory_per_device(memory, model, 4, "fsdp", mixed=True)  # the matrices of two blocks and of a gradient
    matrices = sum(p.numel() for p in model.model["layers"][0].parameters() if p.dim() > 1)
    share = memory.trained / sum(p.nbytes for p in model.parameters())
    assert shared.temporary - mixed.temporary == pytest.approx(2 * matrices * (2 + share), abs=2)


def test_what_fits_on_which_gpu():
    assert list(SIZES) == [16, 24, 40, 48, 80, 141] and all(
        0.92 * size < gib < size for size, (gib, _) in SIZES.items()
    )
    memory = on_gpu(Memory(81 * GIB // 4, 0, 0, 0, 10 * GIB, 5 * GIB, 5 * GIB, process=7))
    assert memory.total == 169 * GIB // 4 + CUDA_CONTEXT
    lines = list(fits_on(memory))
    assert "16 GB" in lines[0] and "does not fit, 27." in lines[0]
    assert [("does not" in line) for line in lines] == [True] * 3 + [False] * 3
    assert "48 GB" in lines[3] and "fits, 1.1 GiB are left" in lines[3]  # 0.45 are logits


@pytest.mark.parametrize("batch", [full_rows(1, 600, 512), packed(2, 90)], ids=["long", "packed"])
@pytest.mark.parametrize("method", ["full", "lora", "recomputed"])
def test_estimates_for_gpus_take_their_kernel_and_their_loss(method, batch):
    """As the same operators allocate on real tensors: varlen, and rows of logits by the GPU's memory."""
    model = build("lora" if method == "recomputed" else method).bfloat16()
    if method == "recomputed":
        checkpoint_activations(model)
    memory = estimate(model, batch, OptimConfig(), "bf16-true", gpu_memory=SMALLEST)
    varlen_kernel.calls.clear()
    real, _ = measured(model, as_on_gpu(batch, SMALLEST))
    assert varlen_kernel.calls
    for part, size in real.items():
        assert getattr(memory, part) == pytest.approx(size, rel=0.01, abs=4096), part


def test_softcaps_take_what_flex_attention_keeps_and_not_scores():
    model = gemma2.Model(gemma2.PRESETS["tiny"]).bfloat16()
    batch = full_rows(1, 2048, 512)
    on_cpu, gpu = (estimate(model, batch, OptimConfig(), "bf16-true", gpu_memory=n) for n in (0, SMALLEST))
    scores = model.config.n_layers * model.config.n_heads * 2048**2 * 2
    assert gpu.total < scores / 2 < on_cpu.total


def test_heads_of_512_take_what_flex_attention_keeps_and_no_mask():
    """Linear in the length of sequences."""
    model = gemma4.Model(replace(gemma4.PRESETS["tiny"], global_head_dim=512)).bfloat16()
    short, long = (
        estimate(model, full_rows(1, T, 512), OptimConfig(), "bf16-true", gpu_memory=SMALLEST) for T in (4096, 8192)
    )
    assert long.activations == pytest.approx(2 * short.activations, rel=0.01)


def test_a_dense_mask_is_counted_and_not_made():
    """In fp32 a GPU has no varlen: a mask of 2**34 bytes would fill this machine's memory."""
    model, T = llama.Model(llama.PRESETS["tiny"]), 2**17
    batch = {name: torch.zeros(1, T, dtype=torch.int64) for name in ("tokens", "positions")}
    batch["labels"] = torch.full((1, T), -100)
    memory = estimate(model, batch, OptimConfig(), "32-true", gpu_memory=SMALLEST)
    assert memory.activations > 2**34


def test_a_large_gpu_has_more_logits_at_once():
    model = llama.Model(replace(llama.PRESETS["tiny"], vocab_size=200_000)).bfloat16()
    batch = full_rows(1, 2048, 200_000)
    small, large = (estimate(model, batch, OptimConfig(), "bf16-true", gpu_memory=n * GIB) for n in (16, 141))
    assert large.loss - small.loss == pytest.approx((2048 - 512) * 200_000 * 2, rel=0.01)


def test_what_gpus_send_to_each_other():
    """Eight on each of two nodes; half of the weights are trained."""
    model = torch.nn.Sequential(torch.nn.Linear(100, 100, bias=False), torch.nn.Linear(100, 100, bias=False))
    model[0].requires_grad_(False)
    trained, all_ = 40_000, 80_000
    assert communication_volume(model, "ddp", 8, 1) == Traffic((0, 0), (2 * trained * 7 / 8, 0))
    assert communication_volume(model, "ddp", 8, 2) == Traffic((0, 0), (0, 2 * trained * 15 / 16))
    assert communication_volume(model, "fsdp", 8, 1) == Traffic(((2 * all_ + trained) * 7 / 8, 0), (0, 0))
    assert communication_volume(model, "fsdp", 8, 2) == Traffic((0, (2 * all_ + trained) * 15 / 16), (0, 0))
    hsdp = Traffic(((2 * all_ + trained) * 7 / 8, 0), (0, 2 * trained / 8 / 2))
    assert communication_volume(model, "hsdp", 8, 2) == hsdp
    said = compare(Traffic((4e9, 0), (0, 1e9)), 989e12 / 1000, 500, 2, 0.5, (8e9, 1e9))
    assert "sends 8.0 GB within a node: 1 s at 8 GB/s" in said and "sends 1.0 GB between nodes: 1 s at 1" in said
    assert "computes 2 s (H100), which does not hide that: a step has 1,000 tokens per GPU, 1,000 are enough" in said


def test_tokens_a_day():
    """6 operations for each trained weight of a product, and attention to half of a row on average."""
    model, config = build("full"), llama.PRESETS["tiny"]
    inside = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    flops = 6 * inside + 12 * (101 / 2) * config.n_heads * config.head_dim * config.n_layers
    assert tokens_per_day(model, 101 - 1, 0.5, 2)["H100"] == pytest.approx(0.5 * 2 * 989e12 * 86400 / flops)


def run(capfd, monkeypatch, script: str, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"scripts/{script}.py"), run_name="__main__")
    out, error = capfd.readouterr()
    assert end.value.code == 0, error
    return out


def test_the_estimate_script(capfd, monkeypatch, tiny_dir):
    words = ["--max_seq_len", 32, "--micro_batch_size", 1]
    out = run(capfd, monkeypatch, "estimate", tiny_dir, *words, "--method", "qlora")
    assert "fits on:\n    16 GB  RTX 4080, V100      fits, " in out and "1 x H100" in out
    out = run(
        capfd,
        monkeypatch,
        "estimate",
        "EleutherAI/pythia-14m",
        *words,
        "--devices",
        8,
        "--lora.targets=[dense]",
        "--num_nodes",
        2,
        "--strategy",
        "hsdp",
    )
    assert (
        "16 x H100" in out
        and "within a node" in out
        and "between nodes" in out
        and f"{6 * 16 * 2 * 128:,} parameters are trained" in out
    )


def test_mapped_weights_count_as_they_are_read(tiny_dir):
    """A checkpoint in the dtype of training is mapped, and not in memory before it is read."""
    model = load_model(tiny_dir, torch.float32)
    whole = sum(map(nbytes, model.parameters()))
    mapped = sum(end - first for first, end, _ in mapped_files(".safetensors"))
    assert mapped >= whole > 0
    for parameter in model.parameters():
        float(parameter.detach().sum())
    assert whole <= resident_weights(model) <= mapped
    copied = model.bfloat16()
    assert resident_weights(copied) == sum(map(nbytes, copied.parameters())) + sum(
        size for _, _, size in mapped_files(".safetensors")
    )


def test_dry_run_says_what_a_run_takes(capfd, monkeypatch, tiny_dir, tmp_path):
    data = ROOT / "config_hub/quickstart/heldout.jsonl"
    words = ["--checkpoint_dir", tiny_dir, "--out_dir", tmp_path / "x", "--data.path", data, "--data.max_seq_len", 128]
    words += ["--train.micro_batch_size", 1, "--train.global_batch_size", 1, "--train.max_steps", 10, "--dry_run"]
    out = run(capfd, monkeypatch, "finetune_lora", *words, "--precision", "32-true")
    for part in (
        "50 examples",
        "frozen weights",
        "activations",
        "process",
        "this device has",
        "fits on",
        "for 10 steps",
    ):
        assert part in out, part
    assert "Nothing was trained or written" in out and not (tmp_path / "x").exists()
    monkeypatch.setattr("litmini.tasks.dry_run._memory_of", lambda device: 1)
    out = run(capfd, monkeypatch, "finetune_lora", *words, "--precision", "32-true")
    assert "warning: it does not fit on this device. " in out and "for 10 steps" not in out
