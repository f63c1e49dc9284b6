"""The report of a benchmark: rows, a table and a chart."""

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

ENDS = 5  # steps whose mean is the loss at the start, and at the end
SAME = 0.05  # maximum difference of losses of the same training
FORMULA = (
    "MFU = (FLOPs of the timed steps / their seconds) / matmul rate, the median of measurements before each run. FLOPs, for "
    "real tokens only: 2 in forward and 2 in backward per value of a matrix, 2 more if it is trained; the head for targets "
    "only; attention 12 x layers x heads x head_dim per key that a token sees. The same for all tools."
)

LOSSES = (
    f"Other losses: they differ by more than {SAME} from those of half of the other tools, in fp32 if that was measured: the "
    "work differs, or rounding lost updates."
)
COLUMNS = ["task", "tool", "dtype", "real tok/s", "peak MiB", "MFU", "command to first step (its end), s"]
COLUMNS += ["loss, first and last 5 steps", "validation loss, in fp32 and in bf16"]


def make_rows(found: list[dict[str, Any]], warmup: int) -> list[dict[str, Any]]:
    """Return one row for each task, tool and dtype, with the medians of its rounds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in found:
        job = result["job"]
        label = ", ".join(filter(None, (job["tool"], job["variant"])))
        groups.setdefault((job["task"], job["dtype"], label), []).append(result)
    measurements: dict[str, list[float]] = {}
    for result in found:
        measurements.setdefault(result["job"]["dtype"], []).append(result["product_rate"])
    rates = {dtype: median(measured) for dtype, measured in measurements.items()}
    rows = [
        {
            "task": task,
            "tool": tool,
            "dtype": dtype,
            **(converted(results) if task == "convert" else trained(results, warmup, rates[dtype])),
            "rounds": len(results),
            "product_flops_per_second": rates[dtype],
            "versions": results[0]["versions"],
            "hardware": results[0]["hardware"],
        }
        for (task, dtype, tool), results in groups.items()
    ]
    for row in rows:
        row["same_losses"] = has_same_losses(row, [r for r in rows if r["task"] == row["task"]])
    return rows


def trained(results: list[dict[str, Any]], warmup: int, rate: float) -> dict[str, Any]:
    """Return the medians of training runs."""
    work = json.loads(Path(results[0]["job"]["work"]).read_text())
    targets = sum(len(sample) - 1 for step in work["steps"][warmup:] for sample in step)
    flops, pairs = sum(work["flops"][warmup:]), sum(map(len, work["steps"][warmup:])) / 2
    spent = median(sum(result["seconds"][warmup:]) for result in results)
    validation = {
        name: [result[name] for result in results if result.get(name) is not None]
        for name in ("validation_loss", "validation_loss_bf16")
    }
    return {
        "real_tokens_per_second": targets / spent,
        **({"pairs_per_second": pairs / spent} if work.get("prompts") else {}),
        "seconds_per_step": spent / (len(work["steps"]) - warmup),
        "peak_memory_mib": median(result["peak_memory_mib"] for result in results),
        "mfu": flops / spent / rate,
        "seconds_to_first_step": median(result["seconds_to_first_step"] for result in results),
        "seconds_to_first_step_done": median(
            result["seconds_to_first_step"] + result["seconds"][0] for result in results
        ),
        "loss_start": median(mean(result["losses"][:ENDS]) for result in results),
        "loss_end": median(mean(result["losses"][-ENDS:]) for result in results),
        **{name: median(losses) if losses else None for name, losses in validation.items()},
    }


def converted(results: list[dict[str, Any]]) -> dict[str, Any]:
    nothing = ("real_tokens_per_second", "mfu", "seconds_to_first_step", "loss_start", "loss_end")
    return {
        name: median(result[name] for result in results) for name in ("seconds", "peak_memory_mib")
    } | dict.fromkeys(nothing)


def has_same_losses(row: dict[str, Any], others: list[dict[str, Any]]) -> bool | None:
    """Return whether the first, last and validation losses of a row agree with those of at least half of the others.

    The others are those in fp32, if there are any, as rounding loses no updates there; else those of the same dtype.
    """
    if row["loss_start"] is None:
        return None
    exact = [other for other in others if other["dtype"] == "fp32" and other is not row]
    tool = row["tool"].split(",")[0]  # its variants are not independent
    others = exact or [o for o in others if o["dtype"] == row["dtype"] and o["tool"].split(",")[0] != tool]
    for name in ("loss_start", "loss_end", "validation_loss"):
        theirs = [other[name] for other in others if other[name] is not None]
        near = [loss for loss in theirs if row[name] is None or abs(row[name] - loss) <= SAME]
        if 2 * len(near) < len(theirs):
            return False
    return True


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table, with hardware, versions and matmul rates above it and the formula of MFU below."""
    if not rows:
        return "Nothing was measured.\n"
    lines = [_circumstances(rows), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in (row for row in rows if "what" not in row):
        tool = row["tool"] + (" (other losses)" if row.get("same_losses") is False else "")
        start = _figure(row, "seconds_to_first_step", ".1f")
        if done := _figure(row, "seconds_to_first_step_done", ".1f"):
            start += f" ({done})"  # with compilation
        losses = [_figure(row, name, ".3f") for name in ("loss_start", "loss_end")]
        validation = [_figure(row, name, ".3f") for name in ("validation_loss", "validation_loss_bf16")]
        whole = f"{row['seconds']:.1f} s in all" if "seconds" in row else ""
        speed = _figure(row, "real_tokens_per_second", ",.0f")
        speed += f" ({row['pairs_per_second']:.2f} pairs/s)" if "pairs_per_second" in row else ""
        cells = [row["task"], tool, row["dtype"], speed]
        cells += [_figure(row, "peak_memory_mib", ",.0f"), _figure(row, "mfu", ".0%"), start]
        cells += [whole or ", ".join(filter(None, losses)), ", ".join(filter(None, validation))]
        lines.append(f"| {' | '.join(cells)} |")
    grown = [f"| {row['what']} | {row['value']:,.2f} {row['unit']} |" for row in rows if "what" in row]
    if any(row.get("same_losses") is False for row in rows):
        lines += ["", LOSSES]
    lines += ["", FORMULA, "", *(["| growth | |", "|---|---|", *grown, ""] if grown else [])]
    return "\n".join(lines)


def _figure(row: dict[str, Any], name: str, form: str) -> str:
    return "" if row.get(name) is None else format(row[name], form)


def _circumstances(rows: list[dict[str, Any]]) -> str:
    """Return hardware, versions and matmul rates as a line of text."""
    hardware, rates = rows[0]["hardware"], {row["dtype"]: row.get("product_flops_per_second") for row in rows}
    named = sorted({(name, text) for row in rows for name, text in row["versions"].items()})
    machine = hardware["cpu"] if hardware["device"] == "cpu" else hardware["device"]
    matmuls = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in rates.items() if rate)
    said = [f"{machine}, {hardware['threads']} threads", ", ".join(f"{name} {text}" for name, text in named)]
    return "; ".join([*said, f"matmuls {matmuls}"] if matmuls else said)


def chart(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw bars of tokens per second and of peak memory, for each training task and dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["mfu"] is not None][::-1]
    if not shown:
        return
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    names = [f"{row['task']} {row['dtype']}: {row['tool']}" for row in shown]
    colours = ["C1" if row["tool"].startswith("litmini") else "C0" for row in shown]
    panels = (("real_tokens_per_second", "real tokens a second"), ("peak_memory_mib", "peak memory, MiB"))
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        bars = axes.barh(names, [row[key] for row in shown], color=colours)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
        axes.margins(x=0.2)
        axes.set_title(title)
    figure.savefig(file, dpi=120, bbox_inches="tight")
