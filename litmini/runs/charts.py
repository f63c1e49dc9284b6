"""Charts as SVG text for the report: no library and no script; each point has its values as a tooltip.

Colors are CSS classes of the page, so that charts follow its light or dark theme.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 230, 66, 14, 26, 40
MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    color: str
    """CSS class."""
    points: Sequence[Point]
    dots: bool = False


def line_chart(title: str, series: Sequence[Series], x_label: str, log: bool = False, width: int = 420) -> str:
    """Return a chart of lines.

    Args:
        log: a logarithmic y axis, if all values are above zero; else it begins at zero.
    """
    shown = [Series(s.name, s.color, _thin(s.points), s.dots) for s in series if s.points]
    finite = [point for s in shown for point in s.points if math.isfinite(point[1])]
    if not finite:
        return ""
    log = log and all(y > 0 for _, y in finite)
    last = max(x for x, _ in finite)
    ys = [y for _, y in finite]
    low, high = (min(ys) / 1.1, max(ys) * 1.1) if log else (min(0.0, *ys), 1.05 * max(0.0, *ys) or 1.0)
    y_ticks = _log_ticks(low, high) if log else _ticks(low, high)
    place = math.log if log else float

    def at(x: float, y: float) -> Point:
        part = (place(y) - place(low)) / (place(high) - place(low))
        return LEFT + x / max(last, 1e-9) * (width - LEFT - RIGHT), HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    lines = _axes(
        title, width, [(t, at(t, low)[0]) for t in _ticks(0, last)], [(t, at(0, t)[1]) for t in y_ticks], x_label
    )
    for number, s in enumerate(shown):
        inside = [(x, y, *at(x, y)) for x, y in s.points if math.isfinite(y)]
        path = " ".join(f"{px:.1f},{py:.1f}" for _, _, px, py in inside)
        lines.append(f'<polyline class="line {s.color}" points="{path}"/>')
        for x, y, px, py in inside:
            dot = f'<circle class="dot {s.color}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' if s.dots else ""
            tip = f"{x_label} {x:,g}: {s.name} {_number(y)}"
            lines.append(f'<g class="tip">{dot}<circle class="hit {s.color}" cx="{px:.1f}" cy="{py:.1f}" r="7"/>')
            lines.append(f"<title>{escape(tip)}</title></g>")
        if len(shown) > 1:
            spot = f'x="{width - RIGHT}" y="{TOP + 14 + 20 * number}"'
            lines.append(f'<text class="{s.color} label" {spot}>{escape(s.name)}</text>')
    return _svg(title, width, lines)


def bar_chart(title: str, values: Sequence[int], x_label: str, bars: int = 30, width: int = 420) -> str:
    """Return a histogram of whole numbers."""
    low, high = min(values), max(values)
    step = max(1, math.ceil((high - low + 1) / bars))
    counts = [0] * ((high - low) // step + 1)
    for value in values:
        counts[(value - low) // step] += 1
    wide, top = (width - LEFT - RIGHT) / len(counts), max(counts)
    scale = (HEIGHT - TOP - BOTTOM) / top
    every = max(1, len(counts) // 5)
    x_ticks = [(low + i * step, LEFT + i * wide) for i in range(0, len(counts), every)]
    lines = _axes(title, width, x_ticks, [(t, HEIGHT - BOTTOM - t * scale) for t in _ticks(0, top)], x_label)
    for i, count in enumerate(counts):
        first = low + i * step
        name = f"{first:,}" if step == 1 else f"{first:,} to {first + step - 1:,}"
        box = f'x="{LEFT + i * wide:.1f}" y="{HEIGHT - BOTTOM - count * scale:.1f}" width="{max(1.0, wide - 1):.1f}"'
        tip = f"<title>{name} {escape(x_label)}: {count:,}</title>"
        lines.append(f'<rect class="bar" {box} height="{count * scale:.1f}">{tip}</rect>')
    return _svg(title, width, lines)


def _svg(title: str, width: int, lines: list[str]) -> str:
    body = "\n".join(lines)
    return f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">\n{body}\n</svg>'


def _axes(title: str, width: int, x_ticks: Sequence[Point], y_ticks: Sequence[Point], x_label: str) -> list[str]:
    """Return title, grid and labels; a tick is (value, place)."""
    lines = [f'<text class="label start title" x="{LEFT}" y="{TOP - 10}">{escape(title)}</text>']
    for value, y in y_ticks:
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="label" x="{LEFT - 6}" y="{y + 4:.1f}">{_number(value)}</text>')
    for value, x in x_ticks:
        lines.append(f'<text class="label middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{value:,g}</text>')
    lines.append(f'<text class="label" x="{width - RIGHT}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
    return lines


def _thin(points: Sequence[Point]) -> list[Point]:
    """Return at most about `MOST_POINTS` points, the last one among them."""
    every = max(1, len(points) // MOST_POINTS)
    return [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers from low to high."""
    raw = (high - low) / wanted or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw * 0.999)
    first = math.ceil(low / step)
    return [round(step * i, 12) for i in range(first, int(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten, fewer where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices: list[Callable[[int], list[float]]] = [lambda p: [10.0**p], lambda p: [10.0**p, 2 * 10.0**p, 5 * 10.0**p]]
    few, many = ([t for p in powers for t in choice(p) if low <= t <= high] for choice in choices)
    if len(few) >= 3:
        return few
    return many or _ticks(low, high)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
