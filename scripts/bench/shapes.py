"""The benchmark of GPUs: LoRA, QLoRA, full finetuning and decoding on random weights of several sizes, beside other tools.

`scripts/benchmark.py --device cuda` runs it. `python scripts/bench/shapes.py` does the same with its defaults, and without
litmini's command line. Weights are drawn on the device, so no checkpoint and no network is needed. All rows together end after
`minutes`; rows that do not fit into them, fail, or run out of memory are named in the table.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_shapes import BATCH, RESTART
from shape_models import preset

Row = dict[str, Any]
SHAPES = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M")
LENGTHS = (8192, 2048)
WORKER = Path(__file__).parent / "run_shapes.py"
LITMINIS_PART = 0.6  # of the time: it has more rows
HEAD = ["shape", "task", "tokens of a sequence", "tool", "tokens/s", "peak MiB", "MFU, or of bandwidth", "notes"]


def measure(
    place: Path,
    device: str = "cuda",
    shapes: Sequence[str] = SHAPES,
    lengths: Sequence[int] = LENGTHS,
    steps: int = 12,
    warmup: int = 2,
    minutes: float = 5.0,
    tools: Sequence[str] = ("litmini", "transformers"),
) -> list[Row]:
    """Return a row for each measurement; write shapes.json and shapes.md into `place`, also while they are made."""
    place.mkdir(parents=True, exist_ok=True)
    ends = time.time() + 60 * minutes
    rows: list[Row] = []
    tools = [tool for tool in ("litmini", "transformers") if tool in tools]
    for tool in tools:
        now = time.time()
        part = LITMINIS_PART if tool == "litmini" and len(tools) > 1 else 1.0
        jobs = plan(tool, device, shapes, lengths, steps, warmup)
        rows += run_tool(place, tool, device, jobs, now + part * (ends - now))
        (place / "shapes.json").write_text(json.dumps({**circumstances(rows), "rows": rows}, indent=1))
        (place / "shapes.md").write_text(table(rows))
    return rows


def plan(
    tool: str, device: str, shapes: Sequence[str], lengths: Sequence[int], steps: int, warmup: int
) -> list[dict[str, Any]]:
    """Return the rows of a tool, what matters most first; each step has as many tokens as the longest sequence.

    Raises:
        ValueError: a shape is no preset of `litmini/models`.
    """
    for shape in shapes:
        try:
            preset(shape)
        except StopIteration:
            raise ValueError(f"{shape} is no preset of a family in litmini/models") from None
    has_flash = device.startswith("cuda") and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if has_flash else "sdpa"
    plain, longest = "" if tool == "litmini" else attention, max(lengths)
    other = "compiled"
    if tool == "transformers":
        other = f"{attention}, liger" if importlib.util.find_spec("liger_kernel") else ""
    order = [("lora", n, plain) for n in sorted(lengths, reverse=True)] + [("decode", 0, plain)]
    order += [("lora", longest, other)] * bool(other)
    order += [(task, n, plain) for task in ("qlora", "full") for n in sorted(lengths, reverse=True)]
    order += [("decode", 0, other)] * (tool == "litmini")
    fixed = {"tool": tool, "attention": attention, "steps": steps, "warmup": warmup}
    return [
        {"shape": shape, "task": task, "length": n, "rows": longest // n if n else 0, "variant": variant, **fixed}
        for task, n, variant in order
        for shape in shapes
    ]


def run_tool(place: Path, tool: str, device: str, jobs: list[dict[str, Any]], deadline: float) -> list[Row]:
    """Return the rows of a tool, run in one process; in a new one after a row that ends it."""
    rows: list[Row] = []
    results, log = place / f"shapes-{tool}.jsonl", place / f"shapes-{tool}.log"
    log.unlink(missing_ok=True)
    while len(rows) < len(jobs) and time.time() < deadline:
        left = jobs[len(rows) :]
        results.unlink(missing_ok=True)
        told = place / f"shapes-{tool}.jobs.json"
        told.write_text(json.dumps({"device": device, "deadline": deadline, "jobs": left, "results": str(results)}))
        print(f"{tool}: {len(left)} rows ...", file=sys.stderr, flush=True)
        status = _run([sys.executable, str(WORKER), str(told)], log, deadline)
        rows += [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
        if status == 0:
            break
        if status != RESTART and len(rows) < len(jobs):
            last = (log.read_text(errors="replace").splitlines() or [""])[-1][:200]
            why = "stopped: the time was over" if status is None else f"the process ended with {status}: {last}"
            rows.append({**jobs[len(rows)], "failed": why})
    return rows + [{**job, "failed": "not run: the time was over"} for job in jobs[len(rows) :]]


def _run(words: list[str], log: Path, deadline: float) -> int | None:
    """Return the exit status of a process with everything that it started; None: it ran until `deadline` and was ended."""
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with log.open("a") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True
        )
        try:
            return process.wait(timeout=max(0.1, deadline - time.time()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            return None


def circumstances(rows: list[Row]) -> dict[str, Any]:
    """Return device, versions and date of the measurements."""
    from importlib.metadata import PackageNotFoundError, version

    names = {"device": next((row["device"] for row in rows if "device" in row), "nothing was measured")}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "flash_attn", "liger_kernel", "triton"):
        try:
            names[package] = version(package)
        except PackageNotFoundError:
            names[package] = "not installed"
    return {**names, "date": time.strftime("%d %B %Y")}


def table(rows: list[Row]) -> str:
    """Return a Markdown table for docs/benchmarks.md, with what was measured on above it."""
    said = ", ".join(f"{name} {value}" for name, value in circumstances(rows).items())
    lines = [said, "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in rows:
        tool = ", ".join(filter(None, (row["tool"], row["variant"])))
        share = row.get("mfu", row.get("of_bandwidth"))
        batch = row.get(f"batch_{BATCH}_tokens_per_second")
        notes = row.get("failed") or (f"batch of {BATCH}: {batch:,.0f} tokens/s" if batch else "")
        figures = [(row.get("tokens_per_second"), ",.0f"), (row.get("peak_memory_mib"), ",.0f"), (share, ".0%")]
        cells = [row["shape"].split("/")[-1], row["task"], f"{row['length']:,}" if row["length"] else "", tool]
        cells += ["" if value is None else format(value, form) for value, form in figures]
        lines.append(f"| {' | '.join([*cells, notes.replace('|', '/')])} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(table(measure(Path("out/benchmark"))))
