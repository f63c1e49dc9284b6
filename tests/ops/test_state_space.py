"""The scan of Mamba2 in chunks is the recurrence, token by token, of each document alone."""

import pytest
import torch
from numerics import assert_close, assert_gradients_close
from packed_batch import LENGTHS, documents_of

from litmini.ops.linear_attention import Runs
from litmini.ops.state_space import state_space_scan

HEADS, HEAD_DIM, GROUPS, STATE = 6, 5, 2, 8
NAMES = ("x", "dt", "a", "b", "c", "d")


def inputs(T: int, B: int = 2) -> list[torch.Tensor]:
    """x, dt, a, b, c and d; decays differ by orders of magnitude, and a state outlives several chunks."""
    shapes = ((B, T, HEADS, HEAD_DIM), (B, T, HEADS), (HEADS,), (B, T, GROUPS, STATE), (B, T, GROUPS, STATE), (HEADS,))
    x, dt, a, b, c, d = (torch.randn(*shape) for shape in shapes)
    return [x, (2 * dt - 3).exp(), -a.exp(), b, c, d]


def recurrence(x, dt, a, b, c, d, state=None):
    """The definition in fp64: a state per head, one token after the other."""
    x, dt, a, b, c, d = (one.double() for one in (x, dt, a, b, c, d))
    b, c = (one.repeat_interleave(HEADS // GROUPS, 2) for one in (b, c))
    S = x.new_zeros(len(x), HEADS, STATE, HEAD_DIM) if state is None else state.double()
    outputs = []
    for t in range(x.shape[1]):
        S = S * (dt[:, t] * a).exp()[..., None, None]
        S = S + torch.einsum("bhn,bhp->bhnp", b[:, t], dt[:, t, :, None] * x[:, t])
        outputs.append(torch.einsum("bhn,bhnp->bhp", c[:, t], S) + d[:, None] * x[:, t])
    return torch.stack(outputs, 1).float(), S.float()


def split(tensors: list[torch.Tensor], lengths: list[int]) -> list[list[torch.Tensor]]:
    """The arguments of each document; a and d have no tokens."""
    parts = [one.split(lengths, 1) if one.dim() > 1 else [one] * len(lengths) for one in tensors]
    return [list(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_chunks_are_the_recurrence_of_each_document(lengths):
    found = inputs(sum(lengths))
    expected = [one.clone().requires_grad_() for one in found]
    found = [one.requires_grad_() for one in found]
    runs = Runs(torch.zeros(2, sum(lengths), dtype=torch.int64), documents_of(lengths))
    y, _ = state_space_scan(*found, runs)
    exact = torch.cat([recurrence(*part)[0] for part in split(expected, lengths)], 1)
    assert_close(y, exact)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (exact * weight).sum().backward()
    assert_gradients_close(*({n: one.grad for n, one in zip(NAMES, ones, strict=True)} for ones in (found, expected)))


@pytest.mark.parametrize("T", [1, 5, 64, 130])
def test_state_goes_in_and_out(T):
    tensors, state = inputs(T), torch.randn(2, HEADS, STATE, HEAD_DIM)
    positions = torch.arange(T).expand(2, T)
    for grad in (True, False):  # without gradients, a single token is a step
        with torch.set_grad_enabled(grad):
            found = state_space_scan(*tensors, Runs(positions), state)
        for mine, exact in zip(found, recurrence(*tensors, state), strict=True):
            assert_close(mine, exact)


def test_padding_leaves_the_state_as_it_is_whatever_it_holds():
    tensors, state = inputs(9), torch.randn(2, HEADS, STATE, HEAD_DIM)
    positions = torch.tensor([[-1] * 4 + [*range(5)], [*range(9)]])
    expected = [state_space_scan(*part, Runs(positions), state) for part in split(tensors, [4, 5])]
    for one in tensors:
        if one.dim() > 1:
            one[0, :4] = torch.inf
    y, last = state_space_scan(*tensors, Runs(positions, padded=True), state)
    assert_close(y[0, 4:], expected[1][0][0])
    assert_close(last[0], expected[1][1][0])
    row = [one[1:] if one.dim() > 1 else one for one in tensors]
    for mine, alone in zip((y, last), state_space_scan(*row, Runs(positions[1:]), state[1:]), strict=True):
        assert_close(mine[1:], alone)


def test_a_decay_of_everything_is_finite():
    """exp(-inf) and its gradient: a state that is forgotten at once."""
    tensors = inputs(70)
    tensors[2] = (tensors[2] * 1e5).requires_grad_()
    y, state = state_space_scan(*tensors, Runs(torch.arange(70).expand(2, -1)))
    (y.sum() + state.sum()).backward()
    assert y.isfinite().all() and tensors[2].grad.isfinite().all()


def test_autocast_leaves_states_in_fp32():
    tensors, runs = inputs(70), Runs(torch.arange(70).expand(2, -1))
    expected = state_space_scan(*tensors, runs)
    with torch.autocast("cpu", torch.bfloat16):
        found = state_space_scan(*tensors, runs)
    assert all(torch.equal(mine, exact) for mine, exact in zip(found, expected, strict=True))
    rounded = [one.bfloat16() for one in tensors]
    y, state = state_space_scan(*rounded, runs)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close(state, recurrence(*rounded)[1])
