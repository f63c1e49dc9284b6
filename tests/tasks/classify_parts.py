"""What the tests of classification share: texts with labels of each problem type."""

import json
from pathlib import Path
from typing import Any

from litmini.data.labels import MULTI, REGRESSION, SINGLE

TYPES = (SINGLE, MULTI, REGRESSION)
TEXTS = [
    "apples and pears",
    "a ripe plum from Oslo, with cherries and a long story about them",
    "rain",
    "a hammer, nails, and snow in Lisbon",
    "one saw",
    "hail and plums",
]
LABELS: dict[str, list[Any]] = {
    SINGLE: ["fruit", "fruit", "weather", "tools", "tools", "weather"],
    MULTI: [["fruit"], ["fruit"], ["weather"], ["tools", "weather"], ["tools"], ["fruit", "weather"]],
    REGRESSION: [0.5, 2.0, -1.0, 1.25, 0.0, -0.5],
}


def write_labelled(file: Path, kind: str, copies: int = 1, first: int = 0) -> Path:
    """Write each text `copies` times, with another number at its end each time."""
    rows = [
        {"text": f"{text}, number {i}", "label": label}
        for i in range(first, first + copies)
        for text, label in zip(TEXTS, LABELS[kind], strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
