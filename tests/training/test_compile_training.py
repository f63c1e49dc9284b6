"""--compile in training: the same losses and gradients, from one compilation that all blocks share."""

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.compiler.config
import varlen_kernel
from numerics import assert_gradients_close
from test_scripts import run
from torch._dynamo.utils import counters

from litmini.compiler import compilable
from litmini.config.finetune import LoraConfig
from litmini.errors import UserError
from litmini.generation.compile import compile_decoding
from litmini.methods.adapters import add_adapters, keep_casts
from litmini.methods.lora import LoRALinear
from litmini.methods.nf4 import quantize_linears
from litmini.methods.reference import at_start
from litmini.models import gemma2, llama, mamba2, mixtral, qwen3_5, qwen3_moe
from litmini.tasks import setup
from litmini.training import compile as training_compile
from litmini.training.compile import COMPILE_THRESHOLD, compile_training, is_worth_compiling
from litmini.training.low_memory import checkpoint_activations
from litmini.training.setup import on_device

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("compile_model", [compile_decoding, lambda model: compile_training(model, torch.bfloat16)])
def test_a_gpu_without_a_compiler_is_refused(compile_model, monkeypatch):
    """And not at the first kernel, with the error of Triton's build."""
    model = llama.Model(llama.PRESETS["tiny"])
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(model, "parameters", lambda: iter([on_gpu]))
    monkeypatch.setattr("litmini.ops.fused_loss.has_triton", lambda device: False)
    with pytest.raises(UserError, match="install gcc and python3-dev"):
        compile_model(model)


def test_compile_refuses(tiny_dir, tmp_path, monkeypatch):
    base = ["generate.py", "--checkpoint_dir", tiny_dir, "--prompt=Hi", "--compile"]
    assert "not for --bits 4" in run(*base, "--bits=4", status=1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not there" in run(*base, status=1)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "Hi", "completion": "Ho"}) + "\n")
    train = [
        "finetune_lora.py",
        *base[1:3],
        "--data.path",
        data,
        "--out_dir",
        tmp_path / "out",
        "--data.max_seq_len=64",
    ]
    assert "no-such-compiler is not there" in run(*train, "--compile=true", status=1)
    assert "not with --adapters" in run("serve.py", *base[1:3], "--compile", "--adapters={a: b}", status=2)


@pytest.mark.parametrize("family", [mixtral, qwen3_moe])
def test_stacked_experts_compile_in_bf16_alone(family):
    """torch.compile would fail in the first step: it knows no grouped products of fp32 and, on most GPUs, of fp16."""
    model = family.Model(family.PRESETS["tiny"])
    assert compilable(model, torch.bfloat16)
    for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16")):
        assert not compilable(model, dtype)
        with pytest.raises(UserError, match=f"experts in bf16, but not in {name}"):
            compile_training(model, dtype)
    with pytest.raises(UserError, match="experts in bf16, but not in fp32"):
        compile_decoding(model)
    for other in (llama, mamba2, qwen3_5):  # convolutions are no experts
        assert compilable(other.Model(other.PRESETS["tiny"]), torch.float32)


def test_auto_compiles_long_runs_where_it_can(monkeypatch):
    cpu = torch.device("cpu")
    assert not is_worth_compiling(0.9 * COMPILE_THRESHOLD["cpu"], cpu)
    assert is_worth_compiling(COMPILE_THRESHOLD["cpu"], cpu)
    assert not is_worth_compiling(1e30, torch.device("mps"))  # nobody has measured it there
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not is_worth_compiling(1e30, cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or None)
    assert is_worth_compiling(COMPILE_THRESHOLD["cuda"], torch.device("cuda"))
    assert not is_worth_compiling(0.9 * COMPILE_THRESHOLD["cuda"], torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not is_worth_compiling(1e30, torch.device("cuda"))  # torch.compile would refuse it


def test_auto_counts_the_rows_that_there_are():
    """Not those of a whole batch, where the data are fewer, nor those of other epochs."""
    rows = SimpleNamespace(batches=lambda rows, micro, rank, world: [row + 1 for row in rows][rank::world])
    assert setup.planned_flops(sum, setup.Data(None, rows, None, [], 3, 64, 4), 1) == 1 + 2 + 3
    data = setup.Data(None, rows, None, [], 9, 2, 1)
    assert setup.planned_flops(sum, data, 1) == (1 + 2) * 9 / 2
    assert setup.planned_flops(sum, data, 2) == 1 * 9 / 2


@pytest.mark.parametrize(
    ("family", "dtype", "on"), [(llama, "float32", True), (mixtral, "float32", False), (mixtral, "bfloat16", True)]
)
def test_auto_leaves_what_cannot_be_compiled(family, dtype, on, monkeypatch, capsys):
    monkeypatch.setattr(setup, "planned_flops", lambda *_: 1e30)
    fabric = SimpleNamespace(world_size=1, device=torch.device("cpu"), broadcast=bool, print=print)
    model = family.Model(family.PRESETS["tiny"])
    assert setup._worth_compiling(fabric, model, getattr(torch, dtype), None, None) is on
    assert f"compile auto: {'on' if on else 'off'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked, device, on", [(None, "cpu", False), (None, "cuda", True), ("auto", "cpu", True), (False, "cuda", False)]
)
def test_auto_is_the_default_on_gpus(asked, device, on):
    assert setup.is_auto(asked, torch.device(device)) is on


@pytest.mark.parametrize("worth", [1e6, 1e30])
def test_auto_decides_by_the_operations_of_the_whole_run(worth, tiny_dir, tmp_path, monkeypatch):
    """And decides the same when it goes on."""
    data, out, made = tmp_path / "data.jsonl", tmp_path / "out", []
    data.write_text("".join(json.dumps({"prompt": "Hi", "completion": f"Ho {i}"}) + "\n" for i in range(8)))
    monkeypatch.setattr(training_compile, "compile_training", lambda model, dtype: made.append(model))
    monkeypatch.setitem(COMPILE_THRESHOLD, "cpu", worth)
    words = ["--checkpoint_dir", tiny_dir, "--data.path", data, "--out_dir", out, "--data.max_seq_len=64"]
    words += ["--compile=auto", "--train.epochs=4", "--train.save_every=1", "--eval.samples=0"]
    said = [run("finetune_lora.py", *words)]
    shutil.rmtree(out / "final")
    shutil.rmtree(max(out.glob("step-*")))
    (out / "report.html").unlink()
    said.append(run("finetune_lora.py", *words, "--resume=auto"))
    on = worth < 1e30
    assert len(made) == 2 * on
    lines = {line for text in said for line in text.splitlines() if line.startswith("compile auto")}
    assert len(lines) == 1 and f"compile auto: {'on' if on else 'off'}, for " in lines.pop()


def packed(seed: int, rows: int = 2, new: float = 0.1) -> dict[str, torch.Tensor]:
    """Rows of documents of other lengths with each seed; each token begins one with probability `new`."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 512, (rows, 48), generator=g)
    starts = torch.rand(rows, 48, generator=g) < new
    starts[:, 0] = True
    documents = starts.cumsum(1)
    at = torch.arange(48).expand(rows, -1)
    positions = at - torch.where(starts, at, 0).cummax(1).values
    return {"tokens": tokens, "positions": positions, "documents": documents, "labels": tokens.roll(-1, 1)}


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(("family", "recompute", "backend"), [(llama, True, "aot_eager"), (gemma2, False, "eager")])
def test_training_equals_what_is_not_compiled_and_compiles_once(family, recompute, backend, fresh):
    torch.manual_seed(0)
    plain = family.Model(family.PRESETS["tiny"])
    plain.init_weights()
    add_adapters(plain, LoraConfig(rank=4))
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    compiled = copy.deepcopy(plain)
    compile_training(compiled, torch.float32, backend)
    if recompute:
        checkpoint_activations(compiled)
    models = (plain, compiled)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.0) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        keep_casts(model, optimizer)
    graphs = []
    for seed in range(4):
        found = []
        for model, optimizer in zip(models, optimizers, strict=True):
            loss, _ = model.train()(**packed(seed))
            loss.backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad} | {"loss": loss})
            optimizer.step()
            model.zero_grad()
        assert_gradients_close(found[1], found[0])
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[-1] <= 8, graphs  # some parts around the loop over documents, shared by all blocks
    compiled.eval()(packed(9)["tokens"][:, :7])
    assert counters["stats"]["unique_graphs"] == graphs[-1]


@pytest.mark.parametrize("options", ["", "lora", "lora recomputed", "4 bits lora some"])
@pytest.mark.parametrize("family", [llama, mixtral])
def test_through_varlen_a_block_is_one_graph_for_all_packed_batches(family, options, fresh, monkeypatch):
    """As a GPU compiles: for the size of packed sequences, whatever their documents; then once for another number of rows."""
    monkeypatch.setattr(torch.compiler.config, "dynamic_sources", "")
    monkeypatch.setattr(varlen_kernel, "calls", [])
    model = family.Model(family.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    model.bfloat16()
    if "4 bits" in options:
        quantize_linears(model)
    if "lora" in options:
        add_adapters(model, LoraConfig(rank=4, targets=["q_proj", "o_proj"] if "some" in options else ["all-linear"]))
    compile_training(model, torch.bfloat16, "aot_eager", static=True)
    if "recomputed" in options:
        checkpoint_activations(model)
    graphs = []
    for seed, (rows, new) in enumerate([(2, 0.1), (2, 0.3), (2, 0.7), (2, 0.02), (1, 0.1), (1, 0.5), (2, 0.1)]):
        batch = on_device(packed(seed, rows, new), torch.device("cpu"), "varlen")
        model.train()(**batch)[0].backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"] and varlen_kernel.calls
    first = 2 if "lora" in options else 1  # the first block's input needs no gradient
    assert graphs == [first] * 4 + [2 * first] * 3, graphs


def test_a_reference_and_sequences_of_any_size_stay_compiled(fresh, monkeypatch):
    """As policy optimization runs a model: without gradients, without its adapters, and with both."""
    monkeypatch.setattr(torch.compiler.config, "dynamic_sources", "")
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    model.bfloat16()
    add_adapters(model, LoraConfig(rank=4))
    compile_training(model, torch.bfloat16, "eager", static=True)
    graphs = []
    for rows, length in ((4, 40), (4, 56), (2, 64), (3, 72), (2, 40)):
        tokens = torch.randint(0, 512, (rows, length))
        batch = {"tokens": tokens, "documents": torch.ones_like(tokens), "labels": tokens}
        batch = on_device({**batch, "positions": torch.arange(length).expand(rows, -1)}, torch.device("cpu"), "varlen")
        model.train()
        with torch.no_grad():
            model(**batch)
            with at_start(model):
                model(**batch)
        model(**batch)[0].backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [4, 8, 12, 12, 12]  # for one size, one number of sequences, and any


def test_importing_attention_and_methods_imports_no_compiler():
    """torch._dynamo takes a second: only who compiles waits for it."""
    code = "import sys, litmini.ops.attention, litmini.methods.registry; assert 'torch._dynamo' not in sys.modules"
    code += "; from litmini.ops import attention; import torch; one = torch.ones(1, 1, 2, 4)"
    code += "; mask = attention.make_mask(torch.arange(2)[None], torch.ones(1, 2), None, None)"
    code += "; attention.attend(one, one, one, mask); assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_documents_a_block_is_one_graph(fresh):
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights()
    compile_training(model, torch.float32, "aot_eager")
    for length in (20, 33, 47):
        tokens = torch.randint(0, 512, (2, length))
        model.train()(tokens, labels=tokens)[0].backward()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2, counters


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = LoRALinear(torch.nn.Linear(16, 24, bias=False).requires_grad_(False), rank=4, alpha=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.tanh())


def test_adapters_are_summed_in_place(fresh):
    """The compiler's own addmm would copy the delta, as large as the output, first."""
    model = torch.nn.ModuleList([Block()])
    compile_training(model, torch.float32)
    x = torch.randn(8, 16, requires_grad=True)
    model[0].train()(x).sum().backward()
    with torch.profiler.profile() as seen:
        model[0](x).sum().backward()
    names = [event.name for event in seen.events()]
    assert names.count("aten::addmm_") == 2 and "aten::addmm" not in names  # forward and backward
