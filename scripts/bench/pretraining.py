"""Compare litmini's pretraining with a plain loop like nanoGPT's: the same model, text and settings, in turns.

    python scripts/bench/pretraining.py --config config_hub/pretrain/char.yaml --out_dir out/benchmark

Prepare the corpus of char.yaml first (see that file). Both train the same GPT-2 and alternate every 20 steps, so that other
load on the machine slows both; the result is the median of these turns. At the end, both models are evaluated on all
validation text. litmini also writes its run directory.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litmini.cli import command
from litmini.config.pretrain import PretrainConfig
from litmini.data.pretrain.windows import TokenWindows
from litmini.distributed.fabric import make_fabric
from litmini.runs.directory import RunDirectory
from litmini.tasks.pretrain import blueprint, prepare_data
from litmini.tasks.setup import make_setup
from litmini.training.loop import fit, validate
from litmini.training.objective import LanguageModeling
from litmini.training.optimizer import learning_rate

TURN = 20


@dataclass(kw_only=True)
class BenchmarkConfig(PretrainConfig):
    """Settings of benchmark.py: those of pretrain.py."""


class PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.attn_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.mlp_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, vocab: int, dim: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.h = nn.ModuleList(PlainBlock(dim, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if "_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), labels.flatten(), reduction=reduction)


def plain_training(
    config: BenchmarkConfig, shape: Any, tokens: np.ndarray, total: int
) -> tuple[nn.Module, Callable[[int], None]]:
    """Return the model, and a function that trains it up to a step."""
    torch.manual_seed(config.seed)
    model = PlainGPT(shape.vocab_size, shape.dim, shape.n_layers, shape.n_heads, shape.max_positions)
    o, length, batch = config.optim, config.data.max_seq_len, config.train.global_batch_size
    assert batch is not None, "chosen with the data"
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas)
    step = 0

    def train(until: int) -> None:
        nonlocal step
        model.train()
        while step < until:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, o)
            starts = torch.randint(len(tokens) - length, (batch,)).tolist()
            x = torch.stack([torch.from_numpy(tokens[i : i + length].astype(np.int64)) for i in starts])
            y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
            loss = model(x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            step += 1

    return model, train


def main(config: BenchmarkConfig) -> None:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, val_rows=None))
    directory, fabric, plan = RunDirectory(config), make_fabric(config), blueprint(config)
    data, objective = prepare_data(fabric, config, plan), LanguageModeling()
    assert isinstance(data.train, TokenWindows) and isinstance(data.val, TokenWindows)
    windows, total = data.train, data.total_steps
    model = plan.model(torch.float32, config.seed)
    setup = make_setup(directory, fabric, data, model, plan.saver(model, data.tokenizer))
    tokens = np.concatenate([np.fromfile(shard.file, shard.dtype) for shard in windows.shards[0]])
    plain, train_plain = plain_training(config, plan.config, tokens, total)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, plain)]
    turns: dict[str, list[float]] = {"litmini": [], "plain": []}
    batch = data.global_batch_size

    def train_litmini(until: int) -> None:
        fit(setup, objective, stop_after=until)

    for turn, until in enumerate(range(TURN, total + 1, TURN)):
        sides = [("litmini", train_litmini), ("plain", train_plain)]
        for name, train in sides if turn % 2 else sides[::-1]:
            started = time.perf_counter()
            train(until)
            turns[name].append(time.perf_counter() - started)
    plain.eval()
    with torch.no_grad():
        parts = list(data.val.batches(range(len(data.val)), 64))
        sums = [plain(part["tokens"], part["labels"], reduction="sum") for part in parts]
    losses = {
        "litmini": validate(setup, objective).get("loss", 0.0),
        "plain": float(sum(sums)) / sum(part["labels"].numel() for part in parts),
    }
    for name, size in zip(turns, sizes, strict=True):
        each = statistics.median(turns[name]) / TURN
        print(
            f"{name:8} {size:,} parameters, {each * 1e3:.1f} ms a step, {batch * config.data.max_seq_len / each:,.0f} "
            f"tokens/s, validation loss {losses[name]:.4f}"
        )
    faster = statistics.median(p / o for o, p in zip(turns["litmini"], turns["plain"], strict=True))
    print(f"litmini is {faster:.2f} times as fast")


if __name__ == "__main__":
    command(main, BenchmarkConfig, __doc__)
