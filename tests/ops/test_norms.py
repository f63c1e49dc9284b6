"""Norms and gated activations: the values and gradients of what they stand for, and nothing kept but their inputs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from torch import Tensor

from litmini.ops.norms import geglu, rms_norm, rms_norm_llama, swiglu

EPS = 1e-5


def normalized(x: Tensor) -> Tensor:
    h = x.float()
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)


PLAIN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS), lambda x, w: (normalized(x) * w).to(x.dtype)),
    "rms_norm_llama": (lambda x, w: rms_norm_llama(x, w, EPS), lambda x, w: w * normalized(x).to(x.dtype)),
    "swiglu": (swiglu, lambda a, b: F.silu(a) * b),
    "geglu": (geglu, lambda a, b: F.gelu(a, approximate="tanh") * b),
}


def inputs(name: str, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 5, 24)
    x[0, 0] = 0.0  # a row without a direction
    other = torch.randn(24) if "norm" in name else torch.randn(2, 5, 24)
    return [x.to(dtype).requires_grad_(), other.to(weight_dtype or dtype).requires_grad_()]


def gradients(function: Callable[..., Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    y = function(*given)
    torch.manual_seed(1)
    return y.detach(), *torch.autograd.grad(y, [x for x in given if x.requires_grad], torch.randn(y.shape).to(y.dtype))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtypes", [("float32", None), ("bfloat16", None), ("bfloat16", "float32")])
def test_equals_what_autograd_makes_of_it(name, dtypes):
    """Values to the bit. Gradients in bf16 are compared with exact ones: they must be as near as autograd's."""
    dtype, weight_dtype = (getattr(torch, d) if d else None for d in dtypes)
    if weight_dtype and "norm" not in name:
        pytest.skip("both have one dtype")
    ours, plain = PLAIN[name]
    given = inputs(name, dtype, weight_dtype)
    found, expected = gradients(ours, given), gradients(plain, given)
    with torch.no_grad():
        assert torch.equal(found[0], expected[0]) and torch.equal(ours(*given), expected[0])
    exact = gradients(plain, [x.detach().float().requires_grad_() for x in given])
    for mine, theirs, true in zip(found[1:], expected[1:], exact[1:], strict=True):
        assert mine.dtype == theirs.dtype
        if dtype == torch.float32:
            assert_close(mine, theirs)
        else:
            assert 0 < (mine - true).norm() <= 1.1 * (theirs - true).norm() <= 0.02 * true.norm()


@pytest.mark.parametrize("name", PLAIN)
def test_keeps_its_inputs_alone(name):
    ours, plain = PLAIN[name]
    given = inputs(name, torch.bfloat16)

    def kept(function: Callable[..., Tensor]) -> int:
        sizes: dict[int, int] = {}
        held = []  # no address is used twice
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: [held.append(t), sizes.update({t.data_ptr(): t.nbytes})] and t, lambda t: t
        ):
            function(*given)
        return sum(size for address, size in sizes.items() if address not in {x.data_ptr() for x in given})

    small = 2 * 5 * 4  # a number for each row
    assert kept(ours) <= small < kept(plain)


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_llama"])
def test_a_frozen_weight_has_no_gradient(name):
    given = inputs(name, torch.float32)
    given[1].requires_grad_(False)
    found, expected = (gradients(function, given) for function in PLAIN[name])
    assert_close(found[1], expected[1])


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_llama"])
@pytest.mark.parametrize("grad", [True, False])
def test_under_autocast_a_norm_is_cast_once_for_all_matmuls_after_it(name, grad):
    """The very numbers that each product would have cast for itself; what is in 16 bits already stays as it was."""
    ours, plain = PLAIN[name]
    (x, weight), linear = inputs(name, torch.float32), torch.nn.Linear(24, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y = ours(x, weight)
        assert y.dtype == torch.bfloat16 and torch.equal(y, plain(x, weight).bfloat16())
        assert torch.equal(linear(y), linear(plain(x, weight)))
        half = x.detach().bfloat16()
        assert torch.equal(ours(half, weight), plain(half, weight))
    if grad:
        expected = torch.autograd.grad(plain(x, weight).square().sum(), [x, weight])
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(ours(x, weight).float().square().sum(), [x, weight])
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == torch.float32 and (mine - theirs).norm() <= 0.01 * theirs.norm()
