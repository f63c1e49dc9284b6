"""Flops against torch's own counter, and the peak that they are compared with."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from litmini.config.finetune import LoraConfig
from litmini.methods.adapters import add_adapters
from litmini.methods.nf4 import quantize_linears
from litmini.models import gpt2, llama, mixtral
from litmini.training.flops import Throughput, peak_flops, peak_memory_mib

CPU = torch.device("cpu")


def batch(length: int = 24, targets: int = 10) -> dict[str, torch.Tensor]:
    """Two rows: one document of 24, and two of 12 and 8 with padding."""
    tokens = torch.randint(3, 500, (2, length))
    positions = torch.stack([torch.arange(24), torch.cat([torch.arange(12), torch.arange(8), torch.arange(4)])])
    documents = torch.tensor([[1] * 24, [1] * 12 + [2] * 8 + [0] * 4])
    labels = torch.where(torch.arange(length) < targets, tokens, -100)
    return {"tokens": tokens, "positions": positions, "documents": documents, "labels": labels}


def counted(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> int:
    """Flops of all matrix products but those of attention, by torch's count, which lacks addmm_."""

    def in_place(y, a, b, out_shape=None):  # shapes
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        model(**data)[0].backward()
    products = ("mm", "addmm", "addmm_")
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[1] in products)


def without_attention(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> float:
    meter = Throughput(model, CPU, torch.float32)
    keys = 24 * 25 // 2 + 12 * 13 // 2 + 8 * 9 // 2
    config = model.config
    assert meter.per_key == 3 * 4 * config.n_layers * config.n_heads * config.head_dim
    return meter.flops([data]) - keys * meter.per_key


def no_padding(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The padding as a document: torch counts it, and litmini does not."""
    return {**data, "documents": torch.where(data["documents"] == 0, 3, data["documents"])}


@pytest.mark.parametrize("family", [llama, gpt2], ids=["llama", "gpt2"])
def test_flops_of_full_training_are_those_that_torch_counts(family) -> None:
    data = no_padding(batch())
    model = family.Model(family.PRESETS["tiny"])
    model.init_weights()
    extra = 4 * 5 // 2 * Throughput(model, CPU, torch.float32).per_key
    assert without_attention(model, data) - extra == counted(model, data)


def test_flops_of_adapters() -> None:
    """Frozen weights have no gradients of their own; torch also leaves out that of the first layer's input."""
    data = no_padding(batch())
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights()
    full = without_attention(model, data)
    add_adapters(model, LoraConfig(rank=4))
    ours, theirs = (
        without_attention(model, data) - 4 * 5 // 2 * Throughput(model, CPU, torch.float32).per_key,
        counted(model, data),
    )
    layers = model.config.n_layers
    assert theirs < ours < full and theirs > ours * (1 - 1 / layers / 3)


def test_stored_in_4_bits_a_matrix_is_as_large() -> None:
    model = mixtral.Model(mixtral.PRESETS["tiny"])
    model.init_weights()
    model.requires_grad_(False)
    before = Throughput(model, CPU, torch.float32)
    quantize_linears(model)
    assert sum(type(module).__name__ == "NF4Linear" for module in model.modules()) > 4
    after = Throughput(model, CPU, torch.float32)
    assert (after.per_token, after.per_target) == (before.per_token, before.per_target)


def test_only_the_experts_that_a_token_goes_to_count() -> None:
    config = mixtral.PRESETS["tiny"]
    model = mixtral.Model(config)
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n
    )
    share = config.n_active / config.n_experts
    assert Throughput(model, CPU, torch.float32).per_token == 6 * (matrices + experts * share)
    before = 4 * (matrices + experts * share)
    add_adapters(model, LoraConfig(rank=4, targets=["gate_up_proj"]))  # of each expert one
    added = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 3)
    assert added > 0 and Throughput(model, CPU, torch.float32).per_token == before + 6 * added * share


def test_padding_and_rows_without_a_target_cost_nothing() -> None:
    model = llama.Model(llama.PRESETS["tiny"])
    meter = Throughput(model, CPU, torch.float32)
    one, other = batch(), batch()
    other["tokens"] = torch.cat([one["tokens"], torch.zeros(2, 8, dtype=torch.int64)], 1)
    for name, filler in (("labels", -100), ("documents", 0), ("positions", 0)):
        other[name] = torch.cat([one[name], torch.full((2, 8), filler)], 1)
    assert meter.flops([one]) == meter.flops([other]) == meter.flops([one, other]) / 2
    fewer = {**one, "labels": torch.full_like(one["labels"], -100)}
    assert meter.flops([one]) - meter.flops([fewer]) == 20 * 6 * model.config.vocab_size * model.config.dim


def test_mfu_is_flops_by_time_by_peak() -> None:
    meter = Throughput(llama.Model(llama.PRESETS["tiny"]), CPU, torch.float32)
    meter.peak = 1e9
    flops = meter.flops([batch()])
    assert meter([batch()], 0.5)["mfu"] == pytest.approx(flops / 0.5 / 1e9)
    meter([batch()], 1.5)
    assert meter.mfu == pytest.approx(2 * flops / 2.0 / 1e9)
    assert meter([batch()], 1.0)["memory_mib"] == peak_memory_mib(CPU) > 50


def test_the_peak_of_a_cpu_is_measured() -> None:
    peak, source = peak_flops(CPU, torch.float32)
    assert 1e8 < peak < 1e15 and source == "measured with a matmul of 1024 x 1024 in float32"


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA RTX A1000"])
def test_a_card_with_a_longer_name_is_another_card(monkeypatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "ones", lambda *shape, **_: torch.zeros(2, 2))
    assert "measured" in peak_flops(torch.device("cuda"), torch.bfloat16)[1]


class Slow:
    """A matrix whose first matmul takes longer than all others, as the first one on a GPU does."""

    seconds = 0.0

    def __matmul__(self, other):
        self.seconds += 0.001 if self.seconds else 0.2
        return torch.zeros(1, 1)


def test_the_first_matmul_is_not_the_peak(monkeypatch) -> None:
    slow = Slow()
    monkeypatch.setattr(torch, "ones", lambda *shape, **how: slow)
    monkeypatch.setattr("litmini.training.flops.time.perf_counter", lambda: slow.seconds)
    assert peak_flops(CPU, torch.float32)[0] == pytest.approx(2 * 1024**3 / 0.001)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12)]
)
def test_the_peak_of_a_known_card_is_published(monkeypatch, name: str, peak: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16)[0] == peak


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA RTX A1000 Laptop GPU"])
def test_the_peak_of_another_card_is_not_that_of_one_whose_name_begins_so(monkeypatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "ones", lambda *_, ones=torch.ones, **how: ones(8, 8))
    assert peak_flops(torch.device("cuda"), torch.bfloat16)[1].startswith("measured")
