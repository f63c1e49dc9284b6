"""Families with states: what no document may know of another, and what a cache knows of the tokens so far."""

import pytest
import torch
from numerics import assert_close, assert_gradients_close, ulps
from packed_batch import documents_of

from litmini.models import granite_hybrid, lfm2, mamba2, qwen3_5, qwen3_5_moe
from litmini.ops.kv_cache import KVCache

FAMILIES = [granite_hybrid, lfm2, mamba2, qwen3_5, qwen3_5_moe]


@pytest.fixture(params=FAMILIES, ids=[module.__name__.rpartition(".")[2] for module in FAMILIES])
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
