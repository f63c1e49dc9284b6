"""Updates that are small beside the spacing of 16-bit numbers: they count, in the mean, wherever numbers are rounded."""

import pytest
import torch
from torch import nn

from litmini.methods.base_layer import ModulesToSaveLayer
from litmini.methods.dora import DoRALinear
from litmini.methods.lora import LoRALinear
from litmini.ops.rounding import dither, stochastic_round


def on_grid(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(0.05).to(dtype).float()
    weight[0] = 0
    weight[1, :4] = torch.tensor([1.0, -2.0, 0.5, -0.0])  # where the spacing changes
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dithered_weights_round_to_what_they_were(dtype):
    weight = on_grid(dtype, 200, 300)
    moved = nn.Parameter(weight.clone())
    dither([moved], dtype)
    assert torch.equal(moved.to(dtype), weight.to(dtype))
    assert torch.equal(moved[weight == 0], weight[weight == 0])
    assert (moved != weight)[2:].float().mean() > 0.99
    again = nn.Parameter(weight.clone())
    dither([again], dtype)
    assert torch.equal(again, moved), "the same on every rank"
    dither([again], dtype)
    assert torch.equal(again, moved), "weights that are not on the grid stay"


@pytest.mark.parametrize("share", [0.02, 0.2, 0.7, -0.3])
def test_the_mean_of_a_small_update_is_right(share):
    """Without `dither`, bf16 sees nothing of an update of less than half the spacing, and then all of it."""
    weight = on_grid(torch.bfloat16, 400, 500)[2:]
    spacing = 2.0 ** (torch.frexp(weight).exponent - 8)

    def seen(start: torch.Tensor) -> float:
        return (((start + share * spacing).bfloat16().float() - weight) / spacing).mean().item()

    assert seen(weight) == pytest.approx(float(abs(share) > 0.5), abs=0.01)
    dither([moved := nn.Parameter(weight.clone())], torch.bfloat16)
    assert seen(moved) == pytest.approx(share, abs=0.01)


def test_only_trained_matrices_in_fp32_are_dithered():
    """Biases and norms are not cast; weights in bf16 have no room."""
    ones, half, plain = (nn.Parameter(x) for x in (torch.ones(8), torch.ones(8, 8).bfloat16(), torch.ones(8, 8)))
    frozen = torch.ones(8, 8)
    dither([ones, half, frozen], torch.bfloat16)
    dither([plain], torch.float32)
    assert all(torch.equal(x, torch.ones_like(x)) for x in (ones, half, plain, frozen))


def test_a_layer_trained_in_full_beside_adapters_is_dithered():
    base = nn.Linear(64, 32).bfloat16()
    layer, x = ModulesToSaveLayer(base), torch.randn(5, 64).bfloat16()
    before = [p.clone() for p in base.parameters()]
    dither(layer.parameters(), torch.bfloat16)
    assert torch.equal(layer(x), base(x))
    assert not torch.equal(layer.full.weight, base.weight.float())
    assert torch.equal(layer.merge().weight, base.weight)
    assert all(torch.equal(*pair) for pair in zip(before, base.parameters(), strict=True))


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour():
    x = torch.randn(64) * torch.logspace(-6, 6, 64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([stochastic_round(x, torch.bfloat16, generator).float() for _ in range(4000)])
    down = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)  # towards zero
    up = ((x.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert ((draws == down) | (draws == up)).all()
    step = (up - down).abs()
    assert ((draws.mean(0) - x).abs() / step).max() < 4 * 0.5 / 4000**0.5  # 4 standard errors
    assert torch.equal(stochastic_round(down, torch.bfloat16), down.to(torch.bfloat16))  # what bf16 holds stays
    assert stochastic_round(torch.tensor([float("inf"), float("-inf")]), torch.bfloat16).tolist() == [
        float("inf"),
        float("-inf"),
    ]


def test_numbers_that_are_none_stay_so():
    x = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)  # the first is a GPU's NaN
    assert x.isnan().all() and stochastic_round(x, torch.bfloat16).isnan().all()


def test_stochastic_rounding_to_fp16_and_fp32():
    x = torch.randn(50_000)
    rounded = stochastic_round(x, torch.float16)
    assert rounded.dtype == torch.float16
    assert ((rounded.float() - x) / x.abs()).abs().max() < 2**-10 and not torch.equal(rounded, x.half())
    assert torch.equal(stochastic_round(x, torch.float32), x)


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
def test_a_merged_weight_keeps_small_changes_in_the_mean(cls):
    """Rounded to the nearest, a weight out of bf16 is what it was before."""
    base = nn.Linear(256, 512).bfloat16().requires_grad_(False)
    layer = cls(base, 4, 8.0)
    nn.init.normal_(layer.lora_B, std=2e-5)
    change = layer.merged_weight() - base.weight.float()
    assert 0 < change.abs().max() < 0.3 * base.weight.abs().median() * 2**-8
    merged = layer.merge().weight.float() - base.weight.float()
    part = (merged * change).sum() / change.square().sum()
    assert part.item() == pytest.approx(1, abs=0.2)
    assert torch.equal(layer.merge().weight, layer.merge().weight), "the same each time"
