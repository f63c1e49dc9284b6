"""Linear attention in chunks is the recurrence, token by token, of each document alone."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close, assert_gradients_close
from packed_batch import LENGTHS, documents_of

from litmini.ops.linear_attention import Runs, causal_conv, gated_delta_rule, make_runs

K_HEADS, V_HEADS, K_DIM, V_DIM = 2, 6, 8, 5


def inputs(T: int, B: int = 2) -> list[torch.Tensor]:
    """q, k, v, decay and beta; decays differ by orders of magnitude, and a state outlives several chunks."""
    shapes = ((K_HEADS, K_DIM), (K_HEADS, K_DIM), (V_HEADS, V_DIM), (V_HEADS,), (V_HEADS,))
    q, k, v, decay, beta = (torch.randn(B, T, *shape) for shape in shapes)
    return [q, k, v, -(2 * decay - 6).exp(), beta.sigmoid()]


def recurrence(q, k, v, decay, beta, state=None):
    """The definition in fp64: a state per value head, one token after the other."""
    q, k, v, decay, beta = (x.double() for x in (q, k, v, decay, beta))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(V_HEADS // K_HEADS, 2) for x in (q, k))
    S = v.new_zeros(len(v), V_HEADS, K_DIM, V_DIM) if state is None else state.double()
    outputs = []
    for t in range(v.shape[1]):
        S = S * decay[:, t, :, None, None].exp()
        delta = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], delta)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / K_DIM**0.5)
    return torch.stack(outputs, 1).float(), S.float()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_chunks_are_the_recurrence_of_each_document(lengths):
    found = inputs(sum(lengths))
    expected = [x.clone().requires_grad_() for x in found]
    found = [x.requires_grad_() for x in found]
    runs = Runs(torch.zeros(2, sum(lengths), dtype=torch.int64), documents_of(lengths))
    y, _ = gated_delta_rule(*found, runs)
    parts = [recurrence(*part)[0] for part in zip(*(x.split(lengths, 1) for x in expected), strict=True)]
    assert_close(y, torch.cat(parts, 1))
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (torch.cat(parts, 1) * weight).sum().backward()
    names = ("q", "k", "v", "decay", "beta")
    assert_gradients_close(*({n: x.grad for n, x in zip(names, xs, strict=True)} for xs in (found, expected)))


@pytest.mark.parametrize("T", [1, 5, 64, 130])
def test_state_goes_in_and_out(T):
    tensors, state = inputs(T), torch.randn(2, V_HEADS, K_DIM, V_DIM)
    positions = torch.arange(T).expand(2, T)
    for grad in (True, False):  # without gradients, a single token is a step
        with torch.set_grad_enabled(grad):
            found = gated_delta_rule(*tensors, Runs(positions), state)
        for mine, exact in zip(found, recurrence(*tensors, state), strict=True):
            assert_close(mine, exact)


def test_a_decay_of_everything_is_finite():
    """exp(-inf) and its gradient: a state that is forgotten at once."""
    tensors = inputs(70)
    tensors[3] = (tensors[3] * 1e4).requires_grad_()
    y, state = gated_delta_rule(*tensors, Runs(torch.arange(70).expand(2, -1)))
    (y.sum() + state.sum()).backward()
    assert y.isfinite().all() and tensors[3].grad.isfinite().all()


def test_autocast_leaves_states_in_fp32():
    tensors, runs = inputs(70), Runs(torch.arange(70).expand(2, -1))
    expected = gated_delta_rule(*tensors, runs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_delta_rule(*tensors, runs)
    assert all(torch.equal(mine, exact) for mine, exact in zip(found, expected, strict=True))


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_convolution_of_each_document(lengths, K):
    x, weight = torch.randn(2, sum(lengths), 6, requires_grad=True), torch.randn(6, 1, K, requires_grad=True)
    weighted = torch.randn_like(x)
    y, _ = causal_conv(x, weight, Runs(torch.zeros(2, sum(lengths)), documents_of(lengths)))
    found = torch.autograd.grad((y * weighted).sum(), (x, weight))
    parts = [F.conv1d(F.pad(part.mT, (K - 1, 0)), weight, groups=6).mT for part in x.split(lengths, 1)]
    expected = torch.autograd.grad((torch.cat(parts, 1) * weighted).sum(), (x, weight))
    assert_close(y, torch.cat(parts, 1))
    for mine, exact in zip(found, expected, strict=True):
        assert_close(mine, exact)


def test_padding_without_documents_is_a_run_of_its_own():
    positions = torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]])
    assert make_runs(positions, None, None).ids.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert make_runs(positions[1:], None, None).ids is None
