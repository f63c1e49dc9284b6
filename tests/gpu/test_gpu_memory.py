"""Memory of training on a GPU: linear in tokens, and less with activations offloaded."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_parts import REPEATED, device_of_tests, loss_and_gradients, needs_gpu, ready
from numerics import difference

from litmini.models import llama
from litmini.training.offload import offload_activations

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    return device_of_tests()


def deep(device: torch.device) -> Any:
    model = llama.Model(replace(llama.PRESETS["tiny"], n_layers=8, dim=256, ffn_dim=1024, max_positions=32_768))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.bfloat16().to(device)


def full(length: int, device: torch.device) -> dict[str, Any]:
    tokens = torch.randint(3, 500, (1, length), generator=torch.Generator().manual_seed(0))
    at = torch.arange(length)[None]
    ids, positions = at * 2 // length + 1, at % (length // 2)
    return ready({"tokens": tokens, "positions": positions, "documents": ids, "labels": tokens.roll(-1, 1)}, device)


def peak(model: Any, data: dict[str, Any]) -> float:
    """Return the peak of a training step's GPU memory in bytes, without what was there before."""
    loss_and_gradients(model, data)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_and_gradients(model, data)
    return torch.cuda.max_memory_allocated() - before


def test_memory_is_linear_in_tokens(device):
    needs_gpu("a peak of GPU memory")
    model = deep(device)
    assert peak(model, full(16_384, device)) < 2.2 * peak(model, full(8_192, device))


def test_offloading_changes_no_gradient(device):
    data, model = full(8_192 if device.type == "cuda" else 128, device), deep(device)
    loss, expected = loss_and_gradients(model, data)
    most = peak(model, data) if device.type == "cuda" else 0.0
    offload_activations(model)
    for _ in range(2):  # pinned memory is used again
        again, found = loss_and_gradients(model, data)
        assert again == pytest.approx(loss, rel=1e-5)
        assert max(difference(found[n], expected[n]) for n in found) <= 10 * REPEATED
    if device.type == "cuda":
        assert peak(model, data) < 0.8 * most
