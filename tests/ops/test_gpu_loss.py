"""The loss of GPUs, on a CPU: its chunks, its fused kernel, and the matmul that keeps fp32."""

import importlib.util
import shutil
import sysconfig

import matmul_kernel  # noqa: F401  (registers it)
import pytest
import torch
from numerics import assert_close, difference, ulps
from torch import nn
from torch._dynamo.testing import CompileCounter

from litmini.methods.heads import LogProbHead
from litmini.methods.lora import LoRALinear
from litmini.ops import cross_entropy
from litmini.ops.cross_entropy import (
    CHUNK,
    GPU_ROWS,
    IGNORE,
    Targets,
    ZLossHead,
    _gradient_of_logits_,
    linear_cross_entropy,
    rows_at_once,
)
from litmini.ops.fused_loss import gradient_of_logits_, has_triton

GIB = 2**30


@pytest.mark.parametrize(
    "gib, vocab, logit_bytes, rows",
    [
        (80, 128_256, 2, 5120),  # Llama 3.1
        (24, 128_256, 2, 1536),
        (16, 262_144, 2, 512),  # Gemma 3
        (80, 128_256, 16, 512),  # an adapted head
        (141, 32_000, 2, GPU_ROWS),
        (8, 262_144, 16, CHUNK),
    ],
)
def test_rows_follow_from_the_gpu_and_the_vocabulary(gib, vocab, logit_bytes, rows):
    head = nn.Linear(64, vocab, bias=False, device="meta")
    labels = torch.zeros(1, 1, dtype=torch.int64)
    found = rows_at_once(head, Targets(labels, labels[0], gib * GIB), 64, logit_bytes, 7)
    assert found == rows
    assert rows in (CHUNK, GPU_ROWS) or rows * vocab * logit_bytes <= gib * GIB / 64
    assert rows_at_once(head, Targets(labels, labels[0]), 64, logit_bytes, 7) == 7


def test_targets_know_the_gpu(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(cross_entropy, "gpu_memory", lambda device: 24 * GIB if device == gpu else 0)
    labels = torch.tensor([[1, IGNORE, 2]])
    assert Targets.of(labels).gpu_memory == 0
    assert Targets.of(labels, gpu).map(lambda tensor: tensor).gpu_memory == 24 * GIB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap, z_weight", [(None, 0.0), (0.7, 0.0), (None, 0.1), (0.7, 0.1)])
def test_the_fused_kernel_equals_the_plain_one(softcap, z_weight, dtype):
    logits = (5 * torch.randn(6, 53, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[0, 3] = 300  # almost certain, and the rest of it all but impossible
    wanted = torch.tensor([3, 4, 5, 6, 7, 8])[:, None]
    ours, theirs = logits.clone(), logits.clone()
    buffer = None if dtype == torch.float32 else torch.empty(6, 53)
    assert_close(
        gradient_of_logits_(ours, wanted, softcap, z_weight),
        _gradient_of_logits_(theirs, wanted, softcap, z_weight, buffer),
    )
    assert difference(ours.float(), theirs.float()) <= (ulps() if dtype == torch.float32 else 2**-8)


def test_triton_needs_a_compiler_and_headers_of_python(monkeypatch, tmp_path):
    """Without them, the first step of each run would fail; with them, only an old GPU is without it."""
    device = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/gcc")
    monkeypatch.delenv("CC", raising=False)
    assert not has_triton(device)
    (tmp_path / "Python.h").touch()
    assert has_triton(device)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not has_triton(device)
    monkeypatch.setenv("CC", "mycc")
    assert has_triton(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not has_triton(device)


def test_it_is_compiled_for_whole_chunks_and_for_the_rest():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(gradient_of_logits_, backend=counter)
    for rows in (16, 16, 9, 16, 5, 16, 2):
        compiled(torch.randn(rows, 53), torch.zeros(rows, 1, dtype=torch.int64), None, 0.0, None)
    assert counter.frame_count == 2


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2000, 16, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(16, 53, bias=False, dtype=dtype)
    labels = torch.randint(0, 53, (1, 2000), generator=generator)
    return hidden, head, labels.masked_fill(torch.rand(1, 2000, generator=generator) < 0.25, IGNORE)


def gradients(hidden, head, labels) -> list[torch.Tensor]:
    loss, _ = linear_cross_entropy(hidden, head, labels)
    parameters = [p for p in head.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, *parameters])]


@pytest.mark.parametrize("kind", ["plain", "z-loss", "lora", "log_probs"])
def test_the_way_of_gpus_equals_that_of_cpus(kind, monkeypatch):
    """In chunks of 256 and of more rows."""
    monkeypatch.setattr(cross_entropy, "_fused_loss", lambda device: gradient_of_logits_)
    hidden, head, labels = problem(torch.float32)
    if kind == "z-loss":
        head = ZLossHead(head, 0.1)
    if kind == "lora":
        head = LoRALinear(head.requires_grad_(False), rank=4, alpha=8)
        nn.init.normal_(head.lora_B)
    if kind == "log_probs":
        head = LogProbHead(head)
        weights = torch.randn(1, 2000)
        plain = head.outputs
        monkeypatch.setattr(head, "outputs", lambda *args: ((plain(*args)[0] * weights).sum(), None))
    expected = gradients(hidden, head, labels)
    for memory in (1, GIB):
        for ours, theirs in zip(
            gradients(hidden, head, Targets(labels, Targets.of(labels).index, memory)), expected, strict=True
        ):
            assert_close(ours, theirs)


def test_a_trained_heads_gradient_is_summed_in_fp32(monkeypatch):
    """A CPU rounds each chunk's to bf16; the result is then rounded to the weight's dtype, fp32 in mixed precision."""
    monkeypatch.setattr(cross_entropy, "_fused_loss", lambda device: gradient_of_logits_)
    hidden, head, labels = problem(torch.float32)
    exact = gradients(hidden.double(), head.double(), labels)[2]
    head.float()
    errors = []
    for memory in (0, 1):
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(hidden, head, Targets(labels, Targets.of(labels).index, memory))[2]
        assert found.dtype == torch.float32
        errors.append((found - exact).norm())
    assert errors[1] < errors[0]
