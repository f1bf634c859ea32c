"""Kernels that are slower by a known share of their own device time, or wrong: what a gate has to find.

The device sleeps after a slowed pass. The length of the sleep is calibrated when the kernel is first called with inputs
of a shape: from the time of the pass, the rate of the sleep, and the time to launch one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial, wraps
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from conformance.backends import OPERATIONS
from conformance.bench.card import Card
from conformance.specs import specs
from conformance.trial import Function

CALLS = 10  # in one timing
REPEATS = 5  # timings of the kernel and of the slowed one, in turns
CORRECTIONS = 2
RATE_CYCLES = 10_000_000

WRONG = "rms_norm"  # of a slowed backend: its results are 2 % too large


class Device(Protocol):
    """A device that can sleep and be timed."""

    def sleep(self, cycles: int) -> None:
        """Queue a sleep."""
        ...

    def timer(self, call: Callable[[], Any]) -> Callable[[], float]:
        """A function that measures the device time of a call in milliseconds."""
        ...


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self._card = Card()

    def sleep(self, cycles: int) -> None:
        """Queue a sleep; none for 0 cycles."""
        if cycles:
            torch.cuda._sleep(cycles)

    def timer(self, call: Callable[[], Any]) -> Callable[[], float]:
        """A function that measures the time of a call in milliseconds: of CALLS in one CUDA graph, as the bench does.

        Raises:
            RuntimeError: the call cannot be captured.
        """

        def calls() -> None:
            for _ in range(CALLS):
                call()

        captured = self._card.capture(calls)
        if isinstance(captured, str):
            raise RuntimeError(f"call: got one that no CUDA graph can hold ({captured}); allowed: one that it can")
        replay, _ = captured
        return lambda: self._card.time_queued(replay)[0] / CALLS


@dataclass(frozen=True)
class Sleeps:
    """Cycles that the device sleeps after each pass; 0 for no sleep."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Shares:
    """The measured slowdown of a kernel, as a fraction of its device time."""

    forward: float
    full: float


@dataclass
class Slowed:
    """A kernel that is slower by a share of its device time; a share of 0 makes the same calls without a sleep.

    Attributes:
        op: its operation.
        function: the kernel.
        share: of the time of each pass.
        found: called with the shape of the first input, the options and the measured shares.
        device: the device that sleeps.
    """

    op: str
    function: Function
    share: float
    found: Callable[[tuple[int, ...], Mapping[str, Any], Shares], None]
    device: Device

    def __post_init__(self) -> None:
        self._sleeps: dict[Any, Sleeps] = {}
        self.__signature__ = inspect.signature(self.function)  # from which the judge reads the options

    def __call__(self, *inputs: Tensor, **options: Any) -> Any:
        """Call the kernel, and sleep after both passes."""
        which = (inputs[0].shape, *options.items())
        if self.share and which not in self._sleeps:
            self._sleeps[which], shares = self._measured(inputs, options)
            self.found(tuple(inputs[0].shape), options, shares)
        return self._slowed(self._sleeps.get(which, Sleeps()), inputs, options)

    def _slowed(self, sleeps: Sleeps, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        outputs = self.function(*inputs, **options)
        self.device.sleep(sleeps.forward)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        if first.requires_grad:
            first.register_hook(lambda _: self.device.sleep(sleeps.backward))
        return outputs

    def _measured(self, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Sleeps, Shares]:
        spec = specs()[self.op]
        names = inspect.signature(spec.reference).parameters
        own = [one.detach().clone() if isinstance(one, Tensor) else one for one in inputs]
        leaves = [
            one.detach().clone().requires_grad_() if name in spec.grads else one
            for name, one in zip(names, own, strict=False)
        ]
        wanted = [one for one in leaves if isinstance(one, Tensor) and one.requires_grad]
        with torch.no_grad():
            outputs = self.function(*own, **options)
        gradients = [torch.ones_like(one) for one in (outputs if isinstance(outputs, tuple) else (outputs,))]

        def forward(sleeps: Sleeps) -> None:
            with torch.no_grad():
                self._slowed(sleeps, tuple(own), options)

        def full(sleeps: Sleeps) -> None:
            with torch.enable_grad():
                outputs = self._slowed(sleeps, tuple(leaves), options)
                torch.autograd.grad(outputs, wanted, gradients)

        return calibrate(self.device, self.share, forward, full)


def calibrate(
    device: Device, share: float, forward: Callable[[Sleeps], None], full: Callable[[Sleeps], None]
) -> tuple[Sleeps, Shares]:
    """The sleeps that make both passes slower by a share, and the shares that were measured with them.

    A sleep takes time to launch, even for one cycle. If that is more than the share, the measured share is larger.

    Args:
        device: sleeps, and is timed.
        share: of the device time of each pass.
        forward: runs the forward pass.
        full: runs both passes.
    """
    device.sleep(1)  # loads it
    one, two = (device.timer(partial(device.sleep, count * RATE_CYCLES))() for count in (1, 2))
    cycles_per_millisecond = RATE_CYCLES / (two - one)
    plain, slowed = _times(device, forward, full, Sleeps(1, 1))
    wanted = share * plain[0], share * (plain[1] - plain[0])
    cycles = [1.0, 1.0]
    for _ in range(CORRECTIONS):
        rise = slowed[0] - plain[0], slowed[1] - plain[1]
        missing = wanted[0] - rise[0], wanted[1] - (rise[1] - rise[0])
        cycles = [max(1.0, old + cycles_per_millisecond * new) for old, new in zip(cycles, missing, strict=True)]
        plain, slowed = _times(device, forward, full, Sleeps(*map(round, cycles)))
    return Sleeps(*map(round, cycles)), Shares(slowed[0] / plain[0] - 1, slowed[1] / plain[1] - 1)


def _times(
    device: Device, forward: Callable[[Sleeps], None], full: Callable[[Sleeps], None], sleeps: Sleeps
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Milliseconds of the forward pass and of both, without sleeps and with them."""
    timers = [device.timer(partial(call, one)) for one in (Sleeps(), sleeps) for call in (forward, full)]
    rounds = [[timer() for timer in timers] for _ in range(REPEATS)]
    a, b, c, d = (median(times) for times in zip(*rounds, strict=True))
    return (a, b), (c, d)


def kernels(share: float, log: Path) -> dict[str, Function]:
    """The project's fast kernels, slowed; with a share WRONG is wrong.

    Args:
        share: of the device time; 0 for a base, whose kernels are called in the same way.
        log: a file that gets a line of JSON for every kernel and shape that is slowed.
    """
    import unsloth_fast.kernels as fast  # not before the card is there

    def found(op: str, shape: tuple[int, ...], options: Mapping[str, Any], shares: Shares) -> None:
        line = {"planted": share, "op": op, "shape": shape, "options": str(dict(options)), **asdict(shares)}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    device = Cuda()
    made: dict[str, Function] = {
        op: Slowed(op, getattr(fast, op), share, partial(found, op), device) for op in OPERATIONS if hasattr(fast, op)
    }
    if share:
        made[WRONG] = _wrong(getattr(fast, WRONG))
    return made


def _wrong(function: Function) -> Function:
    @wraps(function)
    def wrong(*inputs: Tensor, **options: Any) -> Tensor:
        return 1.02 * function(*inputs, **options)

    return wrong
