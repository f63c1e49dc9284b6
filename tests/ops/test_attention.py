"""Who sees whom: packed documents, windows, caches and kernels against a definition by brute force."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_as_accurate, assert_gradients_close, ulps

import litmini.ops.cpu_attention as cpu_attention
import litmini.ops.prompt_attention as prompt_attention
from litmini.models import llama
from litmini.ops.attention import Mask, attend, make_mask
from litmini.ops.cpu_attention import ALIGN, _Repack, _round_up, _Unpack, allowed_keys, pad_documents
from litmini.ops.kv_cache import KVCache

ROWS = [[5, 1, 9, 9, 13], [37], [1, 2, 3, 4, 5, 6, 7, 9], [20, 17]]  # lengths of the documents in each row
PADDING = [0, 0, 0, 3]  # how many tokens at the end of the last documents are padding, document 0
T, HEAD_DIM = 37, 8
HEADS = [(4, 2), (3, 3), (6, 1), (6, 2)]
FP64 = {"rtol": 0, "atol": 1e-10}  # values of order 1, computed in fp64: 450,000 ulps; some gradients are 0


CAUSAL = Mask(torch.arange(T)[None], torch.arange(T)[None])


@pytest.fixture(params=["explicit", "sdpa", "both"])
def kernel(request, monkeypatch) -> str:
    """Which kernel is used; "both": the explicit one for short documents only."""
    monkeypatch.setattr(cpu_attention, "EXPLICIT_LENGTH", {"explicit": 512, "sdpa": 0, "both": 6}[request.param])
    return request.param


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """documents and positions, (rows, T)."""
    documents, positions = torch.zeros(len(ROWS), T, dtype=torch.int64), torch.zeros(len(ROWS), T, dtype=torch.int64)
    for row, (lengths, padding) in enumerate(zip(ROWS, PADDING, strict=True)):
        at = 0
        lengths = [*lengths[:-1], lengths[-1] - padding, padding]
        for number, length in enumerate(lengths, 1):
            documents[row, at : at + length] = 0 if number == len(lengths) else number
            positions[row, at : at + length] = torch.arange(length)
            at += length
        assert at == T
    return documents, positions


def by_definition(positions, documents, window) -> torch.Tensor:
    """(B, T, T) bool, with loops."""
    p, d = positions.tolist(), torch.zeros_like(positions).tolist() if documents is None else documents.tolist()
    near = len(p[0]) if window is None else window
    return torch.tensor(
        [
            [
                [e == f and s <= t < s + near for s, f in zip(row, ids, strict=True)]
                for t, e in zip(row, ids, strict=True)
            ]
            for row, ids in zip(p, d, strict=True)
        ]
    )


def plain_attention(q, k, v, seen, scale=HEAD_DIM**-0.5) -> torch.Tensor:
    """`seen` is (B, T, S)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * scale
    return scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1) @ v


def random_qkv(heads=(4, 2), B=4, length=T) -> list[torch.Tensor]:
    shapes = [(B, heads[0], length, HEAD_DIM)] + [(B, heads[1], length, HEAD_DIM)] * 2
    return [(2 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]


def assert_same(found, expected, inputs, kept=None) -> None:
    """Outputs, and gradients of the inputs, where `kept` (B, T) is true."""
    direction = torch.randn_like(expected)
    if kept is not None:
        direction = direction * kept[:, None, :, None]
        found, expected = (x * kept[:, None, :, None] for x in (found, expected))
    torch.testing.assert_close(found, expected, **FP64)
    both = [torch.autograd.grad((y * direction).sum(), inputs) for y in (found, expected)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, **FP64)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 4, 9, 50])
def test_packed_documents_by_definition(heads, window, kernel):
    documents, positions = packed()
    qkv = random_qkv(heads)
    found = attend(*qkv, make_mask(positions, documents, None, window))
    assert found.shape == qkv[0].shape
    assert_same(found, plain_attention(*qkv, by_definition(positions, documents, window)), qkv)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_documents_equal_documents_alone(window, kernel):
    documents, positions = packed()
    qkv = random_qkv()
    parts = [torch.zeros_like(qkv[0])]
    for row, number in {(r, int(d)) for r in range(len(ROWS)) for d in documents[r]}:
        where = (documents[row] == number).nonzero().flatten()
        mask = make_mask(positions[row : row + 1, where], None, None, window)
        alone = attend(*(x[row : row + 1, :, where] for x in qkv), mask)
        part = torch.zeros_like(qkv[0])
        part[row, :, where] = alone[0]
        parts.append(part)
    assert_same(attend(*qkv, make_mask(positions, documents, None, window)), sum(parts), qkv)


@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_dense_masks_equal_grouped_documents(window, kernel):
    """The way of an accelerator and that of the CPU."""
    documents, positions = packed()
    same = documents[:, None, :, None] == documents[:, None, None, :]
    dense = Mask(positions, positions, allowed=allowed_keys(positions, positions, window) & same)
    assert torch.equal(dense.allowed[:, 0], by_definition(positions, documents, window))
    grouped = make_mask(positions, documents, None, window)
    assert grouped.padded is not None
    qkv = random_qkv()
    assert_same(attend(*qkv, grouped), attend(*qkv, dense), qkv)


def test_groups_hold_every_token_once_and_little_padding():
    documents, _ = packed()
    groups = pad_documents(documents)
    places = groups.index[groups.real]
    assert torch.equal(places.sort().values, torch.arange(documents.numel()))
    assert sum(count for count, _ in groups.shapes) == 17  # 16 documents and one of padding
    assert sum(count * length for count, length in groups.shapes) == len(groups.index)
    at = 0
    for count, length in groups.shapes:  # each row of a group is one document
        sizes = []
        for row in groups.index[at : at + count * length].view(count, length):
            real = groups.real[at : at + length]
            assert len(documents.flatten()[row[real]].unique()) == 1 and real[0]
            sizes.append(int(real.sum()))
            at += length
        assert length == _round_up(max(sizes)) and max(sizes) < min(sizes) / 0.75


def test_lengths_are_few_and_little_longer():
    """oneDNN makes code for each, which costs time and memory."""
    rounded = [_round_up(length) for length in range(1, 2049)]
    assert all(length <= found < 1.25 * length + 1 for length, found in enumerate(rounded, 1))
    assert len(set(rounded)) < 2048 / ALIGN + 30


def test_unpack_and_repack_are_plain_indexing():
    """Each document has its heads one after the other; the way back is the inverse, and so are the gradients."""
    documents, _ = packed()
    groups, (B, T), n_heads = pad_documents(documents), documents.shape, 2
    plain, used, at = [], [], 0  # which (token, head) stands where, counted one by one
    for count, longest in groups.shapes:
        for _ in range(count):
            for head in range(n_heads):
                plain += [int(groups.index[at + i]) * n_heads + head for i in range(longest)]
                used += groups.real[at : at + longest].tolist()
            at += longest
    x = torch.randn(B, n_heads, T, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(plain), 3, dtype=torch.float64, requires_grad=True)
    where = torch.empty(B * T * n_heads, dtype=torch.int64)
    where[torch.tensor(plain)[used]] = torch.arange(len(plain))[used]
    there = x.transpose(1, 2).reshape(-1, 3)[plain]
    back = y[where].view(B, T, n_heads, 3).transpose(1, 2)
    upstream = torch.randn_like(there) * torch.tensor(used)[:, None]  # nothing real sees padding
    for found, expected, source, up in (
        (_Unpack.apply(x, groups), there, x, upstream),
        (_Repack.apply(y, groups, x.shape), back, y, torch.randn_like(back)),
    ):
        assert torch.equal(found, expected)
        one, other = (torch.autograd.grad(z, source, up)[0] for z in (found, expected))
        assert torch.equal(one, other)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 7, T - 1, T, T + 1])
def test_whole_rows_by_definition(heads, window, kernel):
    positions = torch.arange(T).expand(len(ROWS), T)
    qkv = random_qkv(heads)
    mask = make_mask(positions, None, None, window)
    assert (mask.allowed is None) == (window is None or window >= T)
    assert_same(attend(*qkv, mask), plain_attention(*qkv, by_definition(positions, None, window)), qkv)


@pytest.mark.parametrize("window", [None, 7])
def test_left_padding_by_definition(window, kernel):
    positions = torch.arange(T) - torch.tensor([[0], [1], [30], [11]])
    qkv = random_qkv()
    padding = positions < 0
    seen = by_definition(positions, padding.long(), window)  # padding keeps to itself
    for mask in (
        make_mask(positions, None, None, window),
        Mask(positions, positions, allowed=allowed_keys(positions, positions, window)),
    ):
        assert_same(attend(*qkv, mask), plain_attention(*qkv, seen), qkv, kept=~padding)
        assert attend(*qkv, mask).isfinite().all()


def test_scale(kernel):
    qkv = random_qkv()
    seen = by_definition(torch.arange(T).expand(len(ROWS), T), None, None)
    assert_same(attend(*qkv, CAUSAL, scale=0.7), plain_attention(*qkv, seen, scale=0.7), qkv)


def test_mixed_dtypes_end_in_that_of_the_values(kernel):
    """Under autocast rotary leaves q and k in fp32."""
    q, k, v = (x.detach() for x in random_qkv())
    expected = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), CAUSAL)
    found = attend(q.float(), k.float(), v.bfloat16(), CAUSAL)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def bent_attention(q, k, v, seen, positions, softcap, slopes) -> torch.Tensor:
    """Softcap and ALiBi by their definitions."""
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, 1).transpose(-1, -2) * HEAD_DIM**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (positions[:, None, :, None] - positions[:, None, None, :])
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return weights @ v.repeat_interleave(repeats, 1)


@pytest.mark.parametrize("packed_rows", [False, True])
@pytest.mark.parametrize(("softcap", "alibi"), [(2.0, False), (None, True), (2.0, True)])
def test_softcap_and_alibi_by_definition(packed_rows, softcap, alibi, kernel):
    documents, positions = packed()
    if not packed_rows:
        positions, documents = torch.arange(T).expand(len(ROWS), T), None
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.01]) if alibi else None
    qkv = random_qkv()
    seen = by_definition(positions, documents, None)
    found = attend(*qkv, make_mask(positions, documents, None, None), softcap=softcap, slopes=slopes)
    expected = bent_attention(*qkv, seen, positions, softcap, slopes)
    kept = None if documents is None else documents > 0
    assert_same(found, expected, qkv, kept=kept)
    plain = plain_attention(*qkv, seen)
    assert (plain - expected).abs().max() > 0.01


def test_softcap_and_alibi_with_a_cache():
    positions, softcap, slopes = torch.arange(20).expand(2, 20), 2.0, torch.tensor([0.5, 0.25, 0.1, 0.01])
    qkv = [x.detach() for x in random_qkv(B=2, length=20)]
    expected = attend(*qkv, make_mask(positions, None, None, None), softcap=softcap, slopes=slopes)
    config = replace(llama.PRESETS["tiny"], n_layers=1, n_kv_heads=2, head_dim=HEAD_DIM)
    cache, outputs = KVCache(config, 2, 20, torch.float64), []
    for part in torch.arange(20).split([13, 1, 1, 5]):
        cache.advance(positions[:, part])
        q, k, v = (x[:, :, part] for x in qkv)
        mask = make_mask(positions[:, part], None, cache, None)
        outputs.append(attend(q, *cache[0].update(k, v, mask), mask, softcap=softcap, slopes=slopes))
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, **FP64)


def attention_with_sinks(q, k, v, seen, sinks) -> torch.Tensor:
    """By its definition: exp(sink) beside the sum of each softmax."""
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, 1).transpose(-1, -2) * HEAD_DIM**-0.5
    weights = scores.exp() * seen[:, None]
    return weights / (weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None]) @ v.repeat_interleave(repeats, 1)


@pytest.mark.parametrize("packed_rows", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_sinks_by_definition(packed_rows, window, kernel):
    """Outputs, and gradients of sinks, too."""
    documents, positions = packed()
    if not packed_rows:
        positions, documents = torch.arange(T).expand(len(ROWS), T), None
    qkv, sinks = random_qkv(), torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    seen = by_definition(positions, documents, window)
    found = attend(*qkv, make_mask(positions, documents, None, window), sinks=sinks)
    kept = None if documents is None else documents > 0
    assert_same(found, attention_with_sinks(*qkv, seen, sinks), [*qkv, sinks], kept=kept)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("static", [False, True])
def test_sinks_with_a_cache(static, window):
    positions, sinks = torch.arange(20).expand(2, 20), torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    qkv = [x.detach() for x in random_qkv(B=2, length=20)]
    expected = attention_with_sinks(*qkv, by_definition(positions, None, window), sinks)
    config = replace(llama.PRESETS["tiny"], n_layers=1, n_kv_heads=2, head_dim=HEAD_DIM)
    cache, outputs = KVCache(config, 2, 20, torch.float64, static=static), []
    for part in torch.arange(20).split([13, 1, 1, 5]):
        cache.advance(positions[:, part], int(part[0]))
        q, k, v = (x[:, :, part] for x in qkv)
        mask = make_mask(positions[:, part], None, cache, window)
        outputs.append(attend(q, *cache[0].update(k, v, mask), mask, sinks=sinks))
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, **FP64)


@pytest.mark.parametrize("window", [None, 1, 5, 16])
@pytest.mark.parametrize("padding", [(0, 0), (0, 6), (3, 9)])
@pytest.mark.parametrize("chunks", [[13, 1, 1, 1, 1, 1, 1, 1], [5, 4, 8, 1, 2], [20]])
def test_cached_attention_by_definition(window, padding, chunks, kernel):
    positions = torch.arange(20) - torch.tensor(padding)[:, None]
    qkv = [x.detach() for x in random_qkv(B=2, length=20)]
    real = positions >= 0
    expected = plain_attention(*qkv, by_definition(positions, real.long(), window))
    config = replace(llama.PRESETS["tiny"], n_layers=1, n_kv_heads=2, head_dim=HEAD_DIM)
    cache, outputs = KVCache(config, 2, 21, torch.float64, chunk=max(chunks)), []
    for part in torch.arange(20).split(chunks):
        cache.advance(positions[:, part])
        mask = make_mask(positions[:, part], None, cache, window)
        q, k, v = (x[:, :, part] for x in qkv)
        k, v = cache[0].update(k, v, mask)
        assert k.shape[2] == min(cache.length, 21 if window is None else window + max(chunks) - 1)
        outputs.append(attend(q, k, v, mask))
    found = torch.cat(outputs, dim=2)
    assert found.isfinite().all()
    kept = real[:, None, :, None]
    torch.testing.assert_close(found * kept, expected * kept, **FP64)


def test_a_full_cache_and_documents_with_a_cache_raise():
    cache = KVCache(llama.PRESETS["tiny"], 1, 4, torch.float32)
    cache.advance(torch.arange(3)[None])
    with pytest.raises(ValueError, match="the cache holds 4 tokens, 5 are needed"):
        cache.advance(torch.arange(3, 5)[None])
    with pytest.raises(ValueError, match="documents and a cache"):
        make_mask(torch.arange(1)[None], torch.ones(1, 1), cache, None)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_loss_and_gradients_of_a_model_equal_those_of_documents_alone(window, kernel):
    """Requirement 9."""
    config = replace(llama.PRESETS["tiny"], vocab_size=64, dim=32, head_dim=8, ffn_dim=48, window=window, tied=True)
    model = llama.Model(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    documents, positions = packed()
    tokens = torch.randint(0, 64, documents.shape)
    labels = torch.randint(0, 64, documents.shape).masked_fill(documents == 0, -100)
    model(tokens, positions, documents, labels=labels)[0].backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    loss, n_targets = model(tokens, positions, documents, labels=labels)

    model.zero_grad()
    total, count = 0.0, 0
    for row, number in sorted({(r, int(d)) for r in range(len(ROWS)) for d in documents[r] if d > 0}):
        where = documents[row] == number
        alone, n = model(tokens[row, where][None], labels=labels[row, where][None])
        alone.backward()
        total, count = total + alone.item(), count + int(n)
    assert n_targets == count
    assert loss.item() == pytest.approx(total, rel=ulps())  # the loss itself is summed in fp32
    assert_gradients_close(found, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize(("T", "S"), [(2, 2), (128, 128), (129, 129), (300, 300), (5, 300), (300, 812)])
def test_prompts_in_16_bits_are_as_accurate_as_the_fused_kernel(T, S):
    """In blocks of queries, also after earlier parts of the prompt; fewer key heads, and a scale that bf16 does not hold."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 24) for heads, n in ((6, T), (2, S), (2, S)))
    allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.bfloat16().double(), *(x.bfloat16().double() for x in (k, v)), attn_mask=allowed, enable_gqa=True
    )
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    found = prompt_attention.attend_prompt(q, k, v, 24**-0.5)
    assert_as_accurate(found, fused, exact)


def test_prompts_are_read_in_blocks(monkeypatch):
    """In generation in 16 bits, where a query sees all keys before it; not with a window that is exceeded, nor in training."""
    calls = []
    plain = prompt_attention.attend_prompt
    monkeypatch.setattr(prompt_attention, "attend_prompt", lambda q, *a: calls.append(q.shape[2]) or plain(q, *a))
    for dtype, window, read in ((torch.bfloat16, None, [9, 3]), (torch.bfloat16, 10, [9]), (torch.float32, None, [])):
        config = replace(llama.PRESETS["tiny"], window=window, n_layers=1)
        model = llama.Model(config).to(dtype)
        cache = KVCache(config, 1, 13, dtype)
        with torch.inference_mode():
            for part in torch.arange(13)[None].split([9, 3, 1], 1):
                model(part, cache=cache)
        assert calls == read, (dtype, window)
        calls.clear()
