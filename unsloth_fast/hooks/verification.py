"""Do the fast operations stay within the budget in this training? `verify_every=N` compares every Nth step's calls.

A verified step has the numbers of any other: the calls are computed again beside it (unsloth_fast/shadow.py).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module
from transformers import TrainingArguments

from unsloth_fast.backends import Backend
from unsloth_fast.shadow import Watch, fast_operations, shadowed

logger = logging.getLogger(__name__)


class Verification:
    """Compares the calls of every Nth optimizer step with the reference.

    Args:
        backend: its operations are shadowed.
        every: N.

    Attributes:
        backend: the backend to place, which works as the given one in all other steps.
    """

    def __init__(self, backend: Backend, every: int) -> None:
        self._watch, self._every = Watch(), every
        self.backend = shadowed(backend, self._watch)
        self._used: dict[str, float] = {}
        self._said: set[str] = set()

    @contextmanager
    def microbatch(self, model: Module, step: int) -> Iterator[None]:
        """Within the context the forward and backward pass of a microbatch of this step, counted from 1, run."""
        if step % self._every:
            yield
            return
        try:
            with self._watch.watching(model):
                yield
        finally:  # what an operation returned may be why the step raises an error
            self._report(step)

    def _report(self, step: int) -> None:
        """Warn of what was found in a microbatch, and keep the budget uses for the log."""
        findings, unverified = self._watch.take()
        for name in dict.fromkeys(finding.operation for finding in findings):
            calls = [finding for finding in findings if finding.operation == name]
            worst = max(calls, key=lambda finding: finding.used)
            self._used[name] = max(self._used.get(name, 0.0), worst.used)
            if worst.used > 1:
                over = sum(finding.used > 1 for finding in calls)
                results = f"beyond it: {over} of {len(calls)} results"
                logger.warning("verify_every: step %d: %s; %s", step, worst, results)
        if not findings and not unverified:
            unverified = {"": "the model called no fast operation"}
        for name, reason in unverified.items():
            if name not in self._said:
                self._said.add(name)
                logger.warning("verify_every: step %d: %s was not compared: %s", step, name or "nothing", reason)

    def take(self) -> dict[str, float]:
        """The largest budget use of each operation since this was last called, and the largest of all, for the log."""
        used, self._used = self._used, {}
        if not used:
            return {}
        shares = {f"verify/{name}_budget_use": share for name, share in used.items()}
        return shares | {"verify/worst_budget_use": max(used.values())}


def verification_of(args: TrainingArguments, backend: Backend) -> Verification | None:
    """The verification that the arguments ask for; None for none.

    Raises:
        ValueError: nothing can be verified: the backend has no fast operation, or the model is compiled.
    """
    every: int | None = getattr(args, "verify_every", None)
    if every is None:
        return None
    if not fast_operations(backend):
        raise ValueError(
            f"verify_every: got {every} with backend {backend.name!r} ({backend.reason}), which has nothing to verify; "
            "allowed: None, or a backend with a fast operation"
        )
    if args.torch_compile:
        raise ValueError(
            f"verify_every: got {every} with torch_compile=True; allowed: None, as compiled code is one call"
        )
    return Verification(backend, every)
