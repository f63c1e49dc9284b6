"""The loss, whose elementwise part is compiled on a GPU, and greedy decoding."""

import pytest
import torch
from gpu_parts import counted_syncs, device_of_tests, needs_gpu, needs_grouped_matmuls, tiny
from numerics import assert_as_accurate
from torch import nn

from litmini.config.generate import SamplingConfig
from litmini.generation import decoding
from litmini.generation.batch import Batch
from litmini.generation.generate import finish_all
from litmini.generation.request import Request
from litmini.ops.cross_entropy import Targets, ZLossHead, linear_cross_entropy

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    return device_of_tests()


def loss_of(dtype: torch.dtype, device: torch.device, softcap: float | None, z: float) -> list[torch.Tensor]:
    """Return the loss and the gradients of hidden states and of the trained head."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(64, 1000, bias=False), torch.randn(2, 300, 64)
    labels = torch.randint(0, 1000, (2, 300)).masked_fill(torch.rand(2, 300) < 0.3, -100)
    head.weight.data.copy_(torch.randn(1000, 64))
    for values in (head.weight.data, hidden):
        values.copy_(values.bfloat16())
    head, hidden = head.to(device, dtype), hidden.to(device, dtype).requires_grad_()
    targets = Targets.of(labels, device).map(lambda tensor: tensor.to(device))
    loss, count = linear_cross_entropy(hidden, ZLossHead(head, z) if z else head, targets, softcap)
    assert int(count) == int((labels != -100).sum())
    loss.backward()
    return [x.detach().float().cpu() for x in (loss, hidden.grad, head.weight.grad)]


@pytest.mark.parametrize(("softcap", "z"), [(None, 0.0), (30.0, 0.0), (None, 1e-3)])
def test_loss_and_gradients(softcap, z, device):
    exact = loss_of(torch.float32, torch.device("cpu"), softcap, z)
    reference = loss_of(torch.bfloat16, torch.device("cpu"), softcap, z)
    found = loss_of(torch.bfloat16, device, softcap, z)
    for ours, theirs, right in zip(found, reference, exact, strict=True):
        assert_as_accurate(ours.bfloat16(), theirs.bfloat16(), right.double())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("lengths", [[12], [3, 30, 11]])
def test_greedy_decoding_takes_the_largest_logits(name, lengths, device):
    """In batches of prompts of unequal length, windows exceeded: up to what bf16 rounds."""
    model, generator = tiny(name, torch.bfloat16, device).eval(), torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 500, (length,), generator=generator).tolist() for length in lengths]
    requests = [Request(prompt, SamplingConfig(max_new_tokens=24, ignore_eos=True), []) for prompt in prompts]
    finish_all(model, requests)
    exact = tiny(name, torch.float32).eval()
    for prompt, request in zip(prompts, requests, strict=True):
        assert len(request.ids) == 24
        with torch.no_grad():
            logits = exact(torch.tensor([prompt + request.ids]))[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(request.ids)[:, None])[:, 0]
        assert float((logits.amax(1) - chosen).max()) < 0.1 * float(logits.std())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral"])
def test_a_graph_decodes_what_its_kernels_do(name, device, monkeypatch):
    """The same tokens with CUDA graphs and without, sampled and greedy, also when requests have left and another graph takes
    the memory of the one before; the host waits once for eight of them."""
    needs_gpu("a CUDA graph")
    needs_grouped_matmuls(name, device)
    settings = [{}, {"temperature": 1.2, "seed": 1, "top_p": 0.9}, {"repetition_penalty": 1.3}]

    def decode() -> tuple[list[list[int]], list[str]]:
        model = tiny(name, torch.bfloat16, device).eval()
        lengths = [{"max_new_tokens": 33 + 12 * i, **s} for i, s in enumerate(settings)]
        requests = [Request([5, 6, 7 + i], SamplingConfig(**s), []) for i, s in enumerate(lengths)]
        batch = Batch(model)
        batch.add(requests)
        batch.step()
        with counted_syncs(device) as syncs:
            batch.step()
        while batch.requests:
            batch.step()
        return [request.ids for request in requests], syncs

    captured, syncs = decode()
    assert len(syncs) == 1, syncs
    monkeypatch.setattr(decoding, "capture", lambda function, device, before: function)
    assert decode()[0] == captured
