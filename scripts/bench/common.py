"""Functions of the runners of all tools. Only torch is imported, so that any interpreter can run them.

python run_TOOL.py JOB.json       (scripts/benchmark.py writes the job and reads the result)
"""

import json
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Job = dict[str, Any]
MICRO_LOSS = Callable[[list[list[int]], int], Any]


def main(tasks: dict[str, Callable[[Job], dict[str, Any]]], packages: list[str]) -> None:
    """Run the job named on the command line and write its result beside it."""
    job = json.loads(Path(sys.argv[1]).read_text())
    job |= json.loads(Path(job["work"]).read_text()) if job.get("work") else {}
    found = tasks[job["task"]](job)
    found["versions"] = {name: text for name in ["torch", *packages] if (text := _version(name))}
    Path(job["result"]).write_text(json.dumps(found))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Clock:
    """Times the optimizer steps of a run and remembers their losses."""

    def __init__(self, job: Job) -> None:
        self.started_at: float = job["started_at"]
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.first_step_at: float | None = None

    def begin(self) -> None:
        self.first_step_at = self.first_step_at or time.time()
        self._begun = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._begun)

    def result(self) -> dict[str, Any]:
        assert self.first_step_at is not None
        return {
            "seconds": self.seconds,
            "losses": self.losses,
            "seconds_to_first_step": self.first_step_at - self.started_at,
            "peak_memory_mib": peak_memory_mib(),
        }


def peak_memory_mib() -> float:
    """Return the peak memory of this process in MiB: on the GPU if there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "no VmHWM in /proc/self/status"
    return int(found[1]) / 2**10


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def count_targets(samples: list[list[int]]) -> int:
    """Return the tokens to predict in samples."""
    return sum(len(sample) - 1 for sample in samples)


def train(
    job: Job,
    model: Any,
    micro_loss: MICRO_LOSS,
    backward: Callable[[Any], None] = lambda loss: loss.backward(),
    count: Callable[[list[list[int]]], int] = count_targets,
) -> dict[str, Any]:
    """Train in a plain loop, with AdamW over the trainable parameters of `model`.

    Args:
        micro_loss: (samples, units of the whole step) -> the summed loss of the samples divided by these units.
        count: the units of samples.
    """
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["lr"], betas=tuple(job["betas"]), weight_decay=0.0, fused=True)
    size = 10**9 if job["packed"] else job["micro_batch_size"]
    clock = Clock(job)
    model.train()
    for samples in job["steps"]:
        clock.begin()
        units, total = count(samples), torch.zeros((), device=device())
        for at in range(0, len(samples), size):
            loss = micro_loss(samples[at : at + size], units)
            backward(loss)
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, job["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(float(total))  # CPU-GPU sync point
        clock.end()
    return clock.result()


def validation_losses(job: Job, model: Any, micro_loss: MICRO_LOSS) -> dict[str, float]:
    """Return the mean loss per target of the validation samples, with weights in fp32, and in bf16, as for inference."""
    import torch

    model.eval()
    targets, found = sum(len(sample) - 1 for sample in job["validation"]), {}
    for name, dtype in (("validation_loss", torch.float32), ("validation_loss_bf16", torch.bfloat16)):
        for parameter_name, parameter in model.named_parameters():
            if dtype == torch.float32 or ".lora_" not in parameter_name or job["tool"] == "litgpt":  # PEFT's are fp32
                parameter.data = parameter.data.to(dtype)
        with torch.no_grad():
            found[name] = sum(float(micro_loss([sample], targets)) for sample in job["validation"])
    return found


def in_row(samples: list[list[int]]) -> tuple[Any, Any, Any]:
    """Return tokens, positions and labels of all samples in one sequence (1, tokens); positions restart in each sample."""
    import torch

    tokens = torch.tensor([[token for sample in samples for token in sample]])
    positions = torch.tensor([[i for sample in samples for i in range(len(sample))]])
    labels = tokens.masked_fill(positions == 0, -100)
    return tokens.to(device()), positions.to(device()), labels.to(device())


def padded(samples: list[list[int]]) -> tuple[Any, Any, Any]:
    """Return tokens, mask and labels, (samples, longest) each; labels are -100 on padding and first tokens."""
    import torch

    longest = max(map(len, samples))
    tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return tokens.to(device()), mask.to(device()), labels.to(device())
