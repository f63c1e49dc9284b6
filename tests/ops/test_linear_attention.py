"""Linear attention in chunks is the recurrence, token by token, of each document alone."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close, assert_gradients_close, ulps

from litmini.models import qwen3_5
from litmini.ops.kv_cache import KVCache
from litmini.ops.linear_attention import Runs, causal_conv, gated_delta_rule, make_runs

K_HEADS, V_HEADS, K_DIM, V_DIM = 2, 6, 8, 5
LENGTHS = {
    "one": [150],
    "bounds inside a chunk": [30, 1, 1, 2, 3, 60, 70, 1],
    "bounds between chunks": [64, 128, 1],
    "shorter than a chunk": [1, 7, 2],
}


def inputs(T: int, B: int = 2) -> list[torch.Tensor]:
    """q, k, v, decay and beta; decays differ by orders of magnitude, and a state outlives several chunks."""
    shapes = ((K_HEADS, K_DIM), (K_HEADS, K_DIM), (V_HEADS, V_DIM), (V_HEADS,), (V_HEADS,))
    q, k, v, decay, beta = (torch.randn(B, T, *shape) for shape in shapes)
    return [q, k, v, -(2 * decay - 6).exp(), beta.sigmoid()]


def documents_of(lengths: list[int], B: int = 2) -> torch.Tensor:
    return torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)]).expand(B, -1)


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


@pytest.fixture
def model():
    """A tiny model whose states matter."""
    model = qwen3_5.Model(qwen3_5.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
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
    loss, _ = model(tokens, positions, documents, labels=labels)
    loss.backward()
    norms = model.model["embed_tokens"].weight.grad.norm(dim=1)[tokens[0]]
    assert max(norms[:20].max(), norms[50:].max()) < ulps(scale=norms[20:50].min())


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


@pytest.mark.parametrize("static", [False, True])
def test_a_sequence_continues_from_where_the_last_forward_began(model, static):
    tokens, other = torch.randint(0, 512, (2, 1, 10))
    cache = KVCache(model.config, 1, 20, torch.float32, static=static)

    def read(ids: torch.Tensor, start: int) -> torch.Tensor:
        return model(ids, torch.arange(start, start + ids.shape[1])[None], cache=cache)

    with torch.no_grad():
        expected = model(tokens)
        read(tokens[:, :4], 0)
        read(other[:, 4:9], 4)  # rejected
        assert cache.resume(9) == 9 and cache.resume(8) == 4 and cache.resume(3) == 0
        assert_close(read(tokens[:, 4:], 4), expected[:, 4:])
        assert_close(read(tokens, 0), expected)  # from the start: always
        if static:
            assert read(tokens[:, 6:], 6).isnan().all()
        else:
            with pytest.raises(ValueError, match=r"states of \[\[10\], \[0\]\] tokens cannot continue at \[6\]"):
                read(tokens[:, 6:], 6)


def test_padding_without_documents_is_a_run_of_its_own():
    positions = torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3]])
    assert make_runs(positions, None, None).ids.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert make_runs(positions[1:], None, None).ids is None
