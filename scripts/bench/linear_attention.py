"""Measure the time per token of recurrent layers beside transformers' own fallback in PyTorch.

    OMP_NUM_THREADS=2 python scripts/bench/linear_attention.py

One layer with linear attention of Qwen3.5-0.8B, and one Mamba2 layer of Mamba-2 130M, in fp32, forward and backward, without
the kernels of `flash-linear-attention`, `mamba-ssm` and `causal-conv1d`. Both programs run in turns in one process; times are
medians in us per token. Run this on an otherwise idle machine.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from transformers import Mamba2Config, Qwen3_5TextConfig  # noqa: E402
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer  # noqa: E402
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet  # noqa: E402
from work import hardware, versions  # noqa: E402

from litmini.distributed.fabric import keep_memory  # noqa: E402
from litmini.models import mamba2, qwen3_5  # noqa: E402
from litmini.ops.linear_attention import make_runs  # noqa: E402

LENGTHS, ROUNDS = (512, 2048, 8192), 5


def layers() -> dict[str, tuple[nn.Module, nn.Module, int]]:
    """Return what it is -> litmini's layer, that of transformers with the same weights, and the size of the model."""
    qwen, mamba = qwen3_5.PRESETS["Qwen/Qwen3.5-0.8B"], mamba2.PRESETS["AntonV/mamba2-130m-hf"]
    text: Any = Qwen3_5TextConfig(**qwen3_5.config_to_hf(qwen))
    pairs: dict[str, tuple[nn.Module, nn.Module, int]] = {
        "linear attention of Qwen3.5-0.8B": (qwen3_5.GatedDeltaNet(qwen), Qwen3_5GatedDeltaNet(text, 0), qwen.dim),
        "Mamba2 of Mamba-2 130M": (
            mamba2.Mamba2(mamba),
            Mamba2Mixer(Mamba2Config(**mamba2.config_to_hf(mamba)), 0),
            mamba.dim,
        ),
    }
    for ours, theirs, _ in pairs.values():
        ours.load_state_dict(theirs.state_dict())
    return pairs


def measure(runners: dict[str, Callable[[Tensor], Tensor]], T: int, dim: int) -> list[float]:
    """Return the median time of each in us per token."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(ROUNDS + 1):  # the first warms up
        x = torch.randn(1, T, dim, requires_grad=True)
        for name, forward in runners.items():
            started = time.perf_counter()
            forward(x).sum().backward()
            if number:
                times[name].append(1e6 * (time.perf_counter() - started) / T)
    return [statistics.median(values) for values in times.values()]


def main() -> None:
    keep_memory()  # as in a training run, for both: else pages that the system clears take most of the time
    print(f"{hardware()}\n{versions()}\n\n| layer | tokens | litmini | transformers |\n|---|---|---|---|")
    for name, (ours, theirs, dim) in layers().items():
        for T in LENGTHS:
            runs = make_runs(torch.arange(T)[None], None, None)
            runners: dict[str, Any] = {"litmini": lambda x, o=ours, r=runs: o(x, r, None), "transformers": theirs}
            print(
                f"| {name} | {T:,} | {' | '.join(f'{value:.0f}' for value in measure(runners, T, dim))} |", flush=True
            )


if __name__ == "__main__":
    main()
