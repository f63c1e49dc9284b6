"""The scan of Mamba2 in chunks is the recurrence, token by token, of each document alone."""

import pytest
import torch
from numerics import assert_close, assert_gradients_close, ulps
from test_linear_attention import LENGTHS, documents_of

from litmini.models import granite_hybrid, mamba2
from litmini.ops.kv_cache import KVCache
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


@pytest.fixture(params=[granite_hybrid, mamba2], ids=["granite_hybrid", "mamba2"])
def model(request):
    """A tiny model whose states matter: its tokens are far from forgotten."""
    module = request.param
    model = module.Model(module.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        if name.endswith("A_log"):
            parameter.data.sub_(3)
    return model.eval()


def test_packing_with_padding_on_both_sides(model):
    """Padding, documents of one token and documents shorter than the kernel; loss and gradients."""
    lengths = [3, 1, 2, 70, 1, 40]
    tokens = torch.randint(0, 512, (1, 4 + sum(lengths) + 9))
    documents = torch.zeros_like(tokens)
    documents[:, 4:-9] = documents_of(lengths, 1)
    positions = torch.cat([torch.full((4,), -1), *map(torch.arange, lengths), torch.full((9,), -1)])[None]
    labels = torch.randint(0, 512, tokens.shape).masked_fill(documents == 0, -100)
    loss, count = model(tokens, positions, documents, labels=labels)
    loss.backward()
    packed = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    apart = [
        model(t, labels=want)
        for t, want in zip(tokens[:, 4:-9].split(lengths, 1), labels[:, 4:-9].split(lengths, 1), strict=True)
    ]
    assert count == sum(int(n) for _, n in apart)
    total = sum(one for one, _ in apart)
    total.backward()
    assert_close(loss, total)
    assert_gradients_close(packed, {name: p.grad for name, p in model.named_parameters()})


def test_no_gradient_crosses_a_bound(model):
    """The loss of one document does not depend on the tokens of the others, but for rounding of what cancels."""
    tokens, lengths = torch.randperm(512)[None, :75], [20, 30, 25]
    documents, positions = documents_of(lengths, 1), torch.cat([torch.arange(n) for n in lengths])[None]
    labels = torch.full_like(tokens, -100)
    labels[:, 20:50] = 7
    embedding = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    if getattr(model.config, "tied", False):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    loss, _ = model(tokens, positions, documents, labels=labels)
    loss.backward()
    norms = embedding.weight.grad.norm(dim=1)[tokens[0]]
    assert max(norms[:20].max(), norms[50:].max()) < ulps(scale=norms[20:50].min())
    model.zero_grad()
    model(tokens, labels=labels)[0].backward()  # as one document, it does
    assert embedding.weight.grad.norm(dim=1)[tokens[0]][:20].max() > 1e-3 * norms.max()


@pytest.mark.parametrize("static", [False, True])
def test_sequences_of_different_lengths_and_padding_after_tokens(model, static):
    """Padding on the left before a sequence begins, and before it goes on."""
    tokens = torch.randint(0, 512, (2, 12))
    cache = KVCache(model.config, 2, 20, torch.float32, static=static)
    parts = [([0, 1, 2, 3], [-1, -1, -1, 0]), ([4, 5, 6], [-1, 1, 2]), ([7, 8], [-1, -1]), ([9], [3])]
    found: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for where in parts:
            positions = torch.tensor(where)
            ids = tokens.gather(1, positions.clamp(min=0))
            logits = model(ids, positions, cache=cache)
            for row in range(2):
                found[row] += list(logits[row, positions[row] >= 0])
        for row, expected in enumerate(model(tokens)):
            assert_close(torch.stack(found[row]), expected[: len(found[row])])
