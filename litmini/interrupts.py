"""Ctrl-C within an import ends the process at once. Importing this first, as `litmini.cli` does, arranges that.

An import that is interrupted may swallow the KeyboardInterrupt (`except: pass`), or turn it into another error.
"""

import os
import signal
import threading
from types import FrameType


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\ninterrupted.\n")
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _interrupt)
