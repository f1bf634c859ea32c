"""Helpers for the properties of two or more pieces."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn import Parameter

from conformance.piece import PieceTrial
from conformance.property import Check
from conformance.tolerances.gates import Failure
from conformance.trial import Caught, describe
from unsloth_ref.types import IGNORE_INDEX

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
UNIT = 2.0**-53


def comparable(value: Any) -> Any:
    """Convert a value so that == compares tensors by dtype, shape and elements, and parameters by identity."""
    if isinstance(value, Parameter):
        return "Parameter", id(value)
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if is_dataclass(value):
        return {field.name: comparable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: comparable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    return value


def demand_equal(seen: Any, wanted: Any, what: str) -> None:
    """Raise Failure unless two values from `comparable` are equal; name the innermost part that differs."""
    if seen == wanted and type(seen) is type(wanted):
        return
    if isinstance(seen, dict) and isinstance(wanted, dict) and seen.keys() == wanted.keys():
        for name in wanted:
            demand_equal(seen[name], wanted[name], f"{what}.{name}")
    if isinstance(seen, list) and isinstance(wanted, list) and len(seen) == len(wanted):
        for index in range(len(wanted)):
            demand_equal(seen[index], wanted[index], f"{what}[{index}]")
    raise Failure(f"{what}: got {_short(seen)}, should be {_short(wanted)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def equal(arguments: Callable[[Any, str], Arguments]) -> Check:
    """The property that a piece returns or raises the same as the reference, for the arguments of each case."""

    def equal(trial: PieceTrial, case: Any) -> None:
        """The result, or the type of the error, is that of the reference."""
        positional, keywords = arguments(case, trial.device)
        with Caught() as wanted:
            result = trial.spec.reference(*positional, **keywords)
        with Caught() as raised:
            seen = trial.function(*positional, **keywords)
        if wanted.error is None and raised.error is None:
            demand_equal(comparable(seen), comparable(result), "result")
        elif wanted.error is None:
            raise Failure(f"raised {describe(raised.error)}")
        elif not isinstance(raised.error, type(wanted.error)):
            outcome = f"raised {describe(raised.error)}" if raised.error else f"got {_short(comparable(seen))}"
            raise Failure(f"{outcome}, should raise {describe(wanted.error)}")

    return equal


def inputs_untouched(arguments: Callable[[Any, str], Arguments]) -> Check:
    """The property that a piece does not modify the arguments of any case."""

    def inputs_untouched(trial: PieceTrial, case: Any) -> None:
        """The call does not modify its arguments."""
        given = arguments(case, trial.device)
        before = comparable(given)
        with Caught():
            trial.function(*given[0], **given[1])
        demand_equal(comparable(given), before, "arguments after the call")

    return inputs_untouched


def labels(lengths: tuple[int, ...], vocab: int, seed: int, device: str = "cpu", width: int | None = None) -> Tensor:
    """Labels [B, S] int64, one row per length; about a quarter is ignored, and so is the padding up to width."""
    generator = Generator().manual_seed(seed)
    width = max(lengths, default=0) if width is None else width
    found = torch.full((len(lengths), width), IGNORE_INDEX)
    for row, length in enumerate(lengths):
        own = torch.randint(vocab, (length,), generator=generator)
        own[torch.rand(length, generator=generator) < 0.25] = IGNORE_INDEX
        found[row, :length] = own
    return found.to(device)


def batches() -> st.SearchStrategy[tuple[int, ...]]:
    """Draw the lengths of the rows of a batch."""
    return st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple)
