"""LoRA over a gated activation: it is computed again in the backward pass, once for both, and nothing of it stays."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_accurate, assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from litmini.methods.dora import DoRALinear
from litmini.methods.lora import LoRALinear
from litmini.ops.norms import gate_factors, geglu, swiglu

PLAIN = {swiglu: F.silu, geglu: lambda x: F.gelu(x, approximate="tanh")}


def adapted(cls: type[LoRALinear] = LoRALinear, seed: int = 0) -> LoRALinear:
    torch.manual_seed(seed)
    layer = cls(nn.Linear(24, 40).requires_grad_(False), 3, 6.0)
    nn.init.normal_(layer.lora_B)
    return layer


def factors(*dtypes: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 5, 24).to(dtype).requires_grad_() for dtype in dtypes]


def plain(layer: LoRALinear, x: Tensor) -> Tensor:
    """The same by formula, in fp64; autograd does the rest."""
    weight, a, b = layer.base.weight.double(), layer.lora_A.double(), layer.lora_B.double() * layer.scale
    y = x @ weight.T + x @ a.T @ b.T
    if isinstance(layer, DoRALinear):
        y = y * (layer.lora_magnitude_vector.double() / (weight + b @ a).norm(dim=1).detach())
    return y + layer.base.bias.double()


def merged(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.merged_weight(), layer.base.bias) if isinstance(layer, LoRALinear) else layer(x)


def weighted(y: Tensor) -> Tensor:
    return (y.double() * torch.arange(y.numel()).view(y.shape).cos()).sum()


@pytest.mark.parametrize("gated", PLAIN)
@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 bfloat16", "bfloat16 float32"])
def test_gradients_are_those_of_autograd(gated, cls, dtypes):
    """In both dtypes of Gemma 4's inputs of layers under autocast, too."""
    layer, both = adapted(cls), factors(*(getattr(torch, name) for name in dtypes.split()))
    wanted = [*both, *(p for p in layer.parameters() if p.requires_grad)]
    with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in dtypes):
        loss = weighted(layer(gated(*both)))
        rounded = weighted(merged(layer, PLAIN[gated](both[0]) * both[1]))
    found = torch.autograd.grad(loss, wanted)
    of_rounded = torch.autograd.grad(rounded, both)
    gate, up = (x.double() for x in both)
    exact = torch.autograd.grad(weighted(plain(layer, PLAIN[gated](gate) * up)), wanted)
    for mine, theirs, true in zip(found, of_rounded, exact[:2], strict=False):
        assert_as_accurate(mine, theirs, true.double())
    for mine, true in zip(found[2:], exact[2:], strict=True):
        assert (mine - true).norm() <= (0.02 if "bfloat16" in dtypes else 1e-5) * true.norm()


READERS = {
    "one": lambda: [adapted()],
    "two": lambda: [adapted(), adapted(DoRALinear, seed=2)],
    "beside a plain linear": lambda: [adapted(), adapted().base],
}


@pytest.mark.parametrize("readers", READERS)
def test_any_part_of_the_graph_any_number_of_times(readers):
    """What the first backward pass shares is changed in place by the second: no other may read it."""
    gate, up = factors(torch.float32, torch.float32)
    layers, y, x = READERS[readers](), swiglu(gate, up), F.silu(gate) * up
    loss = weighted(sum(layer(y) for layer in layers))
    plain = weighted(sum(merged(layer, x) for layer in layers))
    each = {"gate": gate, "up": up, **dict(nn.ModuleList(layers).named_parameters())}
    wanted = {name: tensor for name, tensor in each.items() if tensor.requires_grad}
    expected = gradients(plain, wanted)
    a = {name: tensor for name, tensor in wanted.items() if "lora_A" in name}
    for part in (wanted, {"up": up}, a, {"gate": gate}, wanted):
        for name, found in gradients(loss, part).items():
            assert_close(found, expected[name], what=name)
    assert gate_factors(y).activated == []


def gradients(loss: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), retain_graph=True), strict=True))


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [True, False])
def test_silu_is_computed_once_in_a_backward_pass_and_does_not_stay(trained):
    """Where gate and up have no gradients, none takes it: in the first block of a model, of which `down_proj` is adapted."""
    gate, up = (x.requires_grad_(trained) for x in factors(torch.float32, torch.float32))
    y = swiglu(gate, up)
    loss = weighted(adapted()(y))  # holds the graph
    with Calls() as calls:
        loss.backward()
    assert calls.names.count("silu") == 1 and calls.names.count("silu_backward") == trained
    assert gate_factors(y).activated == []


def test_rounded_factors_and_the_activation_are_not_kept():
    """What the layer keeps for itself is x A^T."""
    layer, kept = adapted(), []
    layer.base.bfloat16()
    y = swiglu(*factors(torch.bfloat16, torch.bfloat16))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(y)
    given = {x.untyped_storage().data_ptr() for x in [*layer.parameters(), *gate_factors(y)[1:3]]}
    assert [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in given] == [(10, 3)]
