"""What is declared for a training piece: its cases, and the laws that hold for it.

`conformance/pieces/<piece>.py` holds a module-level `piece`. A law is a function of a trial and a case that raises
Failure where it does not hold; its docstring says it, its name is that of the property. Pieces have no dtype: their
cases hold whole numbers and names, and where they compute with floats it is in float64.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Self, get_origin, get_type_hints

from hypothesis import strategies as st

import conformance.pieces
import unsloth_ref.training
from conformance.gates import Failure
from conformance.profiles import Profile
from conformance.properties.error_parity import REFUSALS
from conformance.properties.signature_parity import demand_signature
from conformance.spec import SpecError
from conformance.trial import Caught, Function


@dataclass(frozen=True)
class PieceCase:
    """One drawn input: whole numbers, truth values, names, and tuples of them; subclasses name them."""

    def __str__(self) -> str:
        """The case as `conformance repro` reads it: "lengths=[3,0] capacity=4 strategy=bfd"."""
        return " ".join(f"{field.name}={_word(getattr(self, field.name))}" for field in fields(self))

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read what `str(case)` wrote.

        Raises:
            ValueError: a word is not name=value, a name is unknown or, without a default, missing, or a value is of
                another kind.
        """
        kinds = get_type_hints(cls)
        allowed = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for word in line.split():
            name, equals, value = word.partition("=")
            if not equals or name not in allowed:
                raise ValueError(f"case: got {word!r}; allowed: name=value with a name of {', '.join(allowed)}")
            values[name] = _value(value)
            listed = get_origin(kinds[name]) is tuple
            if not isinstance(values[name], tuple if listed else kinds[name]):
                kind = "a list" if listed else getattr(kinds[name], "__name__", kinds[name])
                raise ValueError(f"case: got {word}; allowed: {kind}")
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


Law = Callable[["PieceTrial", Any], float | None]


@dataclass(frozen=True)
class Mistake:
    """A call that the contract refuses.

    Attributes:
        what: the mistake, in words.
        arguments: of the call: positional, then keywords.
        raises: the type that `unsloth_ref` and `unsloth_fast` raise.
        names: the argument that their message names.
    """

    what: str
    arguments: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    raises: type[Exception]
    names: str


@dataclass(frozen=True)
class Piece:
    """Everything the judge knows about one training piece.

    Attributes:
        op: its name in `unsloth_ref.training`.
        draw: cases of about so many elements.
        laws: what holds for every case.
        plain: a case for laws about the function itself.
        mistakes: calls that the contract refuses.
    """

    op: str
    draw: Callable[[int], st.SearchStrategy[Any]]
    laws: Sequence[Law]
    plain: PieceCase
    mistakes: Sequence[Mistake] = ()

    @property
    def reference(self) -> Function:
        """The contract."""
        return getattr(unsloth_ref.training, self.op)

    @property
    def properties(self) -> Mapping[str, PieceLaw]:
        """The laws by name, with those that hold for every piece."""
        found = [PieceLaw(law.__name__, law) for law in self.laws]
        found.append(PieceLaw("signature_parity", _same_signature, once=True))
        if self.mistakes:
            found.append(PieceLaw("error_parity", _refuses, once=True))
        return {law.name: law for law in found}

    def parse(self, line: str) -> PieceCase:
        """Read a case of this piece from one line; raises ValueError."""
        return type(self.plain).parse(line)


@dataclass(frozen=True)
class PieceLaw:
    """A law of a piece as a search takes it: twice the profile's examples, which are small.

    Attributes:
        name: of the property.
        check: raises Failure where it does not hold.
        once: whether it is about the function itself, so that one case says everything.
    """

    SHARE: ClassVar[float] = 2.0

    name: str
    check: Law
    once: bool = False

    def cases(self, spec: Any, profile: Profile) -> Sequence[PieceCase] | None:
        """The fixed cases; None to draw them."""
        return [spec.plain] if self.once else None


@dataclass(frozen=True)
class PieceTrial:
    """One piece of one backend: what a law is given to work with.

    Attributes:
        spec: the piece's.
        function: the judged implementation.
        device: "cpu" or "cuda", where labels and logits lie.
    """

    spec: Piece
    function: Function
    device: str = "cpu"

    def cases(self, profile: Profile) -> st.SearchStrategy[Any]:
        """What is drawn."""
        return self.spec.draw(profile.elements)


def _same_signature(trial: PieceTrial, case: PieceCase) -> None:
    """It takes what the contract's takes; keywords of its own have defaults."""
    demand_signature(trial.function, trial.spec.reference)


def _refuses(trial: PieceTrial, case: PieceCase) -> None:
    """What the contract refuses is refused: whoever returns something returns something wrong."""
    for mistake in trial.spec.mistakes:
        positional, keywords = mistake.arguments()
        with Caught() as raised:
            trial.function(*positional, **keywords)
        if raised.error is None:
            raise Failure(f"{mistake.what}: no error, should raise {mistake.raises.__name__} naming {mistake.names}")
        if not isinstance(raised.error, (*REFUSALS, KeyError)):
            kind = type(raised.error).__name__
            raise Failure(f"{mistake.what}: raised {kind} ({raised.error}), should raise {mistake.raises.__name__}")


@cache
def pieces() -> Mapping[str, Piece]:
    """Every training piece, by name.

    Raises:
        SpecError: a piece of `unsloth_ref.training` has no file here, a file no piece, or it names another.
    """
    names = unsloth_ref.training.__all__
    for info in pkgutil.iter_modules(conformance.pieces.__path__):
        if info.name not in names and not info.name.startswith("_"):
            raise SpecError(f"conformance/pieces/{info.name}.py: unsloth_ref.training has no piece {info.name}")
    found: dict[str, Piece] = {}
    for name in names:
        try:
            module = importlib.import_module(f"conformance.pieces.{name}")
        except ModuleNotFoundError as missing:
            if missing.name != f"conformance.pieces.{name}":
                raise
            raise SpecError(f"piece {name} is not declared: conformance/pieces/{name}.py is missing") from missing
        piece = getattr(module, "piece", None)
        if not isinstance(piece, Piece):
            raise SpecError(f"conformance/pieces/{name}.py: got piece = {piece!r}; allowed: a Piece")
        if piece.op != name:
            raise SpecError(f"conformance/pieces/{name}.py: its piece names {piece.op}")
        found[name] = piece
    return found
