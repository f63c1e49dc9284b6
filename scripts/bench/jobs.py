"""Jobs of benchmark.py: one measurement of one tool, in a process of its own."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
METHODS = {"lora": "lora", "qlora": "qlora", "dora": "dora", "full": "full", "packed": "lora"}
ABLE = {
    "litmini": [*METHODS, "dpo", "convert"],
    "transformers": [*METHODS, "convert"],
    "trl": ["lora", "full", "packed", "dpo"],
    "litgpt": ["lora", "full", "convert"],
}


def is_installed(config: Any, tool: str) -> bool:
    """Return whether a tool is installed; print a note if it is not."""
    package = {"transformers": "peft"}.get(tool, tool)
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    installed = (
        tool == "litmini" or not subprocess.run([config.pythons.get(tool, sys.executable), "-c", code]).returncode
    )
    if not installed:
        print(f"note: {tool} is not installed, and skipped. See --pythons.", file=sys.stderr)
    return installed


def training_jobs(config: Any, place: Path, task: str, dtype: str, tools: list[str]) -> list[dict[str, Any]]:
    """Return one job for each tool that supports the task, with the same samples in the same steps."""
    import torch
    from work import LORA, SEED, plan_work, write_samples

    if task == "dpo":
        from pairs import preference_jobs

        return preference_jobs(config, place, dtype, [tool for tool in tools if task in ABLE[tool]])

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


def run_in_turns(config: Any, place: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def run(config: Any, place: Path, job: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the result of a job, with the job and the matmul rate just before it; None if it fails."""
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
