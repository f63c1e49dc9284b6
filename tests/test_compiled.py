"""--compile: the same losses, gradients and answers, from one compilation that all blocks share."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_generation import PROMPTS, generate_batch, random_model
from test_scripts import run
from torch._dynamo.utils import counters

from litmini import attention, compiled, finetune
from litmini.adapters import add_adapters
from litmini.cache import KVCache
from litmini.compiled import WORTH, compile_decoding, compile_training, pays
from litmini.config import TrainConfig
from litmini.finetune_config import LoraConfig
from litmini.launch import checkpoint_activations
from litmini.models import gemma2, llama

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def decode(model: llama.Model, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of each token after the first `start`, which are read at once."""
    cache = KVCache(model.config, 1, tokens.shape[1] + start, next(model.parameters()).dtype)
    with torch.inference_mode():  # as generation does
        parts = [model(tokens[:, :start], cache=cache)[:, -1:]]
        parts += [model(part, cache=cache) for part in tokens[:, start:].split(1, 1)]
    return torch.cat(parts, 1).float()


def test_compiled_logits_are_no_less_exact():
    """In bf16, beyond the window too, and for other prompts without another compilation."""
    torch.compiler.reset()
    exact, model = random_model("window"), random_model("window").to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())  # the same numbers, computed with in fp32
    cases = [(torch.randint(0, 64, (1, length)), start) for length, start in ((20, 4), (31, 9))]
    truth = [decode(exact, *case) for case in cases]
    plain = [decode(model, *case) for case in cases]
    compile_decoding(model)
    compiled = [decode(model, *cases[0])]
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled.append(decode(model, *cases[1]))
        (answer,) = generate_batch(model, [PROMPTS[0]], 12, [])
    assert len(answer) == 12
    for true, eager, found in zip(truth, plain, compiled, strict=True):
        assert not torch.equal(found, eager)  # it was compiled
        assert 0 < (found - true).square().mean() < 1.2 * (eager - true).square().mean()


def test_bases_of_adapters_stay_what_their_sums_know():
    """A product that is rounded before the change of its adapter comes on top loses most of it."""
    model = llama.Model(llama.PRESETS["tiny"])
    add_adapters(model, LoraConfig(rank=4, targets=["q_proj", "down_proj"]))
    compile_decoding(model)
    block = model.model.layers[0]
    kinds = (block.self_attn.q_proj.base, block.mlp.down_proj.base, block.self_attn.k_proj)
    assert [type(module).__name__ for module in kinds] == ["Linear", "Linear", "OneRowLinear"]


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


def test_auto_compiles_long_runs_where_it_can(monkeypatch):
    cpu = torch.device("cpu")
    assert not pays(0.9 * WORTH["cpu"], cpu) and pays(WORTH["cpu"], cpu)
    assert not pays(1e30, torch.device("mps"))  # nobody has measured it there
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not pays(1e30, cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: name == "triton" or None)
    assert pays(WORTH["cuda"], torch.device("cuda")) and not pays(0.9 * WORTH["cuda"], torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not pays(1e30, torch.device("cuda"))  # torch.compile would refuse it


def test_auto_counts_the_rows_that_there_are():
    """Not those of a whole batch, where the data are fewer, nor those of other epochs."""
    rows = SimpleNamespace(batches=lambda rows, micro, rank, world: [row + 1 for row in rows][rank::world])
    data = SimpleNamespace(train=rows, total_rows=3)
    assert finetune.planned_flops(sum, data, TrainConfig(global_batch_size=64), 1) == 1 + 2 + 3
    data.total_rows = 9
    assert finetune.planned_flops(sum, data, TrainConfig(global_batch_size=2, micro_batch_size=1), 1) == (1 + 2) * 9 / 2
    assert finetune.planned_flops(sum, data, TrainConfig(global_batch_size=2, micro_batch_size=1), 2) == 1 * 9 / 2


@pytest.mark.parametrize("worth", [1e6, 1e30])
def test_auto_decides_by_the_operations_of_the_whole_run(worth, tiny_dir, tmp_path, monkeypatch):
    """And decides the same when it goes on."""
    data, out, made = tmp_path / "data.jsonl", tmp_path / "out", []
    data.write_text("".join(json.dumps({"prompt": "Hi", "completion": f"Ho {i}"}) + "\n" for i in range(8)))
    monkeypatch.setattr(finetune, "compile_training", made.append)
    monkeypatch.setitem(WORTH, "cpu", worth)
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


def packed(seed: int) -> dict[str, torch.Tensor]:
    """Two rows of documents of other lengths with each seed."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 512, (2, 48), generator=g)
    starts = torch.rand(2, 48, generator=g) < 0.1
    starts[:, 0] = True
    documents = starts.cumsum(1)
    at = torch.arange(48).expand(2, -1)
    positions = at - torch.where(starts, at, 0).cummax(1).values
    return {"tokens": tokens, "positions": positions, "documents": documents, "labels": tokens.roll(-1, 1)}


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(attention, "_document_by_document", attention._document_by_document)  # it is replaced
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
    compile_training(compiled, backend)
    if recompute:
        checkpoint_activations(compiled)
    graphs = []
    for seed in range(4):
        found = []
        for model in (plain, compiled):
            loss, _ = model.train()(**packed(seed))
            loss.backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad} | {"loss": loss})
            model.zero_grad()
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[-1] <= 8, graphs  # some parts around the loop over documents, shared by all blocks
    compiled.eval()(packed(9)["tokens"][:, :7])
    assert counters["stats"]["unique_graphs"] == graphs[-1]


def test_without_documents_a_block_is_one_graph(fresh):
    model = llama.Model(llama.PRESETS["tiny"])
    model.init_weights()
    compile_training(model, "aot_eager")
    for length in (20, 33, 47):
        tokens = torch.randint(0, 512, (2, length))
        model.train()(tokens, labels=tokens)[0].backward()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2, counters
