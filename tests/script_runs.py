"""Runs of a script in the test's own process, without what takes longer than the rest of a tiny run."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_script(capfd: pytest.CaptureFixture[str], script: str, *arguments: object, status: int = 0) -> str:
    """Run `scripts/NAME.py` and check its exit status; return its stdout, or its stderr if it is to fail."""
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / f"scripts/{script}.py"), run_name="__main__")
    out, err = capfd.readouterr()
    assert end.value.code == status, out + err
    return err if status else out


def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out charts, and the measurement of what the CPU can do."""
    monkeypatch.setattr("litmini.runs.report.plot_metrics", lambda directory, _: (directory / "loss.png").touch())
    monkeypatch.setattr("litmini.training.flops.peak_flops", lambda *_: (1e12, "assumed"))
