"""Runs tasks in worker processes, so that a kernel that kills its process is reported as a failure."""

import math
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar

import torch

from conformance import backends, operations
from conformance.case import DTYPES
from conformance.operations import PROJECT, Source
from conformance.piece import PieceTrial
from conformance.pieces import pieces
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.property import Property
from conformance.running import processes
from conformance.running.search import AnyCase, AnyTrial, Result, reproduce, search
from conformance.trial import Trial

CASE_TIMEOUT_SECONDS = 300  # compiling for one case takes under 60


@dataclass(frozen=True)
class Task:
    """Check one property of one operation of one backend in one dtype, or of one training piece, without a dtype."""

    backend: str
    op: str
    property: str
    dtype: str | None
    device: str
    profile: str = "ci"
    case: AnyCase | None = None  # check only this one
    source: Source = PROJECT  # of the operation

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        """Run in this process."""
        trial, prop = self._trial_and_property()
        if self.case is not None:
            return reproduce(trial, prop, self.case, self.dtype)
        return search(trial, prop, PROFILES[self.profile], self.dtype, notify)

    def _trial_and_property(self) -> tuple[AnyTrial, Property]:
        operations.install_properties()
        judged = backends.load(self.backend, self.device, self.source)
        function = judged.functions[self.op]
        if self.dtype is None:
            piece = pieces()[self.op]
            return PieceTrial(piece, function, self.device), piece.properties[self.property]
        trial = Trial(operations.specs(self.source)[self.op], function, DTYPES[self.dtype], self.device)
        return trial, PROPERTIES[self.property]


class Work(Protocol):
    """What a worker process can run: a check of something in a dtype, with a result for a table."""

    @property
    def op(self) -> str:
        """What is checked."""
        ...

    @property
    def dtype(self) -> str | None:
        """The dtype's name; None without one."""
        ...

    @property
    def backend(self) -> str:
        """Whose code is checked."""
        ...

    @property
    def device(self) -> str:
        """Where it runs."""
        ...

    @property  # the last one: in the rest of the class the name is this one's
    def property(self) -> str:
        """What must hold."""
        ...

    def __call__(self, notify: Callable[[str], None]) -> Result:
        """Run in this process; call `notify` with each case before it runs."""
        ...


AnyWork = TypeVar("AnyWork", bound=Work)


@dataclass
class _Worker:
    """A process, our end of its pipe, and the task and case that it works on."""

    process: BaseProcess
    pipe: Connection
    task: Any = None
    case: str = ""
    started: float = 0.0  # when the task was given
    last_message: float = 0.0  # when it arrived
    timed_out: bool = False
    timeout: float = CASE_TIMEOUT_SECONDS
    preload: Sequence[str] | None = None


def run(
    tasks: Iterable[AnyWork],
    on_result: Callable[[AnyWork, Result], None],
    *,
    jobs: int | None = None,
    stop_at_failure: bool = False,
    timeout: float = CASE_TIMEOUT_SECONDS,
    limit: float = math.inf,
    preload: Sequence[str] | None = None,
) -> list[tuple[AnyWork, Result]]:
    """Run tasks in worker processes.

    Args:
        tasks: in the order in which they start.
        on_result: called with each result when it arrives.
        jobs: number of processes; by default one per core, at most 4.
        stop_at_failure: after a failure, skip the remaining tasks of the same backend and operation.
        timeout: seconds that a case may take.
        limit: seconds that all tasks of one operation and backend may take together. One that is running then is
            stopped and has failed, and those that have not started are skipped.
        preload: modules that one process imports. Then every task has a process of its own, forked from it.

    Returns:
        The results, in the order of the tasks.
    """
    queue, done, failed = list(tasks), {}, set()
    left: defaultdict[tuple[str, str], float] = defaultdict(lambda: limit)
    order = {task: index for index, task in enumerate(queue)}
    workers = [_start(timeout, preload) for _ in range(min(jobs or min(os.cpu_count() or 1, 4), len(queue)))]
    try:
        idle = deque(workers)
        while queue or any(worker.task for worker in workers):
            while idle and (task := next_task(queue, [worker.task for worker in workers if worker.task])):
                queue.remove(task)
                seconds = left[task.backend, task.op]
                if seconds <= 0:
                    message = f"no time is left of the {limit:g} s for {task.op}"
                    done[task] = Result(task.op, task.property, task.dtype, "skip", message=message)
                    on_result(task, done[task])
                elif not (stop_at_failure and (task.backend, task.op) in failed):
                    _give(workers, idle.popleft(), task).timeout = min(timeout, seconds)
            for worker in _ready(workers):
                task, result = worker.task, _receive(worker)
                if result is None or task is None:
                    continue
                done[task] = result
                left[task.backend, task.op] -= time.monotonic() - worker.started
                on_result(task, result)
                if result.verdict == "fail":
                    failed.add((task.backend, task.op))
                if preload is not None or _broken(task, result):
                    worker = _replaced(workers, worker)
                worker.task = None
                idle.append(worker)
    finally:
        _end(workers)
    return sorted(done.items(), key=lambda item: order[item[0]])


class OneByOne:
    """Runs tasks that come one by one in a worker process, which starts with the first and is replaced if it dies."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._workers: list[_Worker] = []

    def __call__(self, task: Task) -> Result:
        """Run a task and wait for its result."""
        self._workers = self._workers or [_start(CASE_TIMEOUT_SECONDS, None)]
        worker = _give(self._workers, self._workers[0], task)
        while True:
            result = _receive(worker) if _ready(self._workers) else None
            if result is not None:
                if _broken(task, result):
                    self.close()
                worker.task = None
                return result

    def close(self) -> None:
        """Stop the process; a later task starts another."""
        _end(self._workers)
        self._workers = []


def _give(workers: list[_Worker], worker: _Worker, task: Work) -> _Worker:
    """Send a task to a worker, or to the one that replaces it if it has died; returns that worker."""
    if not worker.process.is_alive():  # its last task may have ended it, even after the result
        worker = _replaced(workers, worker)
    worker.task, worker.case, worker.started = task, "", time.monotonic()
    worker.last_message = worker.started
    worker.pipe.send(task)
    return worker


def _broken(task: Work, result: Result) -> bool:
    """Whether a failure may have broken the CUDA context of the process: an illegal access outlives the launch."""
    return task.device == "cuda" and result.verdict == "fail"


def next_task(queue: Iterable[AnyWork], running: Iterable[Work]) -> AnyWork | None:
    """The first task that may start now, or None: at most one task that takes gigabytes runs at a time."""
    large_runs = any(_takes_gigabytes(task.property) for task in running)
    return next((task for task in queue if not (large_runs and _takes_gigabytes(task.property))), None)


def _takes_gigabytes(name: str) -> bool:
    return name in PROPERTIES and "gigabytes" in PROPERTIES[name].needs


@contextmanager
def alone(name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Check a property of this name, while no other process of this user checks one that takes gigabytes.

    Args:
        name: one that takes no gigabytes need not wait.
        waiting: called every second until it is this process's turn, so that it is not taken for one that hangs.
    """
    if not _takes_gigabytes(name):
        yield
        return
    import fcntl  # which Windows lacks, and Triton too

    with (Path(tempfile.gettempdir()) / f"conformance-gigabytes-{os.getuid()}").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(1)
        yield


def _start(timeout: float, preload: Sequence[str] | None) -> _Worker:
    # Triton's interpreter multiplies matrices with NumPy, whose threads in several processes wait for each other: the
    # cases of packed_attention took 1.35 times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    ours, theirs = multiprocessing.Pipe()
    process = processes.start(_serve, theirs, preload)
    theirs.close()
    return _Worker(process, ours, last_message=time.monotonic(), timeout=timeout, preload=preload)


def _replaced(workers: list[_Worker], worker: _Worker) -> _Worker:
    """Stop this worker and start a new one in its place."""
    _end([worker])
    workers[workers.index(worker)] = new = _start(worker.timeout, worker.preload)
    return new


def ignore_expected_warnings() -> None:
    """Ignore the warnings that judging causes on purpose."""
    # Triton's interpreter computes with NumPy, which warns about every NaN and infinity that a case contains.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")


def _end(workers: Sequence[_Worker]) -> None:
    """Stop workers, all at the same time: one with a CUDA context and compiler processes takes seconds to exit."""
    for worker in workers:
        worker.pipe.close()
    deadline = time.monotonic() + 5
    for worker in workers:
        worker.process.join(0 if worker.task else max(0, deadline - time.monotonic()))
        worker.process.kill()
        worker.process.join()


def _serve(pipe: Connection) -> None:
    """Receive tasks and send results until the pipe closes; send each case before it runs."""
    Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    ignore_expected_warnings()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        result = task(pipe.send)
        if result.verdict != "fail" and torch.cuda.is_initialized():  # after a failure it may raise, see _broken
            torch.cuda.empty_cache()  # the other processes share the card
        pipe.send(result)


def _end_with_the_parent() -> None:
    """End this process with the one that started it, also in the middle of a case."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """The workers with a message; one that was silent for too long is killed, which closes its pipe."""
    pipes = {worker.pipe: worker for worker in workers if worker.task}
    ready = [pipes[pipe] for pipe in wait(list(pipes), timeout=1.0) if isinstance(pipe, Connection)]
    for worker in pipes.values():
        if worker in ready:
            worker.last_message = time.monotonic()
        elif time.monotonic() - worker.last_message > worker.timeout:
            worker.timed_out = True
            worker.process.kill()
    return ready


def _receive(worker: _Worker) -> Result | None:
    """The result of the worker's task, or None if the message only announces a case."""
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):  # the latter if it died with an unread message
        worker.process.join()
        return _death(worker)
    if isinstance(message, str):
        worker.case = message
        return None
    return message


def _death(worker: _Worker) -> Result:
    code, task = worker.process.exitcode or 0, worker.task
    assert task is not None
    if worker.timed_out:
        how = f"no result in {worker.timeout:g} s: the process was stopped"
    elif code < 0:
        name = signal.Signals(-code).name
        how = f"the process died ({name}): it accessed memory outside the tensors, or it was killed"
    else:
        how = f"the process exited (status {code})"
    return Result(task.op, task.property, task.dtype, "fail", case=worker.case or None, message=how)
