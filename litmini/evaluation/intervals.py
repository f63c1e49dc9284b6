"""Intervals of shares."""

import math

Z = 1.959964  # of a 95% interval


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of a probability of which `successes` of n were seen (Wilson, 1927): within 0 and 1."""
    p, z2 = successes / n, Z * Z / n
    middle = (p + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)
