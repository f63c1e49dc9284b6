"""Checks of one checkpoint: its bits through import and export, its logits through every way of running it, the same
training with and without accumulation and resuming. Each is small, runs in fp32 and leaves the model as it was.
"""

import contextlib
import dataclasses
import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.checkpoints.config import disk_tensors, empty_model, model_tensors, parameter_names, read_config
from litmini.checkpoints.safetensors_io import read_tensors, shards
from litmini.config.finetune import LoraConfig
from litmini.config.training import OptimConfig, TrainConfig
from litmini.methods.adapters import adapters, add_adapters, merge_adapters, remove_adapters, restore_adapters
from litmini.methods.lora import LoRALinear
from litmini.ops.cross_entropy import IGNORE
from litmini.ops.kv_cache import KVCache
from litmini.runs.training_state import load_state, save_state
from litmini.training.loop import fit
from litmini.training.objective import Batch, LanguageModeling
from litmini.training.optimizer import make_optimizer
from litmini.training.setup import Progress, Recorder, Setup

BOUND = 1e-4  # of the largest logit, or of the largest update: how much fp32 sums in another order differ
TEXTS = (
    "The lighthouse stood at the end of a narrow road that followed the coast for several miles, and every evening, "
    "shortly before sunset, the keeper climbed the stairs, lit the lamp, and wrote a few lines about the weather.",
    "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "Die Hauptstadt von Frankreich ist Paris. La capitale de l'Allemagne est Berlin. 1, 2, 3, 5, 8, 13, 21, 34, 55.",
    '{"item": "teapot", "quantity": 4, "size": "L", "city": "Lisbon"} is one line of JSON; the next one is shorter.',
)


@dataclass
class Check:
    """The outcome of one check."""

    name: str
    passed: bool | None
    """None: skipped."""
    measured: dict[str, float] = field(default_factory=dict)
    note: str = ""


def sequences(tokenizer: Any, model: nn.Module, device: torch.device | str) -> Tensor:
    """Return the token ids (4, T) of the texts, as long as the shortest and the model's context allow."""
    config: Any = model.config
    ids = [tokenizer.encode(text) for text in TEXTS]
    length = min([48, config.max_positions, *map(len, ids)])
    return torch.tensor([row[:length] for row in ids], device=device)


def compare_logits(name: str, ours: Tensor, theirs: Tensor, bound: float = BOUND) -> Check:
    """Compare logits (..., vocab) with those of a reference."""
    ours, theirs = ours.flatten(0, -2).double(), theirs.flatten(0, -2).double()
    difference, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    p = theirs.log_softmax(-1)
    divergence = float(F.kl_div(ours.log_softmax(-1), p, log_target=True, reduction="batchmean").clamp(min=0))
    same = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    measured = {"max_difference": difference, "kl": divergence, "top1_agreement": same, "largest_logit": scale}
    return Check(name, difference <= bound * max(scale, 1.0), measured)


def check_bits(directory: Path) -> Check:
    """Compare the bits of every tensor of the files with those after import and export."""
    module, config = read_config(directory)
    names = parameter_names(empty_model(directory)[1])
    own = module.owns if hasattr(module, "owns") else None  # all else of a multimodal checkpoint is carried through
    files = shards(directory)
    inside = ((n, t) for n, t in model_tensors(module, config, read_tensors(files, only=own)) if n in names)
    back = dict(_hashes(disk_tensors(module, config, inside)))
    before = dict(_hashes(read_tensors(files, only=own)))
    changed = [name for name, value in back.items() if before.get(name, before.get(name.partition(".")[2])) != value]
    note = f"changed: {', '.join(changed[:3])}" if changed else ""
    measured = {"tensors": float(len(back)), "changed": float(len(changed)), "left_out": float(len(before) - len(back))}
    return Check("import and export, bit by bit", not changed, measured, note)


def _hashes(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    for name, tensor in tensors:
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        yield name, f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


@torch.no_grad()
def check_cache(model: nn.Module, tokens: Tensor) -> Check:
    """Compare a prompt and single tokens through the cache with one forward without it."""
    T = tokens.shape[1]
    cache = KVCache(model.config, len(tokens), T, torch.float32, tokens.device)
    half = max(1, T // 2)
    parts = [model(tokens[:, :half], cache=cache)]
    parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(half, T)]
    return compare_logits("cached = uncached", torch.cat(parts, 1), model(tokens))


@torch.no_grad()
def check_packing(model: nn.Module, tokens: Tensor) -> Check:
    """Compare two documents packed into one sequence with each alone."""
    T = tokens.shape[1] // 2
    a, b = tokens[0, : T + 1], tokens[1, :T]
    packed = torch.cat((a, b))[None]
    positions = torch.cat((torch.arange(len(a)), torch.arange(len(b))))[None].to(tokens.device)
    documents = torch.cat((torch.full((len(a),), 1), torch.full((len(b),), 2)))[None].to(tokens.device)
    alone = torch.cat((model(a[None]), model(b[None])), 1)
    return compare_logits("packed = unpacked", model(packed, positions=positions, documents=documents), alone)


def random_adapter(model: nn.Module, seed: int, dropout: float = 0.0) -> None:
    """Add LoRA of rank 4 over every linear but the head, with a B that is not zero."""
    torch.manual_seed(seed)
    add_adapters(model, LoraConfig(rank=4, alpha=8.0, dropout=dropout))
    for adapter in adapters(model).values():
        assert isinstance(adapter, LoRALinear)
        nn.init.normal_(adapter.lora_B, std=0.02)


@contextlib.contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """Remove the model's own adapters meanwhile."""
    own = remove_adapters(model)
    try:
        yield
    finally:
        restore_adapters(model, own)


@torch.no_grad()
def check_merge(model: nn.Module, tokens: Tensor) -> Check:
    """Compare an adapter over its base, the model's own or a random one, with the merged weights.

    In fp32: saving in bf16 rounds the sum once.
    """
    own = adapters(model)
    with _bare(model):
        base = model(tokens)
    if not own:
        random_adapter(model, seed=1)
    unmerged = model(tokens)
    replaced = merge_adapters(model)
    merged = model(tokens)
    restore_adapters(model, replaced)
    if not own:
        remove_adapters(model)
    check = compare_logits("merged = unmerged", merged, unmerged)
    check.measured["effect"] = float((unmerged - base).abs().max())
    check.passed = bool(check.passed) and check.measured["effect"] > check.measured["max_difference"]
    return check


@dataclass(frozen=True)
class BatchList:
    """Training data as a list: for each step its micro-batches, the same on every rank. For checks without a data set."""

    steps: list[list[Batch]]

    @property
    def total_steps(self) -> int:
        return len(self.steps)

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        return self.steps[step]

    def validation_batches(self, rank: int, world: int) -> None:
        return None

    def locations(self, step: int, rank: int, world: int) -> list[list[str]]:
        return []


def _train(
    model: nn.Module, batches: list[list[dict[str, Tensor]]], optim: OptimConfig, state: Path, stop: int | None = None
) -> None:
    """Train the adapters of `model`, resuming from `state` if it exists; save it after step `stop`."""
    from lightning_fabric import Fabric

    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    fabric = Fabric(accelerator="cuda" if on_gpu else "cpu", devices=[device.index or 0] if on_gpu else 1)
    wrapped, optimizer = fabric.setup(model, make_optimizer(model, optim))
    progress = load_state(state, model, optimizer) if state.is_dir() else Progress()
    constant = dataclasses.replace(optim, schedule="constant", warmup_steps=0, max_grad_norm=None)
    setup = Setup(fabric, wrapped, optimizer, BatchList(batches), TrainConfig(), constant, 7, progress, Recorder())
    with contextlib.redirect_stdout(io.StringIO()):
        done = fit(setup, LanguageModeling(), stop)
    if stop:
        state.mkdir()
        save_state(state, done, model, optimizer)
    model.eval()


def _batch(tokens: Tensor, targets: list[int]) -> dict[str, Tensor]:
    """Return sequences of which the first tokens are targets, as many as `targets` says for each."""
    labels = tokens.roll(-1, 1).clone()
    for row, count in enumerate(targets):
        labels[row, count:] = IGNORE
    return {"tokens": tokens, "labels": labels, "documents": torch.ones_like(tokens)}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    remove_adapters(model)
    return trained


class _InEvaluationMode(nn.Module):
    """A model that is trained in evaluation mode.

    It has no dropout, which would draw other masks, and no balance loss of experts, which is that of each micro-batch.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model.eval(), model.config

    def train(self, mode: bool = True) -> "_InEvaluationMode":
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def check_accumulation(model: nn.Module, tokens: Tensor) -> Check:
    """Compare one step on four sequences at once with four micro-batches of one sequence and different target counts."""
    targets = [tokens.shape[1] - 1, 3, 1, tokens.shape[1] // 2]
    cut = [[_batch(tokens, targets)], [_batch(tokens[i : i + 1], [n]) for i, n in enumerate(targets)]]
    updates = []
    with _bare(model):
        for micro_batches in cut:
            random_adapter(model, seed=2)
            before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            _train(_InEvaluationMode(model), [micro_batches], OptimConfig(name="sgd", lr=1.0), Path("none"))
            updates.append(torch.cat([(p - before[name]).flatten() for name, p in _trained(model).items()]))
    error = float((updates[0] - updates[1]).norm() / updates[0].norm())
    return Check("accumulated = at once", error <= BOUND, {"relative_difference": error})


def check_resume(model: nn.Module, tokens: Tensor) -> Check:
    """Compare two steps with one step, saved and loaded into other adapters, and one more; with dropout, bit by bit."""
    batches = [[_batch(tokens[:2], [9, 4])], [_batch(tokens[2:], [2, 9])]]
    optim, results = OptimConfig(lr=1e-2, weight_decay=0.1), []
    with tempfile.TemporaryDirectory(prefix="litmini-") as directory, _bare(model):
        for state, stops in ((Path(directory) / "none", [None]), (Path(directory) / "step-1", [1, None])):
            for seed, stop in enumerate(stops, 3):
                if adapters(model):
                    remove_adapters(model)
                random_adapter(model, seed, dropout=0.1)
                _train(model, batches, optim, state, stop)
            results.append(_trained(model))
    differing = [name for name, value in results[0].items() if not torch.equal(value, results[1][name])]
    exact = not differing
    worst = max((float((results[0][n] - results[1][n]).abs().max()) for n in differing), default=0.0)
    return Check("resumed = uninterrupted", exact, {"tensors": float(len(results[0])), "max_difference": worst})


SCORE_CHECKS = (check_packing, check_merge)
"""Of a classifier or a reward model, which has no next token to generate or to train on."""
CHECKS = (check_cache, check_packing, check_merge, check_accumulation, check_resume)
