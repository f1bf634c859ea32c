"""Processes of tests: the signals they heed, and waiting for what they do."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Seconds after which a process counts as hanging: no test of a right program takes as long, however busy the machine.
PATIENCE = 900


@contextmanager
def heeded(number: signal.Signals) -> Iterator[None]:
    """Processes that start meanwhile do not ignore a signal, as they would below `nohup`."""
    before = None if number == signal.SIGKILL else signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(number, before)


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait until it has happened; fail if that takes longer than `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def group_exists(group: int) -> bool:
    """Whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for somebody to ask for its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
