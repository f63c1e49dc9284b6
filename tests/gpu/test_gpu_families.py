"""Every family on a GPU in bf16, against fp32 on the CPU: logits, gradients, packing, cache, and which kernel ran.

An error may be four times that of bf16 on the CPU.
"""

from contextlib import nullcontext

import pytest
import torch
from gpu_parts import (
    FLEX,
    NAMES,
    ON,
    PADDING,
    ROWS,
    STATES_ONLY,
    T,
    assert_gradients,
    assert_logits,
    batch,
    device_of_tests,
    kernels_chosen,
    loss_and_gradients,
    needs_grouped_matmuls,
    no_sync,
    operators,
    ready,
    tiny,
    without_labels,
)

from litmini.ops import recurrent_kernels
from litmini.ops.kv_cache import KVCache

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    return device_of_tests()


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, device):
    data = batch()
    real = data["documents"] > 0
    with torch.no_grad():
        exact, reference = (tiny(name, d).eval()(**without_labels(data)) for d in (torch.float32, torch.bfloat16))
        found = tiny(name, torch.bfloat16, device).eval()(**without_labels(ready(data, device, name)))
    assert_logits(found[real.to(device)], reference[real], exact[real])


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, device):
    if device.type == "cpu" and name in FLEX:
        pytest.skip("FlexAttention has no backward pass on a CPU")
    data = batch()
    exact_loss, exact = loss_and_gradients(tiny(name, torch.float32), data)
    _, reference = loss_and_gradients(tiny(name, torch.bfloat16), data)
    loss, found = loss_and_gradients(tiny(name, torch.bfloat16, device), ready(data, device, name))
    assert loss == pytest.approx(exact_loss, rel=0.02)
    assert_gradients(found, reference, exact)


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_unpacked(name, device):
    """Also in sequences that end with padding."""
    data, model = batch(), tiny(name, torch.bfloat16, device).eval()
    with torch.no_grad():
        exact = tiny(name, torch.float32).eval()(**without_labels(data))
        packed = model(**without_labels(ready(data, device, name)))
        for row, lengths in enumerate(ROWS):
            at = 0
            for length in [*lengths[:-1], lengths[-1] - PADDING[row]]:
                part = slice(at, at + length)
                alone = model(data["tokens"][row : row + 1, part].to(device))[0]
                assert_logits(packed[row, part], alone, exact[row, part])
                at += length


@pytest.mark.parametrize("name", NAMES)
def test_cached_equals_uncached(name, device):
    tokens = batch()["tokens"]
    with torch.no_grad():
        exact = tiny(name, torch.float32).eval()(tokens)
        model, tokens = tiny(name, torch.bfloat16, device).eval(), tokens.to(device)
        cache = KVCache(model.config, len(tokens), T, torch.bfloat16, device, chunk=20)
        cached = torch.cat([model(part, cache=cache) for part in tokens.split([20, 5, *[1] * (T - 25)], dim=1)], 1)
        assert_logits(cached, model(tokens), exact)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STATES_ONLY])
def test_the_kernel_is_the_one_that_was_chosen(name, device):
    """By the profiler: FlashAttention where varlen was chosen, Triton's kernels of FlexAttention where flex was."""
    model, data = tiny(name, torch.bfloat16, device).eval(), without_labels(ready(batch(), device, name))
    chosen = kernels_chosen(model, data)  # which compiles FlexAttention
    assert chosen == {"flex" if name in FLEX else "varlen"}
    with torch.no_grad():
        seen = operators(lambda: model(**data), device)
    wanted = {"flex": ("flex_attention", "triton_tem"), "varlen": ("flash",) if ON == "cuda" else ("_varlen_attn",)}
    words = wanted[chosen.pop()]
    if ON == "cuda" or name not in FLEX:  # uncompiled, FlexAttention is plain operators
        assert any(word in operator.lower() for operator in seen for word in words), sorted(seen)
    dense = [name for name in seen if "scaled_dot_product" in name or "efficient_attention" in name]
    assert not dense


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FLEX])
def test_forward_and_backward_wait_for_nothing(name, device, monkeypatch):
    needs_grouped_matmuls(name, device)
    monkeypatch.setattr(
        recurrent_kernels, "DEVICES", ()
    )  # that of flash-linear-attention waits for bounds of documents
    model, data = tiny(name, torch.bfloat16, device).train(), ready(batch(), device)
    for is_watched in (False, True):  # at first, kernels are compiled
        with no_sync(device) if is_watched else nullcontext():
            loss, _ = model(**data)
            loss.backward()
            model.zero_grad()
