"""What a run shows: in a terminal of 80 columns, and without one."""

import fcntl
import os
import re
import select
import struct
import termios
from contextlib import contextmanager, redirect_stderr
from types import SimpleNamespace

from litmini.training.display import Display, say, validating
from litmini.training.setup import Progress

FABRIC = SimpleNamespace(is_global_zero=True, print=print)
METRICS = {
    "loss": 0.5331,
    "lr": 2e-4,
    "grad_norm": 0.79,
    "tokens_per_second": 123_456.0,
    "mfu": 0.4,
    "memory_mib": 9999.0,
}


@contextmanager
def terminal():
    """Make standard error a terminal of 80 columns; yield a function that returns the lines that it was given.

    No fixture: pytest puts its own stream in place between fixtures and test.
    """
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w") as stream, redirect_stderr(stream):

        def shown() -> list[str]:
            stream.flush()
            found = b""
            while select.select([ours], [], [], 0.3)[0]:  # the system passes it on in pieces
                found += os.read(ours, 1 << 16)
            return re.split(r"[\r\n]+", found.decode())

        yield shown
    os.close(ours)


def test_the_bar_fits_into_80_columns_and_has_the_validation_loss(capsys):
    progress = Progress(step=5_000)
    with terminal() as shown:
        display = Display(FABRIC, 10_000, 5_000)
        progress.advance(1, 1, 1.0)
        progress.remember(0.4123)
        display.show(METRICS | {"val_loss": 0.4123}, progress, {})
        progress.advance(1, 1, 1.0)
        display.show(METRICS, progress, {})
        display.bar.refresh()
        display.bar.close()
        lines = shown()
    assert max(map(len, lines)) <= 80
    assert lines[-2].startswith("training 5002/10000 |") and "loss 0.533, val 0.412, 123,456 tok/s" in lines[-2]
    assert "step 5001 of 10000: validation loss 0.4123, the lowest so far\n" in capsys.readouterr().out


def test_without_a_terminal_there_are_lines(capsys):
    display, progress = Display(FABRIC, 40, 0), Progress()
    for step in range(1, 41):
        progress.advance(1, 1, 1.0)
        if step in (2, 4):
            progress.remember(0.5 if step == 2 else 0.6)
        display.show(METRICS | ({"val_loss": 0.5 + 0.1 * (step == 4)} if step in (2, 4) else {}), progress, {})
    out = capsys.readouterr().out
    assert out.count("loss 0.533, lr 2.0e-04, norm 0.79, 123,456 tok/s, MFU 40%, 9,999 MiB, ") == 20
    assert "step 2 of 40: validation loss 0.5000, the lowest so far" in out
    assert "step 4 of 40: validation loss 0.6000, the lowest was 0.5000, of step 2" in out


def test_an_evaluation_has_a_bar_of_its_own():
    with terminal() as shown:
        assert list(validating(FABRIC, [{}, {}, {}])) == [{}, {}, {}]
        lines = shown()
    assert any(line.startswith("validating:   0%") and "0/3" in line for line in lines) and max(map(len, lines)) <= 80


def test_one_process_speaks(capsys):
    other = SimpleNamespace(is_global_zero=False, print=lambda text: None)
    say(other, "nothing")
    assert list(validating(other, [{}])) == [{}]
    display = Display(other, 1, 0)
    display.show(METRICS | {"val_loss": 1.0}, Progress(step=1), {})
    assert capsys.readouterr() == ("", "")
