"""How close two computations of the same values must be: as close as rounding allows, on any CPU.

Each CPU, each number of threads and each library of matrix products sums in an order of its own, so results differ in
their last bits. No absolute number bounds that: rounding grows with the values and with the computation. Two measures do.

- `assert_close`: the difference relative to the size of what is compared, in ulps of its dtype. A dot product of n terms
  is off by about sqrt(n) / 2 ulps, and a tiny model is some 20 of them in a row, of 16 to 256 terms each, with a softmax and
  norms between that amplify: 5 to 40 ulps are seen (`python tests/instruction_sets.py`), 256 are allowed. What is wrong by
  more than rounding (a mask, a scale, a missing bias) is off by 10,000 ulps or more.
- `assert_as_accurate`: the error against fp64, at most a multiple of the error that the reference itself has.
"""

import copy
import json
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ULPS = 256


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest 2-norm of a vector of `found - expected`, relative to that of `expected`.

    Vectors are those along the last dimension: the logits of one token, the weights of one output. None counts as smaller than
    a hundredth of the largest.
    """
    assert found.shape == expected.shape, f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    found, expected = (torch.atleast_1d(x.detach()).double() for x in (found, expected))
    norms = expected.norm(dim=-1)
    return float(((found - expected).norm(dim=-1) / norms.clamp(min=1e-2 * float(norms.max()))).max())


def ulps(count: float = ULPS, scale: Tensor | float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """`count` ulps of the largest value of `scale`, for comparing single numbers that come of values of this size."""
    largest = float(scale.detach().abs().max()) if isinstance(scale, Tensor) else abs(scale)
    return count * torch.finfo(dtype).eps * largest


def assert_close(found: Tensor, expected: Tensor, count: float | None = None, what: str = "") -> None:
    """Assert that two tensors of one dtype and shape differ by at most `count` ulps, relative to their size.

    By default `ULPS`; in 16 bits, where a sum is computed in fp32 and rounded once, 1.
    """
    assert found.dtype == expected.dtype, f"{found.dtype} and {expected.dtype}"
    if count is None:
        count = ULPS if torch.finfo(expected.dtype).bits >= 32 else 1
    error = difference(found, expected) / torch.finfo(expected.dtype).eps
    _record(error, count)
    assert error <= count, f"{what} differs by {error:.0f} ulps of {expected.dtype}, {count:.0f} are rounding".strip()


def assert_as_accurate(found: Tensor, reference: Tensor, exact: Tensor, times: float = 4.0, what: str = "") -> None:
    """Assert that the error of `found` against the fp64 `exact` is at most `times` that of `reference`.

    The reference's error counts as one ulp at least: it may be exact by luck.
    """
    assert exact.dtype == torch.float64 and found.dtype == reference.dtype
    error, allowed = difference(found, exact), difference(reference, exact)
    allowed = times * max(allowed, torch.finfo(found.dtype).eps)
    _record(error, allowed)
    assert error <= allowed, f"{what} is off by {error:.1e}, {allowed:.1e} is {times} times the reference".strip()


def assert_rounds_alike(found: Tensor, expected: Tensor) -> None:
    """`assert_close`, and in 16 bits nine of ten values are equal: where one step rounds elsewhere, a third of them differs.

    A few differ wherever the fp32 sums before the rounding do.
    """
    assert_close(found, expected)
    equal = float((found == expected).double().mean())
    assert torch.finfo(expected.dtype).bits > 16 or equal > 0.9, f"only {equal:.0%} of the values are equal"


def gradient_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The 2-norm of each gradient's difference, relative to the gradient's own.

    That of a key bias is mathematically almost 0: none counts as smaller than a thousandth of the largest.
    """
    assert found.keys() == expected.keys() and found
    norms = {name: float(gradient.double().norm()) for name, gradient in expected.items()}
    least = 1e-3 * max(norms.values())
    return {n: float((found[n].double() - expected[n].double()).norm()) / max(norms[n], least) for n in expected}


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], count: float = ULPS) -> None:
    """Assert that fp32 gradients, by name, differ by at most `count` ulps, each relative to its own norm."""
    for name, error in gradient_errors(found, expected).items():
        allowed = ulps(count)
        _record(error, allowed)
        assert error <= allowed, f"gradient of {name}: relative error {error:.1e}, {allowed:.1e} is rounding"


def assert_gradients_as_accurate(
    found: dict[str, Tensor], reference: dict[str, Tensor], exact: dict[str, Tensor], times: float = 4.0
) -> None:
    """`assert_as_accurate` for fp32 gradients by name.

    The reference's error counts as 16 ulps at least: a sum over 100 tokens is off by as much, and that of a key bias, which is
    mathematically almost 0, is nothing but rounding.
    """
    errors = gradient_errors(reference, exact)
    for name, error in gradient_errors(found, exact).items():
        allowed = times * max(errors[name], ulps(16))
        _record(error, allowed)
        assert error <= allowed, (
            f"gradient of {name} is off by {error:.1e}, {allowed:.1e} is {times} times the reference"
        )


class Float64(TorchFunctionMode):
    """Computes in fp64 where a model asks for fp32, as norms and softmax do in any dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def in_fp64(model: nn.Module, *inputs: Any, **options: Any) -> Any:
    """What a copy of `model` with fp64 weights returns, computed in fp64 throughout."""
    with Float64():
        return copy.deepcopy(model).double()(*inputs, **options)


def _record(error: float, allowed: float) -> None:
    """For `instruction_sets.py`: which share of its tolerance a test used."""
    if log := os.environ.get("LITMINI_NUMERICS_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps([os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0], error / allowed]) + "\n")
