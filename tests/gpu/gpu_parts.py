"""Where the tests for GPUs run, and the tiny models and packed batches that they compare.

`python -m pytest -m gpu` runs them on a GPU. On a CPU, with stand-ins for the kernels of a GPU, `LITMINI_GPU_TESTS_ON=cpu`
runs all that can be, and without it a few of each kind run, so that the code of these tests is known to work.
"""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from numerics import assert_as_accurate, assert_gradients_as_accurate
from packed_batch import packed_batch

from litmini.models import FAMILIES, family
from litmini.ops import attention
from litmini.training.setup import on_device

ON = os.environ["LITMINI_GPU_TESTS_ON"]  # set in tests/conftest.py: cuda, cpu, or a few tests on the CPU
MODULES = {name.rsplit(".", 1)[-1]: model_type for model_type, name in reversed(FAMILIES.items())}  # one type each
FLEX = ("gemma2", "gpt_oss", "mpt")  # softcap, sinks, ALiBi
STATES_ONLY = ("mamba2",)  # no attention, so no kernel of it
REPEATED = 0.0 if ON != "cuda" else 1e-2
"""Relative difference of the same training, twice: FlashAttention's backward pass sums in any order on a GPU."""
NAMES = ["llama", "gemma2", "mixtral"] if ON == "short" else list(MODULES)
T = 64
ROWS = [[17, 1, 46], [64], [1, 1, 1, 32, 29], [42, 22]]  # lengths of documents
PADDING = [0, 0, 5, 8]  # tokens at the end that are padding

if ON != "cuda":
    import varlen_kernel  # noqa: F401  (registers the operator on the CPU)


def device_of_tests() -> torch.device:
    """Return the device; skip where there is no GPU."""
    if ON == "cuda" and not torch.cuda.is_available():
        _skip("there is no GPU")
    return torch.device("cuda", 0) if ON == "cuda" else torch.device("cpu")


def needs_gpu(what: str) -> None:
    if ON != "cuda":
        _skip(f"{what} needs a GPU")


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        _skip(f"{package} is not installed")


def needs_grouped_matmuls(name: str, device: torch.device) -> None:
    """Skip mixtures of experts where torch computes grouped matmuls one by one, by the bounds that the host reads.

    By its source, that is on all but Hopper and the B200.
    """
    has_experts = hasattr(family(MODULES[name]).PRESETS["tiny"], "n_experts")
    if has_experts and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        _skip("on this GPU, torch's grouped matmuls wait for it")


def _skip(why: str) -> NoReturn:
    """Skip a test by its name, which `-rs` shows with the reason only."""
    pytest.skip(f"{os.environ['PYTEST_CURRENT_TEST'].split('::')[-1].split(' ')[0]}: {why}")


def tiny(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Return a model of a family's `tiny` preset with scores that differ, the same in each dtype and on each device.

    Tokens go to all experts: rounding then changes no choice of them.
    """
    module = family(MODULES[name])
    config = module.PRESETS["tiny"]
    if getattr(config, "window", None) is not None or name in ("llama", "mixtral", "phi3"):
        config = replace(config, window=7)
    if hasattr(config, "n_experts"):
        config = replace(config, n_active=config.n_experts)
    model = module.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data.mul_(1.0 if parameter.ndim == 1 else 3.0)
        parameter.data = parameter.data.bfloat16().float()  # so that bf16 changes no weight
    return model.to(dtype).to(device)


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return packed sequences with documents of one token, and padding."""
    return packed_batch(ROWS, PADDING, seed)


def ready(data: dict[str, Any], device: torch.device, name: str = "llama") -> dict[str, Any]:
    """Return a batch as training has it on a GPU; on a CPU, for the same kernel."""
    if device.type == "cuda":
        return on_device(data, device)
    return on_device(data, device, "flex" if name in FLEX else "varlen")


def without_labels(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "labels"}


def loss_and_gradients(model: Any, data: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss, and fp32 gradients on the CPU."""
    loss, _ = model.train()(**data)
    loss.backward()
    gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), gradients


def assert_logits(found: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor) -> None:
    """`assert_as_accurate` for logits on any device, of bf16 against fp32 on the CPU."""
    found, reference = (x.detach().cpu().bfloat16() for x in (found, reference))
    assert_as_accurate(found, reference, exact.detach().double())


def assert_gradients(found: dict, reference: dict, exact: dict) -> None:
    """`assert_gradients_as_accurate`; a bf16 gradient counts as off by two ulps of bf16 at least."""
    assert found.keys() == reference.keys() == exact.keys()
    rounded = {name: value * (1 + 2 * torch.finfo(torch.bfloat16).eps) for name, value in exact.items()}
    near = {
        n: v if (v - exact[n]).norm() > (rounded[n] - exact[n]).norm() else rounded[n] for n, v in reference.items()
    }
    assert_gradients_as_accurate(found, near, exact)


@contextlib.contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """On a GPU, let whatever waits for it raise an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def counted_syncs(device: torch.device) -> Iterator[list[str]]:
    """On a GPU, list the operations that waited for it, after this has ended."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]


def operators(run: Any, device: torch.device) -> set[str]:
    """Return the names of the operators and kernels that a call runs, by `torch.profiler`."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return {event.name for event in profile.events()}


def kernels_chosen(model: Any, data: dict[str, Any]) -> set[str]:
    with torch.no_grad(), attention.record_kernels() as kernels:
        model(**data)
    return set(kernels)
