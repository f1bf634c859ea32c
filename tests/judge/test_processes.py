"""Worker processes have the environment, path and folder of this process when they start, forked or not."""

import os
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from conformance.running import processes


def describe(pipe: Connection) -> None:
    """Send what a worker has, and which modules it had before it imported any."""
    known = "conformance.running.runner" in sys.modules
    pipe.send((os.environ.get("OF_THE_TEST"), os.environ.get("PYTHONSAFEPATH"), os.getcwd(), sys.path, known))


@pytest.mark.parametrize("value", ["first", "second"])
def test_a_worker_has_what_this_process_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setenv("OF_THE_TEST", value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ours, theirs = Pipe()
    process = processes.start(describe, theirs)
    theirs.close()
    variable, safe_path, folder, path, known = ours.recv()
    process.join()
    assert (variable, safe_path, folder) == (value, os.environ.get("PYTHONSAFEPATH"), str(tmp_path))
    assert path == [part or str(tmp_path) for part in sys.path]
    assert known or torch.cuda.is_available()
    assert "OF_THE_TEST" in os.environ and "PYTHONSAFEPATH" not in os.environ
