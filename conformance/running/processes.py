"""How worker processes start: without a GPU they are forked from one process that has imported the judge.

Importing torch, Triton and the judge takes a new process 3 s. The process that does so once, multiprocessing's "fork
server", starts with the first worker and ends with this process. With a GPU every worker is a new process: there a
process must not be forked from one that has asked for the GPU, and Triton may have to compile.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any
from unittest.mock import patch

import torch

import unsloth_ref.kernels

JUDGE = (
    "conformance.running.runner",
    "conformance.mutate.examine",
    *(f"conformance.specs.{op}" for op in unsloth_ref.kernels.__all__),
    *(("triton.runtime.interpreter",) if find_spec("triton") else ()),
)


def start(serve: Callable[[Connection], None], pipe: Connection, preload: Sequence[str] | None = None) -> BaseProcess:
    """Start a daemon that serves a pipe, with this process's environment, path and working directory.

    Args:
        serve: a function of a module.
        pipe: its argument.
        preload: modules that the process from which it is forked imports, with a GPU; without one those of the judge.
            None if it need not be forked with a GPU.
    """
    without_gpu = sys.platform == "linux" and not torch.cuda.is_available()
    modules = JUDGE if without_gpu else preload
    context: Any = multiprocessing.get_context("spawn" if modules is None else "forkserver")
    if modules is not None:
        context.set_forkserver_preload([*modules])
    process = context.Process(target=_in_environment, args=(dict(os.environ), serve, pipe), daemon=True)
    with _of_the_server(without_gpu):
        process.start()
    return process


@contextmanager
def _of_the_server(interprets: bool) -> Iterator[None]:
    """The environment for a fork server, should it start now: it finds modules where this process does."""
    found = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "PYTHONSAFEPATH": "1"}
    with patch.dict(os.environ, found | ({"TRITON_INTERPRET": "1"} if interprets else {})):
        yield


def _in_environment(environment: dict[str, str], serve: Callable[[Connection], None], pipe: Connection) -> None:
    """Serve with these variables: a forked process has those with which the process that it comes from started."""
    os.environ.clear()
    os.environ.update(environment)
    serve(pipe)
