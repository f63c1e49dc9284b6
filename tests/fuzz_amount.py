"""How many random cases: `LITMINI_FUZZ=10 python -m pytest tests/fuzz` tries ten times as many, with further seeds."""

import os


def seeds(count: int) -> range:
    """Return the seeds of a test: `count` of them, times the environment variable LITMINI_FUZZ."""
    return range(max(1, round(count * float(os.environ.get("LITMINI_FUZZ") or 1))))
