"""The declaration of a training piece: its cases, and the properties that it must satisfy.

`conformance/pieces/<piece>.py` holds a module-level `piece`. A property is a function of a trial and a case, named as
the property, that raises Failure if the property does not hold; its docstring states the property. Pieces have no
dtype: their cases are integers and names, and properties that compute with floats use float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any, Self, get_origin, get_type_hints

from hypothesis import strategies as st

import unsloth_ref.training
from conformance.profiles import Profile
from conformance.properties.error_parity import REFUSALS, demand_refusal
from conformance.properties.signature_parity import demand_signature
from conformance.property import Check, Property, of_function
from conformance.trial import Function

SHARE = 2.0  # of a profile's examples: the cases of a piece are small


@dataclass(frozen=True)
class PieceCase:
    """One drawn input, whose fields subclasses define: integers, booleans, names, and tuples of them."""

    def __str__(self) -> str:
        """The case in the format of `conformance repro`: "lengths=[3,0] capacity=4 strategy=bfd"."""
        return " ".join(f"{field.name}={_word(getattr(self, field.name))}" for field in fields(self))

    @classmethod
    def parse(cls, line: str) -> Self:
        """Parse the output of `str(case)`.

        Raises:
            ValueError: a word is not name=value, a name is unknown, a name without a default is missing, or a value has
                another type.
        """
        types = get_type_hints(cls)
        allowed = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for word in line.split():
            name, equals, value = word.partition("=")
            if not equals or name not in allowed:
                raise ValueError(f"case: got {word!r}; allowed: name=value with a name of {', '.join(allowed)}")
            values[name] = _value(value)
            listed = get_origin(types[name]) is tuple
            if not isinstance(values[name], tuple if listed else types[name]):
                wanted = "a list" if listed else getattr(types[name], "__name__", types[name])
                raise ValueError(f"case: got {word}; allowed: {wanted}")
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]
        if missing:
            raise ValueError(f"case: got {line!r}; missing: {', '.join(missing)}")
        return cls(**values)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _value(word: str) -> Any:
    try:
        return _tuples(json.loads(word))
    except json.JSONDecodeError:
        return word


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Mistake:
    """A call that the contract rejects with an error.

    Attributes:
        what: a description of the mistake.
        arguments: returns the positional arguments and the keywords of the call.
        raises: the type of the error that `unsloth_ref` and `unsloth_fast` raise.
        names: the argument that the error message names.
    """

    what: str
    arguments: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    raises: type[Exception]
    names: str


@dataclass(frozen=True)
class Piece:
    """The declaration of one training piece.

    Attributes:
        op: the name of the piece in `unsloth_ref.training`.
        draw: returns a strategy for cases of about the given number of elements.
        checks: the properties that hold for every case.
        simplest: the case for properties of the function itself, such as its signature.
        mistakes: calls that the contract rejects.
    """

    op: str
    draw: Callable[[int], st.SearchStrategy[Any]]
    checks: Sequence[Check]
    simplest: PieceCase
    mistakes: Sequence[Mistake] = ()

    @property
    def reference(self) -> Function:
        """The implementation in `unsloth_ref`."""
        return getattr(unsloth_ref.training, self.op)

    @property
    def properties(self) -> Mapping[str, Property]:
        """The properties by name, including those that hold for every piece."""
        found = [Property(*of_function(check), share=SHARE) for check in self.checks]
        found.append(Property(*of_function(signature_parity), cases=_simplest))
        if self.mistakes:
            found.append(Property(*of_function(error_parity), cases=_simplest))
        return {each.name: each for each in found}

    def parse(self, line: str) -> PieceCase:
        """Parse a case of this piece; raises ValueError."""
        return type(self.simplest).parse(line)


@dataclass(frozen=True)
class PieceTrial:
    """One piece of one backend: the first argument of a property.

    Attributes:
        spec: the declaration of the piece.
        function: the judged implementation.
        device: "cpu" or "cuda", the device of labels and logits.
    """

    spec: Piece
    function: Function
    device: str = "cpu"

    def cases(self, profile: Profile) -> st.SearchStrategy[Any]:
        """The strategy that draws cases."""
        return self.spec.draw(profile.elements)

    def refused(self, case: Any) -> None:
        """No case is refused."""


def _simplest(piece: Piece, profile: Profile) -> list[PieceCase]:
    """The case for properties of the function itself."""
    return [piece.simplest]


def signature_parity(trial: PieceTrial, case: PieceCase) -> None:
    """The signature is that of the reference; additional keywords have defaults."""
    demand_signature(trial.function, trial.spec.reference)


def error_parity(trial: PieceTrial, case: PieceCase) -> None:
    """Calls that the contract rejects raise an error, because any returned result would be wrong."""
    for mistake in trial.spec.mistakes:
        positional, keywords = mistake.arguments()
        demand_refusal(mistake, partial(trial.function, *positional, **keywords), (*REFUSALS, KeyError))
