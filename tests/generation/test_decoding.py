"""Decoding as on a GPU, with stand-ins: static caches, several tokens before the host looks, graphs of one step."""

import contextlib
import gc
import weakref

import cuda_graph
import pytest
import torch
import varlen_kernel
from cuda_graph import NoWaits
from test_neighbours import SETTINGS, VARIANTS, finish, lively, requests, same, step
from torch import nn

from litmini.config.generate import SamplingConfig
from litmini.generation import decoding
from litmini.generation.batch import Batch
from litmini.generation.multi_adapter import MultiLoRA
from litmini.generation.request import Request
from litmini.generation.speculative import PromptLookup
from litmini.models import FAMILIES, family, llama
from litmini.ops import varlen
from litmini.ops.attention import record_kernels
from litmini.ops.kv_cache import KVCache

FLEX = {"mpt", "gemma2"}


@pytest.fixture
def on_gpu(monkeypatch):
    """Let batches take the path of GPUs, with FlashAttention in fp32."""
    for module in ("batch", "decoding"):
        monkeypatch.setattr(f"litmini.generation.{module}.is_gpu", lambda device: True)
    monkeypatch.setattr(decoding, "capture", cuda_graph.capture)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    cuda_graph.graphs.clear()


@pytest.fixture(params=[*dict.fromkeys(FAMILIES.values()), *VARIANTS])
def model(request) -> nn.Module:
    names = {module: name for name, module in reversed(FAMILIES.items())}
    return lively(VARIANTS.get(request.param) or family(names[request.param]).PRESETS["tiny"])


def test_requests_are_completed_as_on_a_cpu(model, monkeypatch, request):
    expected = requests()
    for one in expected.values():
        batch = Batch(model)
        batch.add([one])
        finish(batch)
    request.getfixturevalue("on_gpu")
    name = request.node.callspec.params["model"]
    together, coming = requests(), requests()
    with record_kernels() as kernels:
        batch = Batch(model)
        batch.add([one for key, one in together.items() if key not in ("logprobs", "limit")])
        finish(batch)
        batch = Batch(model)
        for one in coming.values():  # one after each step, while others leave
            batch.add([one])
            step(batch, 1)
        finish(batch)
    together |= {key: coming[key] for key in ("logprobs", "limit")}
    different = [
        key for key in SETTINGS if not same(together[key], expected[key]) or not same(coming[key], expected[key])
    ]
    assert not different
    has_states_only = name.rpartition(".")[2] == "mamba2"
    assert "varlen" in kernels or has_states_only or name.rpartition(".")[2] in FLEX or model.config.window
    assert max(graph.replays for graph in cuda_graph.graphs) >= 8


@pytest.mark.parametrize("windowed", [False, True])
def test_the_host_waits_once_for_several_tokens(on_gpu, monkeypatch, windowed):
    """Penalties, temperatures and all else are computed without it; what is read at the end is the only wait."""
    model, reads = lively(VARIANTS["mistral-window"] if windowed else llama.PRESETS["tiny"]), []
    batch = Batch(model)
    batch.add([Request([5, 6, 7, 8 + i], SamplingConfig(max_new_tokens=40, **SETTINGS[n]), []) for i, n in enumerate(
        ("greedy", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "everything"))])  # fmt: skip
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or plain(tensor))
    for tokens in (9, 17, 25):
        with NoWaits() if tokens > 9 else contextlib.nullcontext():  # the first step makes the state on the device
            batch.step()
        assert {len(r.ids) for r in batch.requests} == {tokens}
    assert [shape for shape in reads if shape[0] == 7 and len(shape) > 1] == [(7, 8)] * 3
    assert len(cuda_graph.graphs) == 1 and cuda_graph.graphs[0].replays == 24


def test_only_rows_that_are_not_finite_fail(on_gpu):
    model, poison = lively(llama.PRESETS["tiny"]), 509
    model.model["embed_tokens"].register_forward_hook(
        lambda _, args, y: y.masked_fill((args[0] == poison)[..., None], torch.nan)
    )
    good, bad = (Request([3, 4, token], SamplingConfig(max_new_tokens=30), []) for token in (5, poison))
    batch = Batch(model)
    batch.add([good, bad])
    finish(batch)
    assert "not finite" in str(bad.error) and bad.ids == [] and len(good.ids) == 30
    alone = Request([3, 4, 5], SamplingConfig(max_new_tokens=30), [])
    batch.add([alone])
    finish(batch)
    assert alone.ids == good.ids


def test_a_draft_and_adapters_take_no_graph(on_gpu, monkeypatch):
    model = lively(llama.PRESETS["tiny"])
    plain, drafted, adapted = (Request([3, 4, 5, 3, 4], SamplingConfig(max_new_tokens=30), []) for _ in range(3))
    for request, options in (
        (plain, {}),
        (drafted, {"draft": PromptLookup(3)}),
        (adapted, {"multi_lora": MultiLoRA(model)}),
    ):
        graphs = len(cuda_graph.graphs)
        batch = Batch(model, **options)
        batch.add([request])
        finish(batch)
        assert len(cuda_graph.graphs) == graphs + (request is plain)
    assert plain.ids == drafted.ids == adapted.ids


def test_a_model_that_cannot_be_captured_decodes_without_a_graph(on_gpu, monkeypatch):
    model = lively(llama.PRESETS["tiny"])
    expected = Request([3, 4, 5], SamplingConfig(max_new_tokens=20), [])
    batch = Batch(model)
    batch.add([expected])
    finish(batch)
    plain = model.forward

    def waits(*args, **kwargs):
        assert args[0].max().item() < 512
        return plain(*args, **kwargs)

    monkeypatch.setattr(model, "forward", waits)
    found = Request([3, 4, 5], SamplingConfig(max_new_tokens=20), [])
    batch.add([found])
    with pytest.warns(UserWarning, match="without a CUDA graph, which this model does not allow: .* item"):
        finish(batch)
    assert found.ids == expected.ids


def test_a_static_cache_of_known_positions_says_when_it_is_full():
    config = llama.PRESETS["tiny"]
    model = lively(config)
    cache = KVCache(config, 1, 6, torch.float32, static=True)
    with torch.inference_mode():
        model(torch.ones(1, 4, dtype=torch.int64), cache=cache)
        with pytest.raises(ValueError, match="the cache holds 6 tokens, 7 are needed"):
            model(torch.ones(1, 3, dtype=torch.int64), cache=cache)


def test_caches_are_rearranged_without_reading_numbers(monkeypatch):
    """A GPU would have the host wait for one of each sequence."""
    model = lively(llama.PRESETS["tiny"])
    cache = KVCache(model.config, 3, [9, 8, 7], torch.float32, static=True)
    with torch.inference_mode():
        model(torch.ones(3, 4, dtype=torch.int64), cache=cache)
        monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: pytest.fail("a number is read"))
        gathered = KVCache.gather(model.config, [(cache, 0, 4), (cache, 2, 3)])
    assert gathered.capacities.flatten().tolist() == [9, 7] and gathered.capacity == 9


@pytest.mark.parametrize("name", ["falcon", "qwen3", "gemma"])
def test_prompts_of_unequal_length_are_read_by_flash_attention(on_gpu, name):
    """No mask is made, and the keys of each sequence are read where they lie in the cache."""
    model = lively(family(name).PRESETS["tiny"])
    batch = Batch(model, chunk=8)
    varlen_kernel.calls.clear()
    with record_kernels() as kernels:
        batch.add([Request(list(range(3, 3 + n)), SamplingConfig(max_new_tokens=2), []) for n in (20, 3, 11)])
        finish(batch)
    assert kernels == {"varlen"}
    # parts of 8, 8 and 3 tokens; sequences that have not begun are padding; then one token
    assert [call["documents"] for call in varlen_kernel.calls[:: model.config.n_layers]] == [3, 4, 4, 3]


def test_a_model_that_cannot_be_captured_is_not_tried_again(on_gpu, monkeypatch):
    """Of a capture that fails, torch keeps memory."""
    tried = []

    def fails(function, device, before):
        tried.append(device)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "capture", fails)
    model = lively(llama.PRESETS["tiny"])
    for _ in range(2):
        batch = Batch(model)
        batch.add([Request([3, 4, 5], SamplingConfig(max_new_tokens=n), []) for n in (12, 30)])
        with pytest.warns(UserWarning, match="not permitted") if not tried else contextlib.nullcontext():
            finish(batch)
    assert tried == [torch.device("cpu")]


def test_memory_that_does_not_suffice_once_may_suffice_for_the_next_batch(on_gpu, monkeypatch):
    def fails(function, device, before):
        raise torch.OutOfMemoryError("CUDA out of memory")

    batch = Batch(lively(llama.PRESETS["tiny"]))
    for _ in range(2):
        request = Request([3, 4, 5], SamplingConfig(max_new_tokens=12), [])
        batch.add([request])
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="memory does not suffice"):
            patch.setattr(decoding, "capture", fails)
            batch.step()
        finish(batch)
        assert len(request.ids) == 12
    batch.add([Request([3, 4, 5], SamplingConfig(max_new_tokens=12), [])])
    finish(batch)
    assert len(cuda_graph.graphs) == 1


class FakeStreams:
    """`torch.cuda` as far as a capture uses it; `log` says what happened, in order."""

    def __init__(self, monkeypatch, refused: bool = False) -> None:
        self.log, self.device, self.refused = [], "cuda:0", refused
        for name, own in {
            "Stream": lambda device: FakeStream(self, f"side of {device}"),
            "current_stream": lambda device: FakeStream(self, f"current of {device}"),
            "stream": self.stream,
            "CUDAGraph": lambda: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, own)
        decoding._side_stream.cache_clear()

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.device = self.device, stream.name
        yield
        self.device = before

    def capture_begin(self, pool: int | None, capture_error_mode: str) -> None:
        self.log.append(f"begin on {self.device} with pool {pool}")

    def pool(self) -> int:
        return 7

    def capture_end(self) -> None:
        self.log.append("end")
        if self.refused:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.log.append("replay")


class FakeStream:
    def __init__(self, cuda: FakeStreams, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


def test_a_capture_is_on_the_device_of_the_model(monkeypatch):
    """Else nothing of it would be captured, and each replay would give the same logits."""
    cuda, device = FakeStreams(monkeypatch), torch.device("cuda:1")
    replay = decoding.capture(lambda: cuda.log.append(f"runs on {cuda.device}") or torch.ones(1), device)
    assert replay() == 1
    assert cuda.log == [
        "side of cuda:1 waits for current of cuda:1",
        "runs on side of cuda:1",
        "begin on side of cuda:1 with pool None",
        "runs on side of cuda:1",
        "end",
        "current of cuda:1 waits for side of cuda:1",
        "replay",
    ]
    decoding.capture(lambda: torch.ones(1), device, before=replay)
    assert cuda.log[-3] == "begin on side of cuda:1 with pool 7"
    assert decoding._side_stream(device, 1) is decoding._side_stream(device, 1)
    assert decoding._side_stream(device, 1) is not decoding._side_stream(device, 2)
    decoding._side_stream.cache_clear()


def test_a_capture_that_fails_says_why_and_is_waited_for(monkeypatch):
    """Its first call has changed the states of recurrent layers."""
    cuda, calls = FakeStreams(monkeypatch, refused=True), []

    def function() -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("what is not permitted")
        return torch.ones(1)

    with pytest.raises(RuntimeError, match="what is not permitted"):
        decoding.capture(function, torch.device("cuda:0"))
    assert cuda.log[-2:] == ["end", "current of cuda:0 waits for side of cuda:0"]
    decoding._side_stream.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_caches_that_are_no_more_wait_for_no_garbage_collector(device, request):
    """It knows nothing of the memory of a GPU, so it would come too late."""
    if device == "gpu":
        request.getfixturevalue("on_gpu")
    model, caches = lively(llama.PRESETS["tiny"]), []
    batch = Batch(model, multi_lora=MultiLoRA(model))
    gc.disable()
    try:
        for prompt in ([3, 4, 5], [6, 7], [8]):
            batch.add([Request(prompt, SamplingConfig(max_new_tokens=20), [])])
            batch.step()
            caches.append(weakref.ref(batch.cache))
        assert [cache() is None for cache in caches] == [True, True, False]
        finish(batch)
        assert caches[-1]() is None
    finally:
        gc.enable()


def test_under_autocast_the_cache_is_in_16_bits(on_gpu, monkeypatch):
    """As in training with `bf16-mixed`: FlashAttention has no fp32, and what has takes the keys of each query head apart."""
    monkeypatch.setattr(varlen, "DTYPES", (torch.bfloat16,))
    model = lively(llama.PRESETS["tiny"])
    request = Request([3, 4, 5], SamplingConfig(max_new_tokens=20), [])
    with torch.autocast("cpu", torch.bfloat16), record_kernels() as kernels:
        batch = Batch(model)
        batch.add([request])
        assert batch.cache[0].keys.dtype == torch.bfloat16
        finish(batch)
    assert kernels == {"varlen"} and len(request.ids) == 20 and cuda_graph.graphs


def test_a_graph_takes_the_memory_of_the_one_before(on_gpu, monkeypatch):
    """When requests join or leave; torch would keep that of all until memory is out."""
    given = []

    def captured(function, device, before):
        given.append((cuda_graph.capture(function, device), before))
        return given[-1][0]

    monkeypatch.setattr(decoding, "capture", captured)
    batch = Batch(lively(llama.PRESETS["tiny"]))
    for prompt in ([3, 4, 5], [6, 7], [8]):
        batch.add([Request(prompt, SamplingConfig(max_new_tokens=40), [])])
        batch.step()
    graphs = [graph for graph, _ in given]
    assert [before for _, before in given] == [None, *graphs[:-1]] and len(graphs) == 3
