"""The report's charts and page: values on hover, logarithmic losses, wrong answers, no network and no script."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from litmini.runs.charts import Series, _log_ticks, _ticks, bar_chart, line_chart
from litmini.runs.report import write_report
from litmini.runs.run import COLUMNS


def tips(svg: str) -> list[str]:
    return re.findall(r"<title>(.*?)</title>", svg)


def places(svg: str, kind: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(rf'<circle class="{kind} \w+" cx="(.*?)" cy="(.*?)"', svg)]


def test_each_point_has_its_values():
    svg = line_chart("a & b", [Series("x<y", "blue", [(1, 0.5), (2, float("nan")), (3, 0.25)])], "step")
    assert tips(svg) == ["step 1: x&lt;y 0.5", "step 3: x&lt;y 0.25"] and "a &amp; b" in svg and "nan" not in svg


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    points = [(0, 1.0), (1, 0.1), (2, 0.01), (3, 0.001)]
    for log in (True, False):
        heights = [y for _, y in places(line_chart("loss", [Series("loss", "blue", points)], "step", log=log), "hit")]
        steps = np.diff(heights)
        assert (steps > 0).all() and (np.ptp(steps) < 0.2) == log
    below = [(0, -1.0), (1, 1.0)]
    assert tips(line_chart("t", [Series("s", "blue", below)], "step", log=True))  # falls back to a linear one
    assert line_chart("t", [Series("s", "blue", [])], "step") == ""


def test_many_points_are_thinned_and_the_last_one_stays():
    found = tips(line_chart("t", [Series("s", "blue", [(i, 1.0 + i) for i in range(100_003)])], "step"))
    assert len(found) < 900 and found[-1].startswith("step 100,002: ")


def test_bars_hold_every_value():
    svg = bar_chart("lengths", [3, 3, 4, 100, 57], "tokens")
    assert sum(int(tip.rpartition(" ")[2]) for tip in tips(svg)) == 5
    assert tips(bar_chart("lengths", [7, 7], "tokens")) == ["7 tokens: 2"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7), (0.003, 0.9), (1e-5, 3e4), (0, 0)])
def test_ticks(low, high):
    ticks = _ticks(low, high)
    assert 1 <= len(ticks) <= 11 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)
    if 0 < low < high:
        assert 2 <= len(_log_ticks(low, high)) <= 12


@pytest.fixture
def page(tmp_path: Path) -> str:
    with (tmp_path / "metrics.csv").open("w") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for step in range(1, 5):
            writer.writerow(
                dict.fromkeys(COLUMNS, 1.0) | {"step": step, "loss": 10.0**-step, "val_loss": 0.5 if step == 2 else ""}
            )
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    wrong = [{"prompt": f"P{i}", "reference": f"R{i}", "prediction": f"<b>W{i}</b>"} for i in range(3)]
    results = {"val_loss_before": 1.0, "val_loss_after": 0.1, "exact_match_before": 0.0, "exact_match_after": 0.9}
    results |= {"training_seconds": 3.0, "steps": 4, "tokens_per_second": 5.0, "peak_memory_mib": 100.0}
    manifest = {
        "date": "2026-11-30T02:03:04+00:00",
        "method": "LoRA, rank 16",
        "base": {"checkpoint_dir": "checkpoints/O/N", "source": {"source": "O/N"}},
        "hardware": {"name": "Some CPU", "cores": 2},
        "results": results | {"wrong": 5, "wrong_after": wrong},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    write_report(tmp_path, np.array([3, 4]), 8)
    return (tmp_path / "report.html").read_text()


def test_the_header_names_model_method_date_and_machine(page):
    header = page[page.index("<h1>") : page.index("<h2>")]
    assert [*re.findall(r"<span>(.*?)</span>", header)] == [
        "O/N",
        "LoRA, rank 16",
        "2026-11-30 02:03",
        "Some CPU, 2 cores",
    ]


def test_the_wrong_answers_are_shown(page):
    assert "Wrong completions after training: 5, the first 3" in page
    for i in range(3):
        assert f"<dd>P{i}</dd>" in page and f"<dd>R{i}</dd>" in page and f"&lt;b&gt;W{i}&lt;/b&gt;" in page


def test_validation_is_on_the_loss_chart_with_its_first_and_last_value(page):
    found = [tip for tip in tips(page) if ": validation " in tip]
    assert found == ["step 0: validation 1", "step 2: validation 0.5", "step 4: validation 0.1"]


def test_the_page_is_one_file_for_light_dark_and_narrow_screens(page):
    assert "<script" not in page and not re.search(r"(src|href)=|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page and "max-width: 560px" in page
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = (page.split(":root {")[i].split("}")[0] for i in (1, 2))
    for block in (light, dark):
        assert used <= set(re.findall(r"(--\w+):", block))
