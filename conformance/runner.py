"""Runs many checks in worker processes, so that a kernel that kills its process is a finding and not the end."""

import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from conformance import backends
from conformance.piece import PieceTrial, pieces
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.search import DTYPES, AnyCase, AnyLaw, AnyTrial, Result, replay, search
from conformance.spec import specs
from conformance.trial import Trial

PATIENCE = 300  # seconds for one case; compiling one takes under 60


@dataclass(frozen=True)
class Check:
    """One law on one operation of one backend in one dtype, or on one training piece, which has none."""

    backend: str
    op: str
    property: str
    dtype: str | None
    device: str
    profile: str = "ci"
    case: AnyCase | None = None  # this one alone

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        """Run it in this process."""
        trial, law = self._trial_and_law()
        if self.case is not None:
            return replay(trial, law, self.case, self.dtype)
        return search(trial, law, PROFILES[self.profile], self.dtype, notify)

    def _trial_and_law(self) -> tuple[AnyTrial, AnyLaw]:
        judged = backends.load(self.backend, self.device)
        function = judged.functions[self.op]
        if self.dtype is None:
            piece = pieces()[self.op]
            return PieceTrial(piece, function, self.device), piece.properties[self.property]
        trial = Trial(specs()[self.op], function, DTYPES[self.dtype], self.device, judged.truncates)
        return trial, PROPERTIES[self.property]


@dataclass
class _Worker:
    """A process, our end of its pipe, and what it is doing."""

    process: BaseProcess
    pipe: Connection
    check: Check | None = None
    case: str = ""
    heard: float = 0.0
    timed_out: bool = False


def run(
    checks: Iterable[Check],
    report: Callable[[Check, Result], None],
    *,
    jobs: int | None = None,
    stop_at_failure: bool = False,
) -> list[tuple[Check, Result]]:
    """Run checks in worker processes.

    Args:
        checks: in the order in which they are begun.
        report: told each result as it comes.
        jobs: how many processes; by default one a core, at most 4.
        stop_at_failure: leave out the checks of a backend's operation after its first failure.

    Returns:
        The results, in the order of the checks.
    """
    queue, done, failed = list(checks), {}, set()
    order = {check: index for index, check in enumerate(queue)}
    workers = [_start() for _ in range(min(jobs or min(os.cpu_count() or 1, 4), len(queue)))]
    try:
        idle = deque(workers)
        while queue or any(worker.check for worker in workers):
            while idle and (check := next_check(queue, [worker.check for worker in workers if worker.check])):
                queue.remove(check)
                if not (stop_at_failure and (check.backend, check.op) in failed):
                    worker = idle.popleft()
                    if not worker.process.is_alive():  # what its last check left behind
                        worker = _replaced(workers, worker)
                    worker.check, worker.case, worker.heard = check, "", time.monotonic()
                    worker.pipe.send(check)
            for worker in _ready(workers):
                check, result = worker.check, _receive(worker)
                if result is None or check is None:
                    continue
                done[check] = result
                report(check, result)
                if result.verdict == "fail":
                    failed.add((check.backend, check.op))
                # After a failure on a GPU its context may be broken for good: an illegal access outlives the launch.
                if not worker.process.is_alive() or (check.device == "cuda" and result.verdict == "fail"):
                    worker = _replaced(workers, worker)
                worker.check = None
                idle.append(worker)
    finally:
        _end(workers)
    return sorted(done.items(), key=lambda item: order[item[0]])


def next_check(queue: Iterable[Check], running: Iterable[Check]) -> Check | None:
    """The first check that may run beside these, if there is one: of those that take gigabytes only one at a time."""
    crowded = any(map(_is_large, running))
    return next((check for check in queue if not (crowded and _is_large(check))), None)


def _is_large(check: Check) -> bool:
    return getattr(PROPERTIES.get(check.property), "LARGE", False)


def _start() -> _Worker:
    # The products of Triton's interpreter are NumPy's, whose threads in several processes wait for each other: the
    # cases of packed_attention took 1.35 times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, heard=time.monotonic())


def _replaced(workers: list[_Worker], worker: _Worker) -> _Worker:
    """A new worker in the place of this one, which is ended."""
    _end([worker])
    workers[workers.index(worker)] = new = _start()
    return new


def quiet() -> None:
    """Keep this process from warning of what is meant."""
    # Triton's interpreter computes with NumPy, which warns of every NaN and infinity that a case puts in on purpose.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")


def _end(workers: Sequence[_Worker]) -> None:
    """End workers, all at once: one with a CUDA context and compilers of its own takes seconds to leave by itself."""
    for worker in workers:
        worker.pipe.close()
    deadline = time.monotonic() + 5
    for worker in workers:
        worker.process.join(0 if worker.check else max(0, deadline - time.monotonic()))
        worker.process.kill()
        worker.process.join()


def _serve(pipe: Connection) -> None:
    """Answer checks with results until the pipe closes; each case is announced before it runs."""
    torch.set_num_threads(1)
    quiet()
    while True:
        try:
            check = pipe.recv()
        except EOFError:
            return
        result = check(pipe.send)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the other processes share the card
        pipe.send(result)


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """The workers that have something to say; one that was silent for too long is stopped, and says so by its end."""
    pipes = {worker.pipe: worker for worker in workers if worker.check}
    ready = [pipes[pipe] for pipe in wait(list(pipes), timeout=1.0) if isinstance(pipe, Connection)]
    for worker in pipes.values():
        if worker in ready:
            worker.heard = time.monotonic()
        elif time.monotonic() - worker.heard > PATIENCE:
            worker.timed_out = True
            worker.process.kill()
    return ready


def _receive(worker: _Worker) -> Result | None:
    """The result of the worker's check, or None while it is still at it."""
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):  # the latter where it died with something unread
        worker.process.join()
        return _death(worker)
    if isinstance(message, str):
        worker.case = message
        return None
    return message


def _death(worker: _Worker) -> Result:
    code, check = worker.process.exitcode or 0, worker.check
    assert check is not None
    if worker.timed_out:
        how = f"no result in {PATIENCE} s: the process was stopped"
    elif code < 0:
        how = (
            f"the process died ({signal.Signals(-code).name}): memory outside the tensors was touched, or it was killed"
        )
    else:
        how = f"the process ended itself (exit status {code})"
    return Result(check.op, check.property, check.dtype, "fail", case=worker.case or None, message=how)
