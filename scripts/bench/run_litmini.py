"""litmini through its command lines; results are read from the run directory."""

import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Job, main

SCRIPTS = Path(__file__).parents[1]


def finetune(job: Job) -> dict[str, Any]:
    run = Path(job["out_dir"])
    words = [sys.executable, str(SCRIPTS / f"finetune_{job['method']}.py"), *job["words"]]
    started = time.time()
    script_log = Path(f"{run}.script.log")
    with script_log.open("w") as log, tempfile.TemporaryDirectory() as cache:  # empty compilation cache
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        first = first_step(run / "metrics.csv", process)
        process.wait()
    if process.returncode:
        raise SystemExit("\n".join(script_log.read_text().splitlines()[-10:]))
    rows, results = read_rows(run / "metrics.csv"), json.loads((run / "manifest.json").read_text())["results"]
    return {
        "seconds": [seconds for seconds, _ in rows],
        "losses": [loss for _, loss in rows],
        "seconds_to_first_step": first - started,
        "peak_memory_mib": results["peak_memory_mib"],
        **(validation_losses(job) if job["method"] != "qlora" and job["validation"] else {}),
    }


def first_step(metrics: Path, process: subprocess.Popen[bytes]) -> float:
    """Return the time at which the first step began: the last write of metrics.csv, less the time of the steps in it."""
    while process.poll() is None:
        time.sleep(0.02)
        if metrics.is_file() and (rows := read_rows(metrics)):
            return metrics.stat().st_mtime - sum(seconds for seconds, _ in rows)
    return time.time()


def read_rows(metrics: Path) -> list[tuple[float, float]]:
    """Return (seconds, loss) of each step."""
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["tokens_per_second"]]
    tokens = [0, *(int(row["tokens"]) for row in rows)]
    spent = [(b - a) / float(row["tokens_per_second"]) for a, b, row in zip(tokens, tokens[1:], rows, strict=False)]
    return list(zip(spent, (float(row["loss"]) for row in rows), strict=True))


def validation_losses(job: Job) -> dict[str, float]:
    """Return the mean loss per target of the validation samples with the saved result, in fp32 and in bf16."""
    import torch

    import litmini

    final = Path(job["out_dir"]) / "final"
    base, adapter = (final, None) if job["method"] == "full" else (job["model"], final)
    found = {}
    for name, dtype in (("validation_loss", "fp32"), ("validation_loss_bf16", "bf16")):
        model, _ = litmini.load(base, adapter, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
        device = next(model.parameters()).device
        total = targets = 0.0
        with torch.no_grad():
            for sample in job["validation"]:
                tokens = torch.tensor([sample], device=device)
                loss, count = model(tokens[:, :-1], labels=tokens[:, 1:])
                total, targets = total + float(loss), targets + int(count)
        found[name] = total / targets
    return found


def convert(job: Job) -> dict[str, Any]:
    words = [str(SCRIPTS / "convert_to_litmini.py"), job["model"], "--out_dir", job["out_dir"]]
    started = time.time()
    subprocess.run([sys.executable, *words], check=True)
    seconds = time.time() - started
    return {"seconds": seconds, "peak_memory_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10}


if __name__ == "__main__":
    training = dict.fromkeys(("lora", "qlora", "dora", "full", "packed", "dpo"), finetune)
    main({**training, "convert": convert}, ["litmini", "lightning-fabric", "bitsandbytes"])
