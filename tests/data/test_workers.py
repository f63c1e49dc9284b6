"""A function applied by several processes."""

import os
import signal

import pytest

from litmini.data.workers import map_in_order
from litmini.errors import UserError


def square(number: int) -> int:
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def make_square():
    return square


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_results_come_in_order_and_few_items_are_read_ahead(method):
    read: list[int] = []
    results = map_in_order(make_square, (read.append(i) or i for i in range(100)), 2, method)
    assert next(results) == 0 and len(read) <= 8
    assert list(results) == [i * i for i in range(1, 100)]


def test_a_killed_process_is_reported():
    with pytest.raises(UserError, match="was killed, most likely for lack of memory"):
        list(map_in_order(make_square, [1, -1, 2], 2, "fork"))
