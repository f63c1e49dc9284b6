"""Which operators a forward pass runs on a GPU, seen by fake tensors on CUDA: for torch's CUDA build, without a GPU."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from packed_batch import packed_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from litmini.config.finetune import LoraConfig
from litmini.generation.batch import prefill
from litmini.generation.decoding import finite_tokens
from litmini.methods import nf4
from litmini.methods.adapters import add_adapters
from litmini.methods.dora import DoRALinear
from litmini.methods.heads import head_name, use_log_probs, use_scores
from litmini.models import FAMILIES, family
from litmini.ops import cross_entropy, varlen
from litmini.ops.attention import Documents
from litmini.ops.cross_entropy import Targets
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


def tiny_on_cuda(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a model of a family's `tiny` preset, with fake weights."""
    module = family(MODULES[name])
    torch.set_default_dtype(dtype)
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
    for operator, results, _ in seen.calls if not states else ():  # a chunk of a recurrent layer has all T tokens
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


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_step_of_decoding_can_be_captured(monkeypatch, name, windowed):
    """For any family, whatever its kernel, nothing waits for the device, and no tensor is copied to it."""
    monkeypatch.setattr(varlen, "has_flash", lambda device, cache=False: device.type == "cuda")
    if windowed and getattr(family(MODULES[name]).PRESETS["tiny"], "window", None) is None:
        pytest.skip("this preset has no window")
    B, int64 = 4, {"dtype": torch.int64, "device": "cuda"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tiny_on_cuda(name)
        cache = KVCache(model.config, B, 200 if windowed else 64, torch.bfloat16, "cuda", chunk=9)
        with torch.inference_mode():
            prefill(model, torch.empty(B, 20, **int64), torch.empty(B, 20, **int64), cache)
            with Operators() as seen:
                logits = model(torch.empty(B, 1, **int64), torch.empty(B, 1, **int64), cache=cache)[:, -1].float()
                tokens = finite_tokens(logits.argmax(-1), logits)
    assert tokens.is_cuda and not {call[0] for call in seen.calls} & set(SYNCS)
    for operator, results, arguments in seen.calls:
        both = {one.device.type for one in (*results, *arguments) if one.dim()}  # numbers are read on the host
        assert len(both) < 2, operator


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast`, which is off where there is no GPU."""
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or torch.float16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


@pytest.mark.parametrize("head", ["frozen", "trained", "log-probabilities", "scores"])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "full"])
def test_the_loss_of_a_training_step_on_a_gpu(monkeypatch, method, precision, head):
    """What autocast and methods cast goes together, and the host waits for nothing."""
    if method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    monkeypatch.setattr(varlen, "has_flash", lambda device, cache=False: device.type == "cuda")
    monkeypatch.setattr(cross_entropy, "_fused_loss", lambda device: None)  # compiled code takes no dispatch mode
    monkeypatch.setattr(nf4, "_code", lambda device: torch.empty(256, device=device))
    data = packed_batch(ROWS, PADDING)
    documents, targets = Documents.of(data["documents"]), Targets.of(data["labels"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tiny_on_cuda("llama", torch.bfloat16 if precision == "bf16-true" else torch.float32)
        if method == "qlora":
            nf4.quantize_linears(model)
        if method != "full":
            add_adapters(model, LoraConfig(rank=4, dropout=0.1), DoRALinear if method == "dora" else None)
        model.get_submodule(head_name(model)).requires_grad_(head == "trained")
        if head == "log-probabilities":
            use_log_probs(model, temperature=0.7)
        elif head == "scores":
            use_scores(model, 3)
        labels = replace(targets.map(fake), gpu_memory=80 * 2**30)
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        with Operators() as seen, autocast(dtype):
            loss, _ = model.train()(fake(data["tokens"]), fake(data["positions"]), documents.map(fake), labels=labels)
    assert loss.dtype == torch.float32 and loss.is_cuda
    check(seen.calls, model.config.n_layers)
