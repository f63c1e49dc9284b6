"""What is computed again in the backward pass has the values and gradients of what is kept."""

import torch
from torch import Tensor

from litmini.ops.recompute import recomputed


def function(x: Tensor, y: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
    product = (x * y).exp()
    return product if z is None else product * z, x.sin()


def test_outputs_and_gradients_are_those_of_the_function():
    x, y, z = torch.randn(3, 5), torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    for inputs in ((x, y, z), (x, y, None), (y, y.detach(), z)):
        wanted = [one for one in inputs if one is not None and one.requires_grad]
        found, expected = recomputed(function, *inputs), function(*inputs)
        weights = torch.randn(2, 3, 5)
        for mine, exact in zip(found, expected, strict=True):
            assert torch.equal(mine, exact)
        gradients = [
            torch.autograd.grad(sum((weight * one).sum() for weight, one in zip(weights, some, strict=True)), wanted)
            for some in (found, expected)
        ]
        assert all(torch.equal(mine, exact) for mine, exact in zip(*gradients, strict=True))


def test_only_inputs_are_kept_and_nothing_without_gradients():
    x, kept = torch.randn(3, 5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y, _ = recomputed(function, x, x, None)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()] * 2
    y.sum().backward()
    assert torch.allclose(x.grad, 2 * x * (x * x).exp())
    with torch.no_grad():
        assert not recomputed(function, x, x, None)[0].requires_grad


def test_an_output_that_nothing_uses_gives_gradients_of_zero():
    x, y = (torch.randn(4, requires_grad=True) for _ in range(2))
    recomputed(function, x, y, None)[1].sum().backward()
    assert torch.equal(x.grad, x.detach().cos()) and (y.grad == 0).all()
