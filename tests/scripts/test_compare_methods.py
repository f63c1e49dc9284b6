"""compare_methods.py: which runs it starts, which it goes on with, and what it says of them."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
from test_scripts import run

LOSS = {"lora-0.001": 2.0, "lora-0.002": 1.5, "lora-0.004": 1.8, "full-1e-05": 1.7}


def finished(out: Path) -> None:
    """What a run leaves, as far as it is read."""
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "val_loss_before": 3.0,
        "val_loss_after": LOSS[out.name],
        "trained_parameters": 12,
        "training_seconds": 9.0,
    }
    (out / "manifest.json").write_text(json.dumps({"results": {**results, "peak_memory_mib": 2048.0}}))
    with (out / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tokens", "tokens_per_second"])
        writer.writerows([[100, 50], [200, 1], [300, 50]])  # steps of 2, 100 and 2 seconds
    for name in ("config.yaml", "report.html"):
        (out / name).write_text("")


def test_every_rate_is_trained_once_and_the_best_is_named(tmp_path, monkeypatch):
    started: list[list[str]] = []

    def play(words, **options):
        started.append(words)
        finished(Path(words[words.index("--out_dir") + 1]))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", play)
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    finished(tmp_path / "out/lora-0.001")  # one is there, another was killed while its result was measured
    (tmp_path / "out/lora-0.002/final").mkdir(parents=True)
    (tmp_path / "out/lora-0.002/config.yaml").write_text("")
    words = ["--settings", tmp_path / "run.yaml", "--out_dir", tmp_path / "out"]
    said = run("compare_methods.py", *words, "--lrs={lora: [1e-3, 2e-3, 4e-3], full: [1e-5]}")
    assert [Path(w[1]).name for w in started] == ["finetune_lora.py", "finetune_lora.py", "finetune_full.py"]
    assert [w[w.index("--optim.lr") + 1] for w in started] == ["0.002", "0.004", "1e-05"]
    assert ["--resume" in w for w in started] == [True, False, False]
    row = "| lora | 0.002 | 1.5000 | 2.0000 (0.001), 1.8000 (0.004) | 12 | 2.00 | 2,048 |"
    assert row in said and row in (tmp_path / "out/comparison.md").read_text()
    assert len(json.loads((tmp_path / "out/comparison.json").read_text())) == 4
    assert (tmp_path / "out/comparison.png").stat().st_size > 1000
    run("compare_methods.py", *words, "--lrs={lora: [1e-3, 2e-3]}")
    assert len(started) == 3  # nothing twice


@pytest.mark.parametrize(("lrs", "says"), [("{lara: [1e-3]}", "unknown method lara"), ("{lora: []}", "lrs is empty")])
def test_refuses(tmp_path, lrs, says):
    (tmp_path / "run.yaml").write_text("")
    words = ["--settings", tmp_path / "run.yaml", "--out_dir", tmp_path / "out", f"--lrs={lrs}"]
    assert says in run("compare_methods.py", *words, status=2)
