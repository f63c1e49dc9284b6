"""Two processes: sharded or not, they do what one does, share the memory, save together and end together."""

import contextlib
import csv
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import assert_close, assert_gradients_close, difference, ulps
from safetensors.torch import load_file
from torch import nn
from torch.distributed import TCPStore
from two import ROOT, command, run_two, values

from litmini.checkpoints.hf import save_model
from litmini.config.finetune import LoraConfig
from litmini.config.generate import SamplingConfig
from litmini.distributed import processes
from litmini.distributed.fsdp import full_tensor, local_bytes, shard
from litmini.generation.generate import finish_all
from litmini.generation.request import Request
from litmini.methods.adapters import add_adapters
from litmini.methods.dora import DoRALinear
from litmini.methods.heads import use_log_probs, use_scores
from litmini.methods.lora import LoRALinear
from litmini.methods.nf4 import quantize_linears
from litmini.models import FAMILIES, family, llama
from litmini.ops.cross_entropy import IGNORE
from litmini.runs.training_state import SHARDS
from litmini.training.compile import compile_training
from litmini.training.low_memory import checkpoint_activations

DATA = ROOT / "config_hub/quickstart"
METHODS = ["llama 4bit lora recomputed", "llama 4bit dora", "qwen2 dora", "llama pissa", "mixtral 4bit lora"]
pytestmark = pytest.mark.xdist_group("two")  # in one test process, which has one server of processes
DDP, FSDP = (["--devices", 2, "--strategy", name] for name in ("ddp", "fsdp"))


def words(tiny_dir: Path, out_dir: Path, *more: object) -> list[str]:
    fixed = ["--checkpoint_dir", tiny_dir, "--out_dir", out_dir, "--data.path", DATA / "train.jsonl"]
    fixed += ["--data.max_seq_len", 128, "--precision", "32-true", "--optim.lr", "1e-2", "--eval.samples", 0]
    fixed += ["--train.global_batch_size", 3, "--train.micro_batch_size", 1, "--train.max_steps", 4]
    return list(map(str, [*fixed, "--train.save_every", 2, *more]))


def run_alone(script: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / f"scripts/{script}.py"), run_name="__main__")
    assert end.value.code == 0


def run_both(script: str, *arguments: str) -> str:
    """The same command line in two processes; only the first prints."""
    first, second = run_two(command, script, *arguments)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert not second.out
    return first.out


def metrics(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu", "memory_mib")}
            for row in csv.DictReader(file)
        ]


def product(directory: Path) -> dict[str, torch.Tensor]:
    (file,) = (directory / "final").glob("*.safetensors")
    return load_file(file)


def assert_runs_agree(one: Path, two: Path) -> None:
    """Losses, norms and the product of two runs agree; what they count is equal."""
    rows = list(zip(metrics(one), metrics(two), strict=True))
    assert len(rows) == 4
    for a, b in rows:
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        for name in ("loss", "grad_norm", "val_loss"):
            assert float(b[name] or 0) == pytest.approx(float(a[name] or 0), rel=ulps()), name
    ours, theirs = product(one), product(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Adam divides by a gradient's size: where there is next to none, rounding decides on the update
        assert difference(theirs[name], ours[name]) <= 1e-3, name


def test_new_tokens_of_a_tied_head_are_sharded_and_resume(tokenizer_dir, tmp_path):
    """Embedding, head and the trained rows that both share are shards; one process and two agree, and resume exactly."""
    config = llama.Config(**{**vars(llama.PRESETS["tiny"]), "tied": True})
    model = llama.Model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (tmp_path / "base").mkdir()
    save_model(tmp_path / "base", llama.config_to_hf(config), state.items(), side_files=tokenizer_dir)
    more = ["--data.new_tokens", '["this order", "one line"]', "--lora.rank", 2]
    one, two = (words(tmp_path / "base", tmp_path / name, *more) for name in ("one", "two"))
    two += map(str, FSDP)
    run_alone("finetune_lora", *one)
    assert "new tokens: this order 512, one line 513; rows from 512" in run_both("finetune_lora", *two)
    assert_runs_agree(tmp_path / "one", tmp_path / "two")
    (rows,) = [tensor for name, tensor in product(tmp_path / "one").items() if "trainable_tokens" in name]
    assert rows.shape == (2, 64) and difference(rows, state["model.embed_tokens.weight"].mean(0).expand(2, -1)) > 0.1
    whole_run = product(tmp_path / "two")
    forget(tmp_path / "two")
    run_both("finetune_lora", *two, "--resume", "auto")
    assert all(torch.equal(tensor, whole_run[key]) for key, tensor in product(tmp_path / "two").items())


def forget(run: Path) -> None:
    """Make a finished run one that was killed after step 3."""
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "step-000004")


@pytest.mark.parametrize("script", ["finetune_full", "finetune_qlora"])
def test_sharded_equals_one_process_and_resumes_on_any_number(tiny_dir, tmp_path, script):
    """Requirements 2, 3, 22 and 24: accumulation, evaluation, answers, steps with fewer rows than the ranks want."""
    more = [
        "--data.val_path",
        DATA / "heldout.jsonl",
        "--train.eval_every",
        2,
        "--train.sample_every",
        3,
        "--eval.samples",
        2,
    ]
    one, two = (words(tiny_dir, tmp_path / name, *more, "--eval.max_new_tokens", 2) for name in ("one", "two"))
    two += map(str, [*FSDP, "--train.checkpoint_activations"])
    run_alone(script, *one)
    assert "parameters are sharded over 2 processes" in run_both(script, *two)
    assert_runs_agree(tmp_path / "one", tmp_path / "two")
    shares = list((tmp_path / "two/step-000002/training_state").glob("*.safetensors"))
    sizes = [file.stat().st_size for file in shares]
    assert len(shares) == 2 and max(sizes) < 1.3 * min(sizes)
    whole_run, rows = product(tmp_path / "two"), metrics(tmp_path / "two")
    forget(tmp_path / "two")
    assert "resuming from" in (said := run_both(script, *two, "--resume", "auto")) and "note:" not in said
    assert metrics(tmp_path / "two") == rows
    assert all(torch.equal(tensor, whole_run[name]) for name, tensor in product(tmp_path / "two").items())
    forget(tmp_path / "two")  # shares, read by one process that is not sharded
    run_alone(script, *two, "--resume", "auto", "--devices", "1", "--strategy", "auto")
    assert_runs_agree(tmp_path / "one", tmp_path / "two")
    forget(tmp_path / "one")  # and the other way round
    said = run_both(script, *one, "--resume", "auto", *map(str, FSDP))
    assert "note: devices: 1 -> 2, strategy: auto -> fsdp. Each step has the same sequences" in said
    assert_runs_agree(tmp_path / "two", tmp_path / "one")


def test_replicas_equal_one_process(tiny_dir, tmp_path):
    """Requirement 2: ranks with more targets weigh more; the last rows are fewer than the ranks want."""
    more = ["--data.val_path", DATA / "heldout.jsonl", "--train.eval_every", 2, "--data.pack", "false"]
    run_alone("finetune_lora", *words(tiny_dir, tmp_path / "one", *more))
    run_both("finetune_lora", *words(tiny_dir, tmp_path / "two", *more, *DDP))
    assert_runs_agree(tmp_path / "one", tmp_path / "two")


def test_a_missing_or_damaged_shard_is_named(tiny_dir, tmp_path):
    arguments = [*words(tiny_dir, tmp_path / "run", "--train.max_steps", 2), *map(str, FSDP)]
    run_both("finetune_lora", *arguments)
    shutil.rmtree(tmp_path / "run/final")
    share = max((tmp_path / "run/step-000002/training_state").iterdir())
    share.write_bytes(share.read_bytes()[:-100])
    ended = run_two(command, "finetune_lora", *arguments, "--resume", "auto")
    step = share.parent.parent
    assert said_once(ended).startswith(f"error: {step} is damaged ({SHARDS}/{share.name} changed since it was written)")
    share.unlink()
    ended = run_two(command, "finetune_lora", *arguments, "--resume", "auto")
    assert said_once(ended).startswith(f"error: {step} is damaged ({SHARDS}/{share.name} changed since it was written)")


def said_once(ended: list[Any]) -> str:
    """The one error that two processes gave, with which both ended."""
    assert all(end.status == 1 for end in ended), [(end.status, end.err) for end in ended]
    text = "".join(end.err for end in ended)
    assert text.count("error: ") == 1 and "Traceback" not in text, text
    return next(line for line in text.splitlines() if line.startswith("error: "))


def test_one_error_is_given_whoever_has_it(tiny_dir, tmp_path):
    everywhere = words(tiny_dir / "none", tmp_path / "run", *FSDP)
    assert "checkpoint directory not found" in said_once(run_two(command, "finetune_lora", *everywhere))
    started = time.monotonic()
    ended = run_two(command_of_rank, words(tiny_dir, tmp_path / "run", *DDP), ["--data.path", "nowhere.jsonl"])
    assert "nowhere.jsonl" in said_once(ended) and ended[1].err
    assert time.monotonic() - started < 60


def command_of_rank(same: list[str], second: list[str]) -> None:
    command("finetune_lora", *same, *(second if os.environ["RANK"] == "1" else []))


@contextlib.contextmanager
def started(tiny_dir: Path, out: Path) -> Iterator[subprocess.Popen]:
    """A run of two processes that Fabric starts, once it has saved a checkpoint; it is killed at the end."""
    arguments = words(tiny_dir, out, *DDP, "--train.max_steps", 10_000)
    line = [sys.executable, str(ROOT / "scripts/finetune_lora.py"), *arguments]
    first = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        while not list(out.glob("step-*")):
            assert first.poll() is None
            time.sleep(0.05)
        yield first
    finally:
        first.kill()


def test_the_death_of_a_started_process_ends_the_run(tiny_dir, tmp_path):
    """The processes that Fabric starts, one of them killed; what was saved is gone on from."""
    with started(tiny_dir, tmp_path / "run") as first:
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        (child,) = [n for n in children if b"finetune_lora.py" in Path(f"/proc/{n}/cmdline").read_bytes()]
        os.kill(int(child), signal.SIGKILL)
        _, error = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "error: process 1 was killed by signal 9. Continue with --resume auto." in error and "Traceback" not in error


def test_started_processes_end_with_the_first(tiny_dir, tmp_path):
    with started(tiny_dir, tmp_path / "run") as first:
        first.kill()
        _, error = first.communicate(timeout=60)  # returns when the other process has closed the pipe, too
    assert first.returncode == -signal.SIGKILL and "Traceback" not in error


def test_the_first_process_outlives_the_shell_that_started_it(monkeypatch):
    """A run in the background, one process on each node: nobody watches the shell."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(processes, "_failures", None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    strategy = SimpleNamespace(launcher=None)
    processes.join(SimpleNamespace(world_size=2, local_rank=0, global_rank=0, strategy=strategy))
    assert "watch" not in {thread.name for thread in threading.enumerate()}


def test_two_nodes_started_by_torchrun(tiny_dir, tmp_path):
    run_alone("finetune_lora", *words(tiny_dir, tmp_path / "one"))
    more = map(str, ["--devices", 1, "--num_nodes", 2, "--strategy", "fsdp"])
    values(run_two(torchrun, "finetune_lora", *words(tiny_dir, tmp_path / "two"), *more, timeout=180))
    assert_runs_agree(tmp_path / "one", tmp_path / "two")


def torchrun(script: str, *arguments: str) -> None:
    """`torchrun` on this node, the number of which is the rank."""
    from torch.distributed.run import main

    node, port = os.environ["RANK"], os.environ["MASTER_PORT"]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        del os.environ[name]
    nodes = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", node, "--master_addr", "127.0.0.1"]
    main([*nodes, "--master_port", port, str(ROOT / f"scripts/{script}.py"), *arguments])


def gradients_sharded_and_not(names: list[str]) -> dict[str, tuple[int, int]]:
    """Compare the loss and all gradients of each model, sharded, with those of the same model as it is."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    rank, mesh, held = dist.get_rank(), init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",)), {}
    for name in names:
        expected, plain = gradients(build(name, "cpu"), [0, 1])
        model = shard(build(name, "meta" if rank else "cpu"), mesh)  # only rank 0 has the values
        held[name] = local_bytes(model)
        found, ours = gradients(model, [rank])
        dist.all_reduce(found)
        assert_close(found, expected)
        assert_gradients_close(ours, plain)
    dist.destroy_process_group()
    return held


def build(name: str, device: str) -> nn.Module:
    kind, *options = name.split()
    torch.manual_seed(0)
    with torch.device(device):
        model = family(kind).Model(family(kind).PRESETS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    if "4bit" in options:
        quantize_linears(model.bfloat16())
    if adapted := {"lora", "pissa", "dora"} & set(
        options
    ):  # in fp32 over frozen bf16; of 3 rows of A, shares of 2 and 1
        head = {"targets": ["all-linear", "lm_head"]} if "lora" in adapted else {"modules_to_save": ["lm_head"]}
        config = LoraConfig(rank=3, init="pissa" if "pissa" in adapted else "zero", **head)
        add_adapters(model.bfloat16(), config, DoRALinear if "dora" in adapted else None)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.lora_B)
    if "recomputed" in options:
        checkpoint_activations(model)
    if "log_probs" in options:
        use_log_probs(model, chunk=5)
    if "scores" in options:
        use_scores(model, 3, torch.Generator().manual_seed(0))
    return model


def gradients(model: Any, rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss of some rows, and the gradients of the mean over both rows, as a rank contributes to them."""
    tokens = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[0, :7] = IGNORE
    finish_all(
        model.eval(), [Request(prompt, SamplingConfig(max_new_tokens=2), []) for prompt in ([1, 2, 3], [4])]
    )  # gathers and frees the weights, and leaves nothing behind
    model.train()
    losses = [model(tokens[row, None], labels=labels[row, None])[0].sum() for row in rows]
    (sum(losses) * 2 / len(rows) / int((labels != IGNORE).sum())).backward()
    there = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sum(losses).detach(), {name: full_tensor(gradient) for name, gradient in there.items()}


def test_sharded_gradients_equal_plain_ones_in_every_family():
    """Tied and untied, experts in one tensor, vectors, adapters; each process holds half the bytes (requirement 24)."""
    names = [*sorted(FAMILIES), "llama lora", "qwen2 lora recomputed", "llama recomputed", *METHODS]
    names += ["llama log_probs", "gemma2 log_probs", "llama lora log_probs", "llama scores"]
    for held in values(run_two(gradients_sharded_and_not, names)):
        assert held.keys() == set(names)
        for name, (mine, every) in held.items():
            assert mine == pytest.approx(every / 2, rel=0.05), name


def test_mixed_precision_gathers_bf16_and_equals_one_process(tiny_dir, tmp_path):
    """Weights and the sum of gradients stay in fp32, so that small updates are kept."""
    more = ["--precision", "bf16-mixed", "--optim.lr", "1e-3", "--data.val_path", DATA / "heldout.jsonl"]
    more += ["--train.sample_every", 3, "--eval.samples", 2, "--eval.max_new_tokens", 2]
    one, two = (words(tiny_dir, tmp_path / name, *more) for name in ("one", "two"))
    run_alone("finetune_full", *one)
    run_both("finetune_full", *two, *map(str, FSDP))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=2**-8)
        assert float(b["grad_norm"]) == pytest.approx(float(a["grad_norm"]), rel=0.05)
    start, ours, theirs = (
        load_file(tiny_dir / "model.safetensors"),
        product(tmp_path / "two"),
        product(tmp_path / "one"),
    )
    for name in theirs:
        assert ours[name].dtype == torch.float32
        assert difference(ours[name] - start[name].float(), theirs[name] - start[name].float()) < 0.3, name


def gathered_dtypes(names: list[str]) -> dict[str, tuple[dict[str, torch.dtype], tuple[int, int]]]:
    """Return the dtype in which each parameter of the first block is gathered, and the bytes that a process holds."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",)), {}
    for name in names:
        model = build(name, "cpu")
        expected, plain = mixed_gradients(model, [0, 1])
        model = shard(model, mesh, mixed=True)
        if "compiled" in name:
            compile_training(model, torch.bfloat16, "aot_eager", static=True)
        held, dtypes = local_bytes(model), {}
        block = next(module for module in model.modules() if type(module).__name__.endswith("Block"))
        note(block, dtypes)
        loss, ours = mixed_gradients(model, [dist.get_rank()])
        dist.all_reduce(loss)
        assert difference(loss, expected) < 1e-3, name
        for parameter, gradient in plain.items():
            assert difference(ours[parameter], gradient) < 0.02, (name, parameter)
        found[name] = dtypes, held
    dist.destroy_process_group()
    return found


def note(block: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, module in block.named_modules():
        module.register_forward_pre_hook(
            lambda m, _, n=name: dtypes.update({f"{n}.{k}": p.dtype for k, p in m.named_parameters(recurse=False)})
        )


def mixed_gradients(model: Any, rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        return gradients(model, rows)


def test_what_autocast_does_not_round_is_gathered_in_fp32():
    names = [
        "llama",
        "gpt2",
        "llama compiled",
        "qwen3 recomputed",
        "mixtral",
        "llama lora",
        "qwen2 dora",
        "llama 4bit lora",
    ]
    for found in values(run_two(gathered_dtypes, names)):
        for name, (dtypes, (mine, every)) in found.items():
            assert mine == pytest.approx(every / 2, rel=0.05), name
            plain = not {"lora", "dora", "4bit"} & set(name.split())
            for parameter, dtype in dtypes.items():
                rounded = plain and "norm" not in parameter and "ln_" not in parameter
                assert (dtype == torch.bfloat16) == rounded or not plain, (name, parameter, dtype)
