"""What the laws of two or more pieces need."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn import Parameter

from conformance.gates import Failure
from conformance.piece import Law, PieceTrial
from conformance.trial import Caught, describe
from unsloth_ref.types import IGNORE_INDEX

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
UNIT = 2.0**-53


def plain(value: Any) -> Any:
    """Values that == compares: tensors with dtype, shape and elements, parameters by identity, dataclasses by field."""
    if isinstance(value, Parameter):
        return "Parameter", id(value)
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def demand_equal(seen: Any, wanted: Any, what: str) -> None:
    """Raise Failure, with the innermost part that differs, unless two plain values are equal."""
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


def equal(arguments: Callable[[Any, str], Arguments]) -> Law:
    """The law that a piece gives what the reference gives, errors included, for arguments of (case, device)."""

    def equal(trial: PieceTrial, case: Any) -> None:
        """The result, or the type of the error, is that of the reference."""
        positional, keywords = arguments(case, trial.device)
        with Caught() as wanted:
            result = trial.spec.reference(*positional, **keywords)
        with Caught() as raised:
            seen = trial.function(*positional, **keywords)
        if wanted.error is None and raised.error is None:
            demand_equal(plain(seen), plain(result), "result")
        elif wanted.error is None:
            raise Failure(f"raised {describe(raised.error)}")
        elif not isinstance(raised.error, type(wanted.error)):
            outcome = f"raised {describe(raised.error)}" if raised.error else f"got {_short(plain(seen))}"
            raise Failure(f"{outcome}, should raise {describe(wanted.error)}")

    return equal


def inputs_untouched(arguments: Callable[[Any, str], Arguments]) -> Law:
    """The law that a piece changes nothing that it is given."""

    def inputs_untouched(trial: PieceTrial, case: Any) -> None:
        """What is given is as it was afterwards."""
        given = arguments(case, trial.device)
        before = plain(given)
        with Caught():
            trial.function(*given[0], **given[1])
        demand_equal(plain(given), before, "arguments after the call")

    return inputs_untouched


def labels(lengths: tuple[int, ...], vocab: int, seed: int, device: str = "cpu", width: int | None = None) -> Tensor:
    """[B, S] int64: a row a length, about a quarter ignored, padded with ignored ones to the longest or the width."""
    generator = Generator().manual_seed(seed)
    width = max(lengths, default=0) if width is None else width
    found = torch.full((len(lengths), width), IGNORE_INDEX)
    for row, length in enumerate(lengths):
        own = torch.randint(vocab, (length,), generator=generator)
        own[torch.rand(length, generator=generator) < 0.25] = IGNORE_INDEX
        found[row, :length] = own
    return found.to(device)


def batches(rows: int = 4, longest: int = 12) -> st.SearchStrategy[tuple[int, ...]]:
    """Lengths of the rows of a batch."""
    return st.lists(st.integers(1, longest), min_size=1, max_size=rows).map(tuple)
