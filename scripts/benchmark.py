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
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from litmini.cli import command
from litmini.config.generate import ModelConfig
from litmini.errors import UserError, check

BENCH = Path(__file__).parent / "bench"
sys.path.insert(0, str(BENCH))
METHODS = {"lora": "lora", "qlora": "qlora", "dora": "dora", "full": "full", "packed": "lora"}
ABLE = {
    "litmini": [*METHODS, "convert"],
    "transformers": [*METHODS, "convert"],
    "trl": ["lora", "full", "packed"],
    "litgpt": ["lora", "full", "convert"],
}
Task = Literal["lora", "qlora", "dora", "full", "packed", "generate", "convert", "growth", "shapes"]


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
    tools; generate: greedy decoding; convert: checkpoints; growth: cost over the size of data and accumulation, litmini
    only; shapes: LoRA, QLoRA, full and decoding on random weights, for GPUs. None: shapes with --device cuda, else lora."""
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
    prompt_tokens: int = 128
    """generate: length of the prompt."""
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


def is_installed(config: BenchmarkConfig, tool: str) -> bool:
    """Return whether a tool is installed; print a note if it is not."""
    package = {"transformers": "peft"}.get(tool, tool)
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    installed = (
        tool == "litmini" or not subprocess.run([config.pythons.get(tool, sys.executable), "-c", code]).returncode
    )
    if not installed:
        print(f"note: {tool} is not installed, and skipped. See --pythons.", file=sys.stderr)
    return installed


def training_jobs(
    config: BenchmarkConfig, place: Path, task: str, dtype: str, tools: list[str]
) -> list[dict[str, Any]]:
    """Return one job for each tool that supports the task, with the same samples in the same steps."""
    import shlex

    import torch
    from work import LORA, SEED, plan_work, write_samples

    method: Any = METHODS[task]
    length, rows = (config.packed_len, 1) if task == "packed" else (config.max_seq_len, config.micro_batch_size)
    data = Path(config.data) if config.data else place / f"samples-{config.steps * rows * length}.jsonl"
    if not config.data:
        write_samples(data, config.steps * rows * length // 150 + 50, max_tokens=min(400, config.max_seq_len))
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    work = place / f"work-{task}-{dtype}.json"
    plan_work(config.checkpoint_dir, data, method, config.steps, rows, length, kind).save(work)
    precision = "32-true" if dtype == "fp32" else "bf16-mixed" if method == "full" else "bf16-true"
    rate = 2e-5 if method == "full" else 2e-4
    words = ["--checkpoint_dir", config.checkpoint_dir, "--data.path", data, "--data.train_on", "all", "--seed", SEED]
    words += ["--data.max_seq_len", length, "--train.global_batch_size", rows, "--train.micro_batch_size", rows]
    words += ["--train.max_steps", config.steps, "--optim.lr", rate, "--optim.schedule", "constant"]
    words += ["--eval.samples", 0, "--precision", precision, "--compile", "false"]  # auto is the default on GPUs
    words += [] if method == "full" else ["--lora.rank", LORA.rank, "--lora.alpha", LORA.alpha]
    job = {
        "task": task,
        "method": method,
        "dtype": dtype,
        "packed": task == "packed",
        "micro_batch_size": config.micro_batch_size,
        "lr": rate,
        "betas": (0.9, 0.95),
        "max_grad_norm": 1.0,
        "rank": LORA.rank,
        "alpha": LORA.alpha,
        "work": str(work),
        "words": [*map(str, words), *shlex.split(config.options.get("litmini", ""))],
    }
    if "litgpt" in tools and task in ABLE["litgpt"]:
        job["litgpt_dir"] = str(place / "litgpt" / Path(config.checkpoint_dir).name)
        if not Path(job["litgpt_dir"], "lit_model.pth").exists():
            made = {"task": "convert", "tool": "litgpt", "out_dir": job["litgpt_dir"], "dtype": dtype, "variant": ""}
            if run(replace(config, resume=False), place, made, "convert-for-litgpt") is None:
                tools = [tool for tool in tools if tool != "litgpt"]
    jobs = [{**job, "tool": tool, "variant": ""} for tool in tools if task in ABLE[tool]]
    if task in ("lora", "full") and dtype == "bf16" and "litmini" in tools:
        jobs.insert(1, {**job, "tool": "litmini", "variant": "compiled", "words": [*job["words"], "--compile", "true"]})
    if task == "lora" and dtype == "bf16" and "transformers" in tools:
        jobs.append({**job, "tool": "transformers", "variant": "bf16 adapters"})
    return jobs


def run_in_turns(config: BenchmarkConfig, place: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run every job once in each round; a failed job is not repeated."""
    found, failed = [], set()
    for turn in range(config.rounds):
        for number, job in enumerate(jobs):
            if number not in failed:
                named = [job["task"], job["dtype"], job["tool"], job["variant"].replace(" ", "-"), str(turn)]
                result = run(config, place, job, "-".join(filter(None, named)))
                found += [result] if result else []
                failed |= set() if result else {number}
    return found


def run(config: BenchmarkConfig, place: Path, job: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the result of a job, with the job and the matmul rate just before it; None if it fails."""
    import shutil

    import torch
    from work import hardware, matmul_rate

    from litmini.files import file_hash

    place = place / "runs"
    result, out = place / f"{name}.result.json", place / name
    job = {"out_dir": str(out), "result": str(result), "model": config.checkpoint_dir, **job}
    if "words" in job:
        job |= {"words": [*job["words"], "--out_dir", str(out)], "work_sha256": file_hash(job["work"])}
    if config.resume and result.is_file() and (kept := json.loads(result.read_text())).get("job") == plain(job):
        return kept
    shutil.rmtree(job["out_dir"], ignore_errors=True)
    result.unlink(missing_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device, torch.bfloat16 if job["dtype"] == "bf16" else torch.float32)
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    (place / f"{name}.json").write_text(json.dumps({**job, "started_at": time.time()}))
    python = config.pythons.get(job["tool"], sys.executable)
    words = [python, str(BENCH / f"run_{job['tool']}.py"), str(place / f"{name}.json")]
    started = time.time()
    with (place / f"{name}.log").open("w") as log:
        ended = subprocess.run(words, stdout=log, stderr=log)
    print(f"{time.time() - started:.0f} s", file=sys.stderr)
    if ended.returncode:
        lines = (place / f"{name}.log").read_text(errors="replace").splitlines()
        print(f"note: {name} failed and is skipped: {' | '.join(lines[-2:])}", file=sys.stderr)
        return None
    whole = {**json.loads(result.read_text()), "job": plain(job), "product_rate": rate, "hardware": hardware()}
    result.write_text(json.dumps(whole))
    shutil.rmtree(out, ignore_errors=True)  # weights
    return whole


def plain(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job as JSON reads it."""
    return json.loads(json.dumps(job))


def generate(config: BenchmarkConfig) -> list[dict[str, Any]]:
    from generation import benchmark_generate, report_generate
    from work import hardware, versions

    from litmini.files import write_json

    results: dict[str, Any] = {"machine": f"{hardware()['cpu']}, {hardware()['threads']} threads"}
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
