"""What was measured, as rows, as a table and as a chart."""

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

ENDS = 5  # steps whose mean is the loss at the start, and at the end
SAME = 0.05  # losses of tools that do the same work are closer than this
FORMULA = (
    "MFU = (flops of the timed steps / their seconds) / rate of a matrix product measured before each run. Flops, for real "
    "tokens only: 2 forward and 2 back for each number of a matrix, 2 more where it is trained; the head for targets; "
    "attention 12 x layers x heads x head_dim for each key that a token sees. The same for all tools."
)


def make_rows(found: list[dict[str, Any]], warmup: int) -> list[dict[str, Any]]:
    """One row for each task, tool and dtype: the medians of its rounds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in found:
        job = result["job"]
        label = ", ".join(filter(None, (job["tool"], job["variant"])))
        groups.setdefault((job["task"], job["dtype"], label), []).append(result)
    rates: dict[str, float] = {}
    for result in found:
        dtype = result["job"]["dtype"]
        rates[dtype] = max(rates.get(dtype, 0.0), result["product_rate"])
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
        row["same_work"] = is_same_work(row, [r for r in rows if r["task"] == row["task"]])
    return rows


def trained(results: list[dict[str, Any]], warmup: int, rate: float) -> dict[str, Any]:
    """The medians of training runs."""
    work = json.loads(Path(results[0]["job"]["work"]).read_text())
    targets = sum(len(sample) - 1 for step in work["steps"][warmup:] for sample in step)
    flops = sum(work["flops"][warmup:])
    spent = median(sum(result["seconds"][warmup:]) for result in results)
    held_out = [result["held_out_loss"] for result in results if result.get("held_out_loss") is not None]
    return {
        "real_tokens_per_second": targets / spent,
        "seconds_per_step": spent / (len(work["steps"]) - warmup),
        "peak_memory_mib": median(result["peak_memory_mib"] for result in results),
        "mfu": flops / spent / rate,
        "seconds_to_first_step": median(result["seconds_to_first_step"] for result in results),
        "loss_start": median(mean(result["losses"][:ENDS]) for result in results),
        "loss_end": median(mean(result["losses"][-ENDS:]) for result in results),
        "held_out_loss": median(held_out) if held_out else None,
    }


def converted(results: list[dict[str, Any]]) -> dict[str, Any]:
    nothing = ("real_tokens_per_second", "mfu", "seconds_to_first_step", "loss_start", "loss_end")
    return {
        name: median(result[name] for result in results) for name in ("seconds", "peak_memory_mib")
    } | dict.fromkeys(nothing)


def is_same_work(row: dict[str, Any], others: list[dict[str, Any]]) -> bool | None:
    """Whether its losses are the others': at the start and end among those of its dtype, and on held-out samples."""
    if row["loss_start"] is None:
        return None
    same = [other for other in others if other["dtype"] == row["dtype"]]
    pairs = [(row[name], [other[name] for other in same]) for name in ("loss_start", "loss_end")]
    scored = [other["held_out_loss"] for other in others if other["held_out_loss"] is not None]
    if row["held_out_loss"] is not None:  # in fp32, whatever the training was in
        pairs.append((row["held_out_loss"], scored))
    return all(abs(mine - median(theirs)) <= SAME for mine, theirs in pairs)


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = []
    if rows:
        cpu, *_ = {row["hardware"]["cpu"] for row in rows}
        device, *_ = {row["hardware"]["device"] for row in rows}
        named = {name: text for row in rows for name, text in row["versions"].items()}
        rates = {r["dtype"]: r["product_flops_per_second"] for r in rows if r.get("product_flops_per_second")}
        said = ", ".join(f"{dtype} {rate / 1e9:,.0f} Gflop/s" for dtype, rate in rates.items())
        lines.append(f"{device if device != 'cpu' else cpu}, {rows[0]['hardware']['threads']} threads; ")
        lines[-1] += ", ".join(f"{name} {text}" for name, text in sorted(named.items()))
        lines[-1] += f"; matrix products: {said}" if said else ""
    lines += [
        "",
        "| task | tool | dtype | real tok/s | peak MiB | MFU | to first step, s | loss, first and last 5 steps",
    ]
    lines[-1] += " | held-out loss, in fp32 |"
    lines.append("|---|---|---|---|---|---|---|---|---|")
    grown = [f"| {row['what']} | {row['value']:,.2f} {row['unit']} |" for row in rows if "what" in row]
    for row in (row for row in rows if "what" not in row):
        shape = {
            "real_tokens_per_second": ",.0f",
            "peak_memory_mib": ",.0f",
            "mfu": ".0%",
            "seconds_to_first_step": ".1f",
        }
        figures = ["" if row.get(name) is None else format(row[name], form) for name, form in shape.items()]
        ends = f"{row['loss_start']:.3f}, {row['loss_end']:.3f}" if row["loss_start"] is not None else ""
        if "seconds" in row:
            ends = f"{row['seconds']:.1f} s in all"
        held_out = "" if row.get("held_out_loss") is None else f"{row['held_out_loss']:.3f}"
        tool = row["tool"] + (" (not the same work)" if row.get("same_work") is False else "")
        lines.append(f"| {' | '.join([row['task'], tool, row['dtype'], *figures, ends, held_out])} |")
    lines += ["", FORMULA, ""]
    return "\n".join([*lines, *(["| growth | |", "|---|---|", *grown, ""] if grown else [])])


def chart(rows: list[dict[str, Any]], file: Path) -> None:
    """Bars of tokens a second and of peak memory, for each training task and dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["mfu"] is not None][::-1]
    if not shown:
        return
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    names = [f"{row['task']} {row['dtype']}: {row['tool']}" for row in shown]
    colours = ["C1" if row["tool"] == "litmini" else "C0" for row in shown]
    panels = (("real_tokens_per_second", "real tokens a second"), ("peak_memory_mib", "peak memory, MiB"))
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        bars = axes.barh(names, [row[key] for row in shown], color=colours)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
        axes.margins(x=0.15)
        axes.set_title(title)
    figure.savefig(file, dpi=120)
