"""Measure the time per token of a layer with linear attention beside transformers' own fallback in PyTorch.

    OMP_NUM_THREADS=2 python scripts/bench/linear_attention.py

One layer of Qwen3.5-0.8B in fp32, forward and backward, with the kernels of neither `flash-linear-attention` nor
`causal-conv1d`. Both run in turns in one process; times are medians in us per token. Run this on an otherwise idle machine.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from transformers import Qwen3_5TextConfig  # noqa: E402
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet  # noqa: E402
from work import hardware, versions  # noqa: E402

from litmini.distributed.fabric import keep_memory  # noqa: E402
from litmini.models import qwen3_5  # noqa: E402
from litmini.ops.linear_attention import make_runs  # noqa: E402

LENGTHS, ROUNDS = (512, 2048, 8192), 5


def main() -> None:
    keep_memory()  # as in a training run, for both: else pages that the system clears take most of the time
    config = qwen3_5.PRESETS["Qwen/Qwen3.5-0.8B"]
    text: Any = Qwen3_5TextConfig(**qwen3_5.config_to_hf(config))
    theirs = Qwen3_5GatedDeltaNet(text, 0)
    ours = qwen3_5.GatedDeltaNet(config)
    ours.load_state_dict(theirs.state_dict())
    print(f"{hardware()}\n{versions()}\n\n| tokens | litmini | transformers |\n|---|---|---|")
    for T in LENGTHS:
        runs = make_runs(torch.arange(T)[None], None, None)
        times: dict[str, list[float]] = {"litmini": [], "transformers": []}
        for number in range(ROUNDS + 1):  # the first warms up
            x = torch.randn(1, T, config.dim, requires_grad=True)
            for name, forward in (("litmini", lambda x, runs=runs: ours(x, runs, None)), ("transformers", theirs)):
                started = time.perf_counter()
                forward(x).sum().backward()
                if number:
                    times[name].append(1e6 * (time.perf_counter() - started) / T)
        print(f"| {T:,} | {' | '.join(f'{statistics.median(values):.0f}' for values in times.values())} |")


if __name__ == "__main__":
    main()
