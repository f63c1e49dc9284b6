"""4-bit bases: against bitsandbytes' own layer, memory, loading, what must not be quantised, and merging what was trained."""

import dataclasses
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from numerics import assert_close, ulps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import litmini
from litmini.checkpoints.export import export, merge_error
from litmini.checkpoints.hf import load_model, save_model
from litmini.checkpoints.load import load_quantized
from litmini.checkpoints.peft import load_adapter, save_adapter
from litmini.config.finetune import LoraConfig, QuantizeConfig
from litmini.config.training import OptimConfig
from litmini.errors import UserError
from litmini.files import read_json
from litmini.methods import nf4
from litmini.methods.adapters import adapters, add_adapters, merge_adapters
from litmini.methods.dora import DoRALinear
from litmini.methods.nf4 import NF4Linear, quantize_linears
from litmini.models import llama, mixtral
from litmini.training.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 512


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_layer_of_bitsandbytes(double, dtype, bias):
    base = nn.Linear(192, 320, bias=bias).to(dtype)
    theirs = bnb.nn.Linear4bit(192, 320, bias=bias, quant_type="nf4", compress_statistics=double, compute_dtype=dtype)
    theirs.load_state_dict(base.state_dict())
    theirs = theirs.to("cpu")  # quantises
    if theirs.weight.quant_state is None:
        theirs.weight = theirs.weight._quantize("cpu")
    ours = NF4Linear(base, double)
    expected = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state).to(dtype)
    assert torch.equal(ours.dequantize(), expected)
    assert 0.01 < (expected - base.weight).abs().mean() / base.weight.abs().mean() < 0.15
    x = torch.randn(3, 5, 192, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 5, 320, dtype=dtype)
    y = ours(x)
    y.backward(grad)
    plain = nn.functional.linear(x.detach(), expected, base.bias)
    assert_close(y, plain)
    assert_close(x.grad, grad @ expected)


def test_nothing_dequantised_outlives_the_matmul():
    """Neither weight nor input is kept for the backward pass; only 4 bits a weight are there between the two."""
    layer, alive = NF4Linear(nn.Linear(256, 512)), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "dequantize_4bit" in str(func):
                alive.append(weakref.ref(out))
            return out

    x = torch.randn(4, 256, requires_grad=True)
    saved = []
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
        gc.collect()
        assert len(alive) == 1 and alive[0]() is None and not saved
        y.sum().backward()
    assert len(alive) == 2 and alive[1]() is None


@pytest.mark.parametrize("double", [False, True])
def test_bytes_of_a_layer(double):
    """At most 0.32 of bf16's: 4.5 or 4.13 bits a weight."""
    base = nn.Linear(576, 1536, bias=False).bfloat16()
    layer = NF4Linear(base, double)
    held = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
    assert held / (base.weight.numel() * 2) == pytest.approx(4.127 / 16 if double else 4.5 / 16, rel=1e-2)


@pytest.mark.parametrize("double", [False, True])
def test_a_change_of_dtype_does_not_touch_the_weights(double):
    layer = NF4Linear(nn.Linear(128, 64), double)
    expected = layer.dequantize(torch.float32)
    layer.bfloat16()
    assert torch.equal(layer.dequantize(torch.float32), expected)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.to("meta").weight.device.type == "meta"


def test_autocast_computes_in_its_dtype():
    layer, x = NF4Linear(nn.Linear(128, 64)), torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_embeddings_head_norms_and_router_stay():
    """Requirement 19."""
    model = mixtral.Model(mixtral.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    expected = {n: p.clone() for n, p in model.named_parameters()}
    names = quantize_linears(model)
    assert {n.rsplit(".", 1)[1] for n in names} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    for name, parameter in model.named_parameters():
        if not any(name.startswith(n + ".") for n in names):
            assert torch.equal(parameter, expected[name]), name
    assert {type(m).__name__ for m in model.modules()} >= {"Embedding", "Linear", "RMSNorm", "Router"}


@pytest.mark.parametrize("layer", [None, DoRALinear])
def test_trains_over_4_bits_as_over_the_dequantised_weights(tiny_dir, layer):
    losses = []
    for packed in (True, False):
        model = load_quantized(tiny_dir, QuantizeConfig(4), torch.float32)
        if not packed:
            for name, module in list(model.named_modules()):
                if isinstance(module, NF4Linear):
                    plain = nn.Linear(module.in_features, module.out_features, bias=False)
                    plain.weight.data = module.dequantize()
                    parent, _, last = name.rpartition(".")
                    setattr(model.get_submodule(parent), last, plain)
        torch.manual_seed(0)
        add_adapters(model, LoraConfig(rank=4), layer)
        optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
        for _ in range(4):
            loss, count = model(TOKENS, labels=TOKENS.roll(-1, 1))
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[:4] == pytest.approx(losses[4:], rel=ulps())
    assert losses[3] < losses[0]


def test_experts_in_4_bits_with_adapters(tmp_path, tokenizer_dir):
    config = mixtral.PRESETS["tiny"]
    model = mixtral.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    (tmp_path / "base").mkdir()
    tensors = mixtral.to_hf(((n, p.detach()) for n, p in model.named_parameters()), config)
    save_model(tmp_path / "base", mixtral.config_to_hf(config), tensors, tokenizer_dir)
    results = []
    for bits in (4, 16):
        model = load_quantized(tmp_path / "base", QuantizeConfig(bits), torch.float32)
        torch.manual_seed(1)
        add_adapters(model, LoraConfig(rank=2, targets=["q_proj", "gate_up_proj", "down_proj"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        adapter = tmp_path / f"adapter-{bits}"
        adapter.mkdir()
        save_adapter(model, adapter, "base", quantize=QuantizeConfig(bits))
        expected = model(TOKENS).detach()
        again = load_quantized(tmp_path / "base", QuantizeConfig(bits), torch.float32)
        load_adapter(again, adapter)
        assert torch.equal(again(TOKENS), expected)
        export(tmp_path / "base", tmp_path / f"merged-{bits}", adapter)
        merged = load_model(tmp_path / f"merged-{bits}", torch.float32)
        assert_close(merged(TOKENS), expected)
        results.append(expected)
        model(TOKENS, labels=TOKENS)[0].backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert not torch.allclose(*results, atol=1e-3)


@pytest.fixture
def trained(tiny_dir, tmp_path):
    """An adapter over tiny_dir in 4 bits, saved."""
    model = load_quantized(tiny_dir, QuantizeConfig(4, double=False), torch.float32)
    add_adapters(model, LoraConfig(rank=4, targets=["q_proj"]))
    for module in adapters(model).values():
        nn.init.normal_(module.lora_B, std=0.1)
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_adapter(model, directory, str(tiny_dir), quantize=QuantizeConfig(4, double=False))
    return directory, model(TOKENS).detach()


def test_merges_into_what_was_trained_or_the_original(tiny_dir, tmp_path, trained):
    """Requirement 19: into the dequantised weights by default, adapted or not; nothing is quantised again."""
    directory, expected = trained
    assert read_json(directory / "base_quantization.json") == {
        "type": "nf4",
        "dtype": "float32",
        "bits": 4,
        "double": False,
    }
    export(tiny_dir, tmp_path / "merged", directory)
    assert_close(load_model(tmp_path / "merged", torch.float32)(TOKENS), expected)
    found = merge_error(tiny_dir, directory, tmp_path / "merged", "fp32")
    difference, same = found.difference, found.same
    assert difference <= ulps(scale=expected.log_softmax(-1)) and same == 1
    export(tiny_dir, tmp_path / "original", directory, base="original")
    plain, _ = litmini.load(tiny_dir, directory, dtype="fp32")
    found = load_model(tmp_path / "original", torch.float32)
    assert_close(found(TOKENS), plain(TOKENS))
    assert (found(TOKENS) - expected).abs().max() > 1e-2
    packed, _ = litmini.load(tiny_dir, directory, dtype="fp32", bits=4)
    assert torch.equal(packed(TOKENS), expected)
    assert merge_error(tiny_dir, directory, tmp_path / "original", "fp32").difference > difference


def test_loaded_as_it_was_quantised_for_training(tiny_dir, tmp_path):
    """From bf16, though the checkpoint, and what is asked for, is in fp32."""
    model = load_quantized(tiny_dir, QuantizeConfig(4), torch.bfloat16)
    add_adapters(model, LoraConfig(rank=4, targets=["q_proj"]))
    for module in adapters(model).values():
        nn.init.normal_(module.lora_B, std=0.1)
    save_adapter(model, tmp_path, str(tiny_dir), quantize=QuantizeConfig(4))
    loaded, _ = litmini.load(tiny_dir, tmp_path, dtype="fp32", bits=4)
    assert loaded(TOKENS).dtype == torch.float32
    packed = [[m for m in one.modules() if isinstance(m, NF4Linear)] for one in (model, loaded)]
    assert packed[0] and all(
        torch.equal(a.dequantize(torch.float32), b.dequantize(torch.float32)) for a, b in zip(*packed, strict=True)
    )
    expected = loaded(TOKENS)
    merge_adapters(loaded)
    assert_close(loaded(TOKENS), expected)


def test_damaged_note_of_the_base(tiny_dir, trained):
    directory, _ = trained
    (directory / "base_quantization.json").write_text('{"bits": 4}')
    with pytest.raises(UserError, match="base_quantization.json is damaged: expected bits, double and dtype"):
        litmini.load(tiny_dir, directory)


def test_sizes_that_are_no_multiple_of_the_block_are_all_named(tmp_path, tokenizer_dir):
    config = dataclasses.replace(llama.PRESETS["tiny"], ffn_dim=88)
    model = llama.Model(config)
    save_model(tmp_path, llama.config_to_hf(config), model.named_parameters(), tokenizer_dir)
    expected = r"multiple of 64: model.layers.0.mlp.down_proj \(88 inputs\), model.layers.1.mlp.down_proj \(88 inputs\)"
    with pytest.raises(UserError, match=expected):
        load_quantized(tmp_path, QuantizeConfig(4), torch.float32)
    with pytest.raises(UserError, match="found 88"):
        NF4Linear(nn.Linear(88, 64))


def test_loading_never_holds_more_than_one_linear_in_16_bits(tiny_dir, monkeypatch):
    most = 0

    def packed(linear, double):
        nonlocal most
        there = [m for m in gc.get_objects() if type(m) is nn.Linear and m.weight.device.type == "cpu"]
        most = max(most, len(there))
        return NF4Linear(linear, double)

    monkeypatch.setattr(nf4, "NF4Linear", packed)
    before = sum(type(m) is nn.Linear and m.weight.device.type == "cpu" for m in gc.get_objects())
    model = load_quantized(tiny_dir, QuantizeConfig(4), torch.bfloat16)
    assert most - before <= 2, (most, before)  # the head, and the one that is being packed
    assert [type(m) for m in model.modules()].count(nn.Linear) == 1


MEASURE = """
import sys, torch
from pathlib import Path
from litmini.config.finetune import QuantizeConfig
from litmini.checkpoints.load import load_quantized

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

small = load_quantized(sys.argv[1], QuantizeConfig(4), torch.bfloat16)  # whatever is imported or set up once
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = resident("VmRSS")
model = load_quantized(sys.argv[2], QuantizeConfig(4), torch.bfloat16)
kept = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
print(kept, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="measured with Linux's /proc")
def test_peak_of_loading_is_the_4_bit_size_and_one_shard(tmp_path, tokenizer_dir):
    """206 MB of linears in bf16, shards of 30 MB: what is resident at most, the mapped file included."""
    tiny = llama.PRESETS["tiny"]
    for name, n_layers in (("small", 1), ("large", 8)):
        config = dataclasses.replace(
            tiny, dim=1024, n_layers=n_layers, n_heads=8, n_kv_heads=8, head_dim=128, ffn_dim=2816
        )
        tensors = llama.Model(config).bfloat16().state_dict().items()
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, llama.config_to_hf(config), tensors, tokenizer_dir, 30_000_000)
    peaks = []  # what the allocator holds on to differs from run to run, by 20 MB
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        kept, peak = map(int, done.stdout.split())
        print(f"{kept / 1e6:.0f} MB kept, {peak / 1e6:.0f} MB taken at the peak")
        peaks.append(peak)
    assert 54e6 < kept < 60e6 and 0.9 * kept < min(peaks) < kept + 30_000_000  # memory of the small one is used again


def test_bitsandbytes_costs_nothing_where_it_is_not_used_and_says_nothing_where_it_is():
    code = """
import sys, torch
import litmini.methods.nf4, litmini.methods.registry, litmini.checkpoints.peft, litmini.checkpoints.export
import litmini.training.optimizer
assert "bitsandbytes" not in sys.modules
litmini.methods.nf4.NF4Linear(torch.nn.Linear(64, 64))
assert "bitsandbytes" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Quantised(TorchDispatchMode):
    """Notes the device and size of what is quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "quantize" in str(func):
            self.seen.append((args[0].device.type, args[0].numel()))
        return func(*args, **(kwargs or {}))


def test_a_gpu_quantises_a_weight_at_once_and_the_result_comes_home(monkeypatch):
    """On tensors that pretend to be on a GPU."""
    nf4._kernels()
    with FakeTensorMode(), Quantised() as quantised:
        monkeypatch.setattr(nf4, "_code", lambda device: torch.empty(256, device=device))
        linear = torch.nn.Linear(128, 4096, dtype=torch.bfloat16)
        layer = NF4Linear(linear, on=torch.device("cuda", 0))
        assert quantised.seen == [("cuda", 4096 * 128), ("cuda", 4096 * 2)]  # the weight, its constants
        assert {t.device.type for t in layer.state_dict().values()} == {"cpu"}
        quantised.seen.clear()
        NF4Linear(linear)
        assert quantised.seen == [("cpu", nf4.CHUNK)] * 2 + [("cpu", 4096 * 2)]


def test_the_device_that_quantises_is_asked_for_each_weight(tiny_dir, monkeypatch):
    asked, plain = [], NF4Linear.__init__
    monkeypatch.setattr(NF4Linear, "__init__", lambda self, *args: asked.append(args[2]) or plain(self, *args))
    model = load_quantized(tiny_dir, QuantizeConfig(4), torch.bfloat16, on=torch.device("cpu", 0))
    assert asked == [torch.device("cpu", 0)] * len([m for m in model.modules() if isinstance(m, NF4Linear)])
