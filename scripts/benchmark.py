"""Measure speed and memory of litmini and of other installed tools, on the same samples, in turns.

    python scripts/benchmark.py --tasks '[lora]' --dtypes '[bf16]' --json results.json

Every run has its own process. Real tokens are supervised tokens; padding does not count. For tools in another environment:
--pythons '{litgpt: /path/to/its/python}'. `pip install -e ".[bench]"` installs transformers, PEFT and TRL.

    python scripts/benchmark.py --device cuda

measures a GPU in minutes: random weights of three sizes, drawn on it (scripts/bench/shapes.py). That has not run on a GPU.
"""

import itertools
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from litmini.cli import command
from litmini.config.generate import ModelConfig
from litmini.errors import UserError, check

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from jobs import ABLE, is_installed, run_in_turns, training_jobs

Task = Literal[
    "lora", "qlora", "dora", "full", "packed", "dpo", "classifier", "generate", "convert", "growth", "shapes"
]


@dataclass(kw_only=True)
class BenchmarkConfig(ModelConfig):
    """Settings of benchmark.py. adapter_dir, model_file, chat_template and bits apply to generate only."""

    checkpoint_dir: str = "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct"
    """Model to use."""
    model: str | None = None
    """The same as --checkpoint_dir."""
    data: str | None = None
    """Training file in any format that finetuning reads; by default, synthetic samples of 20 to 400 tokens."""
    tasks: list[Task] = field(default_factory=list)
    """lora, qlora, dora, full: sequences of max_seq_len; packed: LoRA, one sequence of packed_len per step, packed by all
    tools; dpo: preferences, and classifier: texts with a class, with LoRA; generate: greedy decoding; convert: checkpoints;
    growth: cost over the size of data and accumulation, litmini only; shapes: LoRA, QLoRA, full and decoding on random
    weights, for GPUs. None: shapes with --device cuda, else lora."""
    tools: list[Literal["litmini", "transformers", "trl", "litgpt"]] = field(
        default_factory=lambda: ["litmini", "transformers", "trl", "litgpt"]
    )
    """Tools to measure; those that are not installed are skipped."""
    dtypes: list[Literal["bf16", "fp32"]] = field(default_factory=list)
    """Compute dtypes; none: that of --dtype. Full finetuning always has fp32 master weights."""
    steps: int = 12
    """Optimizer steps of a run."""
    warmup_steps: int = 2
    """Number of first steps that are not timed."""
    rounds: int = 3
    """Repetitions of each measurement, all tools in turns."""
    max_seq_len: int = 512
    """Maximum tokens of a sample, and of litmini's sequences."""
    micro_batch_size: int = 4
    """Sequences in one forward pass; a step is this many sequences of litmini, and the samples in them."""
    packed_len: int = 2048
    """Tokens of a packed sequence."""
    pythons: dict[str, str] = field(default_factory=dict)
    """Tool -> the Python interpreter of its environment."""
    options: dict[str, str] = field(default_factory=dict)
    """Further arguments of litmini's command line: '{litmini: --train.checkpoint_activations true}'."""
    prefill_tokens: list[int] = field(default_factory=lambda: [128, 512, 2048])
    """generate: lengths of prompts, each measured until its first token, if the model's context holds it."""
    prompt_tokens: int = 128
    """generate: length of the prompt before decoding."""
    new_tokens: int = 64
    """generate: tokens to generate."""
    batch_size: int = 8
    """generate: prompts in the batch, which is compared with one prompt."""
    shapes: list[str] = field(
        default_factory=lambda: [
            "meta-llama/Llama-3.1-8B",
            "meta-llama/Llama-3.2-1B",
            "HuggingFaceTB/SmolLM2-135M",
        ]
    )
    """shapes: presets of litmini/models whose sizes the random weights have."""
    lengths: list[int] = field(default_factory=lambda: [8192, 2048])
    """shapes: tokens of a packed sequence; a step has as many tokens as the longest."""
    minutes: float = 5.0
    """shapes: all rows end after this time; those that were not reached are named."""
    out_dir: str = "out/benchmark"
    """Directory of runs, table.md, chart.png and results.json."""
    resume: bool = False
    """Keep the existing runs in out_dir that have the same settings, and the results of other tasks."""
    json: str | None = None
    """Another path for results.json."""
    out: str | None = None
    """JSON file for all measurements of generation."""

    def __post_init__(self) -> None:
        self.checkpoint_dir = self.model or self.checkpoint_dir
        self.tasks = self.tasks or (["shapes"] if self.device.startswith("cuda") else ["lora"])
        sizes = ("rounds", "prompt_tokens", "batch_size", "max_seq_len", "micro_batch_size", "packed_len")
        fine = {name: getattr(self, name) > 0 for name in sizes}
        fine |= {"minutes": self.minutes > 0, "lengths": bool(self.lengths) and min(self.lengths) > 8}
        fine["prefill_tokens"] = all(n > 0 for n in self.prefill_tokens)
        check("", self, new_tokens=self.new_tokens > 1, steps=self.steps > self.warmup_steps >= 0, **fine)
        if unknown := sorted({*self.pythons, *self.options} - set(ABLE)):
            raise UserError(f"unknown tool {', '.join(unknown)}; the tools are: {', '.join(ABLE)}.")


def main(config: BenchmarkConfig) -> None:
    if config.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for all processes; set before torch reads it

    from report import chart, make_rows, table

    from litmini.checkpoints.hf import check_checkpoint_dir
    from litmini.files import check_new_file, write_json, write_text

    for setting, path in (("--json", config.json), ("--out", config.out)):
        if path is not None and not config.resume:  # what this command wrote before is continued
            check_new_file(path, setting)
    place = Path(config.out_dir)
    if "shapes" in config.tasks:
        measure_shapes(config, place)
        config.tasks = [task for task in config.tasks if task != "shapes"]
        if not config.tasks:
            return
    check_checkpoint_dir(config.checkpoint_dir)
    (place / "runs").mkdir(parents=True, exist_ok=True)
    tools: list[str] = [tool for tool in config.tools if is_installed(config, tool)]
    found: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    turns = list(itertools.product(config.tasks, config.dtypes or [config.dtype]))
    if config.resume and (place / "results.json").is_file():
        kept = json.loads((place / "results.json").read_text())
        rows = [row for row in kept if (row["task"], row["dtype"]) not in turns]
    for task, dtype in turns:
        if task == "generate":
            rows += generate(replace(config, dtype=dtype, model=None))
        elif task == "growth":
            from growth import measure_growth

            rows += measure_growth(config, place)
        elif task == "convert":
            jobs = [{"tool": tool, "variant": "", "task": task, "dtype": dtype} for tool in tools if task in ABLE[tool]]
            found += run_in_turns(config, place, jobs)
        else:
            found += run_in_turns(config, place, training_jobs(config, place, task, dtype, tools))
        everything = [*make_rows(found, config.warmup_steps), *rows]
        write_json(place / "results.json", everything)  # type: ignore[arg-type]
        if config.json:
            write_json(Path(config.json), everything)  # type: ignore[arg-type]
        write_text(place / "table.md", table(everything))
        chart(everything, place / "chart.png")
    print(table(everything))


def measure_shapes(config: BenchmarkConfig, place: Path) -> None:
    """Run the benchmark of GPUs; print its table, and write it and its rows into `place`."""
    from shapes import measure, table

    from litmini.files import write_json
    from litmini.generation.generate import usable_device

    device = usable_device(config.device)
    tools = [tool for tool in config.tools if tool in ("litmini", "transformers") and is_installed(config, tool)]
    try:
        rows = measure(
            place, device, config.shapes, config.lengths, config.steps, config.warmup_steps, config.minutes, tools
        )
    except ValueError as error:
        raise UserError(f"--shapes: {error}.") from None
    if config.json and config.tasks == ["shapes"]:
        write_json(Path(config.json), rows)  # type: ignore[arg-type]
    print(table(rows))


def generate(config: BenchmarkConfig) -> list[dict[str, Any]]:
    from generation import benchmark_generate, report_generate
    from work import hardware, versions

    from litmini.files import write_json

    found = hardware()
    machine = f"{found['cpu']}, {found['threads']} threads" if found["device"] == "cpu" else found["device"]
    results: dict[str, Any] = {"machine": machine}
    results |= {**versions(), "dtype": config.dtype}
    results["generate"] = benchmark_generate(config)
    print(report_generate(results))
    if config.out is not None:
        write_json(Path(config.out), results)
    return [
        {
            "task": "generate",
            "tool": tool,
            "dtype": config.dtype,
            "real_tokens_per_second": results["generate"][tool]["decode_tokens_per_second"],
            "seconds_to_first_step": results["generate"][tool].get("seconds_to_first_token"),
            **dict.fromkeys(("peak_memory_mib", "mfu", "loss_start", "loss_end")),
            **results["generate"][tool],
            "versions": versions(),
            "hardware": hardware(),
        }
        for tool in ("litmini", "transformers")
        if tool in results["generate"]
    ]


if __name__ == "__main__":
    command(main, BenchmarkConfig, __doc__)
