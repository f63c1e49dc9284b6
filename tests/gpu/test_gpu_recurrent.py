"""Kernels of other packages for recurrent layers, against the plain way: outputs, gradients and bounds of documents.

On a GPU they run where `flash-linear-attention` or `mamba-ssm` is installed; on a CPU, stand-ins run by their contracts.
"""

from typing import Any

import pytest
import recurrent_kernel
import torch
from gpu_parts import (
    ON,
    assert_gradients,
    assert_logits,
    batch,
    device_of_tests,
    loss_and_gradients,
    needs,
    ready,
    tiny,
)
from gpu_parts import without_labels as inputs_of

from litmini.ops import recurrent_kernels

pytestmark = pytest.mark.gpu
KERNELS = {"qwen3_5": "fla", "qwen3_5_moe": "fla", "granite_hybrid": "mamba_ssm", "mamba2": "mamba_ssm"}


@pytest.fixture
def device(monkeypatch) -> torch.device:
    """The device of these tests, on which the kernels are found."""
    if ON != "cuda":
        monkeypatch.setattr(recurrent_kernels, "DEVICES", ("cpu",))
        monkeypatch.setattr(recurrent_kernels, "_find", recurrent_kernel.find)
    return device_of_tests()


def plain(monkeypatch) -> None:
    monkeypatch.setattr(recurrent_kernels, "DEVICES", ())


def installed(name: str) -> None:
    if ON == "cuda":
        needs(KERNELS[name])


class Counted:
    """Counts the calls of a kernel that returned something."""

    def __init__(self, monkeypatch) -> None:
        self.count = 0
        for module, name in (("linear_attention", "delta_rule_kernel"), ("state_space", "scan_kernel")):
            monkeypatch.setattr(f"litmini.ops.{module}.{name}", self.counting(getattr(recurrent_kernels, name)))

    def counting(self, kernel: Any) -> Any:
        def run(*args: Any) -> Any:
            y = kernel(*args)
            self.count += y is not None
            return y

        return run


def recurrent(model: Any) -> int:
    return sum(hasattr(module, "state_size") for module in model.modules())


@pytest.mark.parametrize("name", KERNELS)
def test_logits_and_gradients_of_packed_documents(name, device, monkeypatch):
    installed(name)
    data = batch()
    real = data["documents"] > 0
    counted = Counted(monkeypatch)
    model = tiny(name, torch.bfloat16, device)
    with torch.no_grad():
        found = model.eval()(**inputs_of(ready(data, device, name)))
    assert counted.count == recurrent(model)
    _, gradients = loss_and_gradients(model, ready(data, device, name))
    assert counted.count == 2 * recurrent(model)
    plain(monkeypatch)
    with torch.no_grad():
        exact, reference = (tiny(name, d).eval()(**inputs_of(data)) for d in (torch.float32, torch.bfloat16))
    assert_logits(found[real.to(device)], reference[real], exact[real])
    _, right = loss_and_gradients(tiny(name, torch.float32), data)
    _, rounded = loss_and_gradients(tiny(name, torch.bfloat16), data)
    assert counted.count == 2 * recurrent(model)
    assert_gradients(gradients, rounded, right)


@pytest.mark.parametrize("name", KERNELS)
def test_no_document_knows_of_another(name, device, monkeypatch):
    """The logits of each are those of it alone, by the same kernel."""
    installed(name)
    data, model = batch(), tiny(name, torch.bfloat16, device).eval()
    counted, exact = Counted(monkeypatch), tiny(name, torch.float32).eval()
    with torch.no_grad():
        packed = model(**inputs_of(ready(data, device, name)))
        for number in (1, 2, 4):  # of the third sequence
            part = data["documents"][2] == number
            tokens = data["tokens"][2][part][None]
            assert_logits(packed[2][part.to(device)], model(tokens.to(device))[0].cpu(), exact(tokens)[0])
    assert counted.count == 4 * recurrent(model)
