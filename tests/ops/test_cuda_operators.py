"""Which operators a forward pass runs on a GPU, seen by fake tensors on CUDA: for torch's CUDA build, without a GPU."""

from typing import Any

import pytest
import torch
from packed_batch import packed_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from litmini.models import FAMILIES, family
from litmini.ops import varlen
from litmini.ops.attention import Documents
from litmini.ops.kv_cache import KVCache

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
MODULES = {name.rsplit(".", 1)[-1]: model_type for model_type, name in reversed(FAMILIES.items())}  # one type each
ROWS, PADDING = [[47, 1, 42, 10], [100], [1, 1, 1, 82, 15], [92, 8]], [0, 0, 5, 8]
T = 100  # more than a chunk of recurrent layers
COMPILED = ("gemma2", "gpt_oss", "mpt")  # FlexAttention is compiled, where no dispatch mode may be active
SYNCS = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique")


class Operators(TorchDispatchMode):
    """Records name, results and arguments of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.Tensor], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        tensors = [[one for one in some if isinstance(one, torch.Tensor)] for some in (found, args)]
        self.calls.append((str(func.overloadpacket).split(".")[-1], *tensors))
        return result


def fake(values: torch.Tensor) -> torch.Tensor:
    return torch.empty(values.shape, dtype=values.dtype, device="cuda")


def tiny_on_cuda(name: str) -> Any:
    """Return a model of a family's `tiny` preset in bf16, with fake weights."""
    module = family(MODULES[name])
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return module.Model(module.PRESETS["tiny"]).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def check(calls: list[tuple[str, list[torch.Tensor], list[torch.Tensor]]], n_layers: int) -> None:
    """Assert that FlashAttention ran once a layer, and that nothing read a value on the host."""
    names = [call[0] for call in calls]
    assert names.count("_varlen_attn") == n_layers
    assert not set(names) & set(SYNCS)
    for operator, results, arguments in calls:
        assert {one.device.type for one in arguments} != {"cuda"} or all(one.is_cuda for one in results), operator


@pytest.mark.parametrize("name", [name for name in MODULES if name not in COMPILED])
def test_a_packed_batch_on_a_gpu(monkeypatch, name):
    """FlashAttention's varlen in each layer; no mask, no copy to the host, no shape that depends on data."""
    monkeypatch.setattr(varlen, "has_flash", lambda device, cache=False: device.type == "cuda")
    data = packed_batch(ROWS, PADDING)
    known = Documents.of(data["documents"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tiny_on_cuda(name)
        with Operators() as seen, torch.no_grad():
            model(fake(data["tokens"]), fake(data["positions"]), known.map(fake))
    states = sum(hasattr(module, "state_size") for module in model.modules())
    check(seen.calls, model.config.n_layers - states)
    for operator, results, _ in seen.calls:
        assert not [one.shape for one in results if one.shape[-2:] == (T, T)], operator


@pytest.mark.parametrize("name", ["llama", "qwen3", "falcon"])
def test_decoding_with_a_static_cache_on_a_gpu(monkeypatch, name):
    """A prompt, and a token for each of several sequences at positions that the host does not know."""
    monkeypatch.setattr(varlen, "has_flash", lambda device, cache=False: device.type == "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tiny_on_cuda(name)
        cache = KVCache(model.config, 4, 64, torch.bfloat16, "cuda")
        for T, positions in ((9, None), (1, torch.empty(4, 1, dtype=torch.int64, device="cuda"))):
            with Operators() as seen, torch.no_grad():
                model(torch.empty(4, T, dtype=torch.int64, device="cuda"), positions, cache=cache)
            check(seen.calls, model.config.n_layers)
