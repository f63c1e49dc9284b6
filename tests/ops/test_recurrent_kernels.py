"""Which kernel computes a recurrent layer: those of other packages only where they are installed and right."""

import pytest
import recurrent_kernel
import torch
import varlen_kernel  # noqa: F401  (registers FlashAttention's operator on the CPU)
from packed_batch import documents_of
from test_linear_attention import inputs as delta_inputs
from test_state_space import inputs as scan_inputs

from litmini.models import granite_hybrid, qwen3_5
from litmini.ops import recurrent_kernels
from litmini.ops.attention import Documents
from litmini.ops.kv_cache import KVCache
from litmini.ops.linear_attention import Runs, gated_delta_rule, make_runs
from litmini.ops.recurrent_kernels import delta_rule_kernel, scan_kernel
from litmini.ops.state_space import state_space_scan

POSITIONS = torch.arange(12).expand(2, -1)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(recurrent_kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(recurrent_kernels, "_find", recurrent_kernel.find)
    recurrent_kernel.calls.clear()


def rounded(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [one.bfloat16() for one in tensors]


def test_neither_package_is_looked_for_on_a_cpu(monkeypatch):
    monkeypatch.setattr(recurrent_kernels, "_find", lambda *_: pytest.fail("looked for"))
    runs = Runs(POSITIONS)
    assert delta_rule_kernel(*rounded(delta_inputs(12)), runs) is None
    assert scan_kernel(*rounded(scan_inputs(12)), runs) is None


def test_a_package_that_is_not_installed_is_not_used(monkeypatch):
    monkeypatch.setattr(recurrent_kernels, "DEVICES", ("cpu",))
    recurrent_kernels._find.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gated_delta_rule(*rounded(delta_inputs(12)), Runs(POSITIONS))[1].numel()
    assert state_space_scan(*rounded(scan_inputs(12)), Runs(POSITIONS))[1].numel()
    recurrent_kernels._find.cache_clear()


def test_what_the_kernels_cannot_do_goes_the_plain_way(on_gpu, monkeypatch):
    """fp32, a state that comes in, padding on the left, documents whose bounds nobody knows, and sequences that overflow."""
    runs, ids = Runs(POSITIONS), documents_of([5, 7])
    delta, scan = rounded(delta_inputs(12)), rounded(scan_inputs(12))
    gated_delta_rule(*delta_inputs(12), runs)
    state_space_scan(*scan_inputs(12), runs)
    gated_delta_rule(*delta, runs, torch.zeros(2, 6, 8, 5))
    state_space_scan(*scan, runs, torch.zeros(2, 6, 8, 5))
    gated_delta_rule(*delta, Runs(POSITIONS, padded=True))
    state_space_scan(*scan, Runs(POSITIONS, padded=True))
    gated_delta_rule(*delta, Runs(POSITIONS, ids))
    monkeypatch.setattr(recurrent_kernels, "MOST_SCANNED", 11)
    state_space_scan(*scan, runs)
    assert recurrent_kernel.calls == []
    monkeypatch.setattr(recurrent_kernels, "MOST_SCANNED", 12)
    state_space_scan(*scan, Runs(POSITIONS, ids))
    gated_delta_rule(*delta, make_runs(POSITIONS, Documents.of(ids), None))
    assert recurrent_kernel.calls == ["mamba_chunk_scan_combined", "chunk_gated_delta_rule"]


@pytest.mark.parametrize("family", [qwen3_5, granite_hybrid], ids=["qwen3_5", "granite_hybrid"])
def test_generation_takes_the_plain_way(on_gpu, family):
    model = family.Model(family.PRESETS["tiny"]).eval().bfloat16()
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        for static in (False, True):
            cache = KVCache(model.config, 2, 20, torch.bfloat16, static=static)
            for part in tokens.split([7, 1, 1], 1):
                model(part, cache=cache)
        assert recurrent_kernel.calls == []
        model(tokens)
    assert len(recurrent_kernel.calls) == 2
