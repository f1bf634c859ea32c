"""How does a test of your own judge a kernel? With one line: `judge(kernel, reference=definition, example="...")`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from conformance.operations import Source
from conformance.reporting import deviations, report
from conformance.running.catalogue import UsageError, ask
from conformance.running.runner import OneByOne, run
from conformance.running.search import Result
from conformance.spec import Spec

__all__ = ["judge"]

Named = Callable[..., Any] | str


def judge(
    kernel: Named,
    *,
    reference: Named | None = None,
    example: str | None = None,
    spec: Spec | str | None = None,
    dtypes: Sequence[str] = (),
    properties: Sequence[str] = (),
    device: str | None = None,
    profile: str = "ci",
    rows: Sequence[str] = (),
    in_place: Sequence[str] = (),
    grads: Sequence[str] | None = None,
    known: str | Path | None = None,
    jobs: int | None = None,
) -> list[Result]:
    """Check that a kernel has every property, as `python -m conformance run` does.

    The checks run in processes of their own, which import the kernel and its definition by name: a kernel that ends its
    process fails the test, and the line in the message reproduces the failure outside of it.

    Args:
        kernel: a function, `torch.nn.Module` or `torch.autograd.Function`; or its name, "module:function" or
            "file.py:function".
        reference: the definition of the operation, slow and clear, in plain PyTorch; or its name.
        example: a call of it, such as "x=randn(64,128) eps=1e-6", or the path of a file; docs/judge.md has the words.
        spec: takes the place of `reference` and `example`; or the name of a module or file with a `spec`.
        dtypes: "float32", "float16", "bfloat16"; all by default.
        properties: names as `python -m conformance list` prints them; all by default.
        device: "cpu" or "cuda"; by default "cuda" if there is a CUDA device.
        profile: how many cases to draw: "dev", "ci", "gpu" or "nightly". The cases of "ci" and "gpu" are the same in
            every run.
        rows: inputs whose first dimension counts independent rows.
        in_place: inputs that the operation changes on purpose.
        grads: inputs to differentiate; by default all that the reference differentiates.
        known: a TOML file of known deviations, which do not fail; docs/judge.md has its keys.
        jobs: number of processes; by default one per core, at most 4.

    Returns:
        The result of each check, with its budget use.

    Raises:
        AssertionError: a property does not hold. The message has the paragraph that `run` prints for each failure.
        ValueError: an argument is not usable, or no property can be checked on this device.
        SpecError: the file of known deviations cannot be read.
    """
    __tracebackhide__ = True  # in pytest the message follows the line of the test
    if (spec is None) != (None not in (reference, example)) or (spec and (reference or example)):
        raise ValueError("judge: allowed: reference and example, a call such as 'x=randn(64,128)'; or spec instead")
    caller = sys._getframe(1).f_globals
    backend, definition, declared = _name(kernel, caller), _name(reference, caller), _name(spec, caller)
    lists = (tuple(in_place), tuple(rows), None if grads is None else tuple(grads))
    source = Source(definition, example, declared, *lists)
    with closing(OneByOne()) as worker:
        try:
            tasks = ask(worker, backend or "", device, profile, source, properties, dtypes)
        except UsageError as error:
            raise ValueError(f"judge: {error}") from error
        expected = deviations.read(Path(known), tasks[0].device) if known else []
        done = [(task, worker(task)) for task in tasks] if jobs == 1 else run(tasks, lambda *_: None, jobs=jobs)
    results = [deviations.expected(result, expected) for _, result in done]
    results = deviations.gone(results, expected, profile)
    if any(result.verdict == "fail" for result in results):
        shown = report.failures(results, backend or "", tasks[0].device, source)
        raise AssertionError(f"{shown}\n\n{report.closing(results)}")
    if all(result.verdict == "skip" for result in results):
        raise ValueError(f"judge: nothing was checked: {results[0].message}")
    return results


def _name(thing: Any, caller: dict[str, Any]) -> str | None:
    """The name by which other processes import something: of its module, or else of the caller's file."""
    __tracebackhide__ = True
    if thing is None or isinstance(thing, str):
        return thing
    home = sys.modules.get(str(getattr(thing, "__module__", None)))
    places = {home.__name__: vars(home)} if home and vars(home) is not caller else {}
    path = caller.get("__file__")
    if path is not None:  # of a test, which other processes may not find by the name of its module
        near = os.path.relpath(path)
        places[path if near.startswith(os.pardir) else near] = caller
    for place, names in places.items():
        for name, value in names.items():
            if value is thing:
                return f"{place}:{name}"
    allowed = "what a module, or the file of the test, gives a name, since other processes import it"
    raise ValueError(f"judge: got {thing!r}; allowed: {allowed}")
