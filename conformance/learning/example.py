"""An example call of an operation: its tensors and options, and which of their sizes and values may vary.

Two forms:

    text     "x=randn(T=64,H=128) weight=randn(H) labels=randint(V=1000,T) eps=1e-6|1e-5 mode=mean|sum"
    a file   that defines `example`: a dict of arguments by name, a function that returns one, or such a text

In the text an argument is a tensor, a literal, or several of them with | between: each is judged. A tensor is
`KIND(SIZE, ...)` with a kind of KINDS; `randint([LOW,] HIGH, SIZE, ...)` takes its range first, and `offsets(LAST,
SIZE, ...)`, sorted integers from 0, the last of them. A size is a number, a name with a number (`T=64`), a name that
has its number elsewhere, or a product such as `2*H`, also with its number (`2*H=64`). Equal numbers are one size,
unless one of them has a name. A size after `==` never varies (`D==128`, or `==128`). After the sizes,
`dtype=float32` keeps a tensor in that dtype, and `or=-100` is one more number for integers. An option may be the name
of a size, which it then follows.

In a file the tensors are real ones: equal sizes are one size, and values tell the kind (all positive, probabilities,
the range of integers, the one negative number among others, offsets that end with a size). Sizes of 0 and 1 never
vary.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import whitespace
from typing import Any

import torch
from torch import Tensor

from conformance.case import OF_CASES
from conformance.declarations import SpecError

Size = int | tuple[int, str]  # a constant, or a factor and the name of a size
INTEGERS = {"randint": torch.int64, "offsets": torch.int64, "mask": torch.bool}  # kinds, with their usual dtypes
KINDS = ("randn", "rand", "positive", "probabilities", "log_probabilities", "ones", "zeros", *INTEGERS)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)}  # fmt: skip


@dataclass(frozen=True)
class TensorArgument:
    """A tensor of the example.

    Attributes:
        kind: its distribution, a name in KINDS.
        shape: one Size per dimension.
        dtype: its own; None for the dtype under test.
        low, high: of randint: the range, without `high`; of offsets, `high` is the last.
        other: of randint: one more number; None for none.
    """

    kind: str
    shape: tuple[Size, ...]
    dtype: torch.dtype | None = None
    low: Size = 0
    high: Size = 2
    other: int | None = None

    @property
    def is_integer(self) -> bool:
        """Whether its elements are integers or booleans, which no fill scales."""
        return self.kind in INTEGERS

    def __str__(self) -> str:
        """The tensor as in the text of an example, without the numbers of its sizes."""
        words = [word_of(size) for size in self.shape]
        if self.kind == "randint":
            words = [word_of(self.low), word_of(self.high), *words]
        elif self.kind == "offsets":
            words = [word_of(self.high), *words]
        if self.dtype not in (None, torch.bool, torch.int64):
            words.append(f"dtype={str(self.dtype).removeprefix('torch.')}")
        if self.other is not None:
            words.append(f"or={self.other}")
        return f"{self.kind}({', '.join(words)})"


@dataclass(frozen=True)
class Follows:
    """An option whose value is a size."""

    size: Size


@dataclass(frozen=True)
class Example:
    """An example call.

    Attributes:
        arguments: by name, the alternatives of each argument: tensors, sizes to follow, or values.
        sizes: the number of each named size in the example, in the order of appearance.
        grads: the tensors that require a gradient; None if the example does not say.
    """

    arguments: Mapping[str, tuple[Any, ...]]
    sizes: Mapping[str, int] = field(default_factory=dict)
    grads: tuple[str, ...] | None = None


def word_of(size: Size) -> str:
    """A size in words: "64", "H", "2*H"."""
    if isinstance(size, int):
        return str(size)
    factor, name = size
    return name if factor == 1 else f"{factor}*{name}"


def value_of(size: Size, sizes: Mapping[str, int]) -> int:
    """The number of a size."""
    return size if isinstance(size, int) else size[0] * sizes[size[1]]


def read(text: str) -> Example:
    """The example that the command line states: a text, or the path of a file.

    Raises:
        SpecError: it cannot be read; the message says what was seen and what is allowed.
    """
    if not re.fullmatch(r"[^\s=]+\.py", text):
        return _Text(text).example
    if not Path(text).is_file():
        raise SpecError(f"--example: got {text}; there is no such file")
    found: Any = runpy.run_path(text).get("example")
    found = found() if callable(found) else found
    if isinstance(found, str):
        return _Text(found).example
    if not isinstance(found, Mapping):
        raise SpecError(f"{text}: got example = {found!r}; allowed: a dict of arguments by name, or a function")
    return of_call(found)


def split(text: str, separators: str) -> list[str]:
    """The parts of a text between separators outside of brackets and quotes, stripped; empty ones are left out."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter in separators and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


class _Text:
    """Reads a text: first the names of sizes with their numbers, then the arguments."""

    def __init__(self, text: str) -> None:
        self._sizes: dict[str, int] = {}
        self._always: dict[str, int] = {}  # the sizes that never vary, "128" for an unnamed one
        for name, size in re.findall(r"[(,]\s*([A-Za-z_]\w*)?\s*==\s*(\d+)", text):
            if self._always.setdefault(name or size, int(size)) != int(size):
                raise SpecError(f"--example: got {name}=={self._always[name]} and {name}=={size}; allowed: one number")
        for factor, name, size in re.findall(r"[(,]\s*(?:(\d+)\s*\*\s*)?(?!or\b)([A-Za-z_]\w*)\s*=\s*(\d+)", text):
            number, rest = divmod(int(size), int(factor or 1) or 1)
            if rest:
                raise SpecError(f"--example: got {factor}*{name}={size}; allowed: a multiple of {factor}")
            if (other := self._always.get(name, self._sizes.setdefault(name, number))) != number:
                raise SpecError(f"--example: got {name}={other} and {name}={number}; allowed: one number")
        self._unnamed: dict[int, str] = {}
        arguments: dict[str, tuple[Any, ...]] = {}
        for word in split(text, whitespace):
            name, equals, value = word.partition("=")
            if not equals or not name.isidentifier() or not value:
                raise SpecError(f"--example: got {word!r}; allowed: NAME=VALUE with a VALUE such as randn(64,128)")
            if name in arguments:
                raise SpecError(f"--example: got {name} twice; allowed: once, with | between several values")
            arguments[name] = tuple(self._value(name, part) for part in split(value, "|"))
        for name in (*self._sizes, *self._always):
            if name in arguments:
                raise SpecError(f"--example: {name} is an argument and a size; give the size another name")
            if name in OF_CASES:
                raise SpecError(
                    f"--example: got {name} as the name of a size; allowed: others than {', '.join(OF_CASES)}"
                )
        self.example = Example(arguments, self._sizes)

    def _value(self, argument: str, text: str) -> Any:
        call = re.fullmatch(r"(\w+)\((.*)\)", text, re.DOTALL)
        if call:
            return self._tensor(argument, call[1], split(call[2], ","))
        if text.startswith("[") and "(" in text:
            return [self._value(argument, part) for part in split(text[1:-1], ",")]
        if re.fullmatch(r"(\d+\*)?[A-Za-z_]\w*", text) and text.rpartition("*")[2] in {**self._sizes, **self._always}:
            return Follows(self._size(argument, 0, text))
        if text.startswith("torch.") and text.removeprefix("torch.") in DTYPES:
            return DTYPES[text.removeprefix("torch.")]
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if text.isidentifier():
                return text
            raise SpecError(
                f"--example: got {argument}={text}; allowed: a tensor such as randn(64,128), a number, a word,"
                " True, False or None"
            ) from None

    def _tensor(self, argument: str, kind: str, parts: list[str]) -> TensorArgument:
        if kind not in KINDS:
            raise SpecError(f"--example: got {argument}={kind}(...); allowed: {', '.join(KINDS)}")
        dtype = INTEGERS.get(kind)
        other: int | None = None
        while parts and re.match(r"(dtype|or)\s*=", parts[-1]):
            word, _, given = (part.strip() for part in parts.pop().partition("="))
            if word == "dtype" and given not in DTYPES:
                raise SpecError(f"--example: got {argument} with dtype={given}; allowed: {', '.join(DTYPES)}")
            if word == "or" and (kind != "randint" or not re.fullmatch(r"-?\d+", given)):
                raise SpecError(f"--example: got {argument} with or={given}; allowed: a number, in randint(...)")
            dtype, other = (DTYPES[given], other) if word == "dtype" else (dtype, int(given))
        low: Size = 0
        high: Size = 2
        if kind in ("randint", "offsets"):
            if len(parts) < (2 if kind == "offsets" else 1):
                raise SpecError(
                    f"--example: got {argument}={kind}({', '.join(parts)}); allowed: {kind}(NUMBER, SIZE, ...)"
                )
            high = self._size(argument, 0, parts.pop(0), bound=True)
            if kind == "randint" and parts and isinstance(high, int) and high < 2:  # randint(LOW, HIGH, ...)
                low, high = high, self._size(argument, 0, parts.pop(0), bound=True)
        shape = tuple(self._size(argument, i, p) for i, p in enumerate(parts))
        return TensorArgument(kind, shape, dtype, low, high, other)

    def _size(self, argument: str, place: int, text: str, bound: bool = False) -> Size:
        if re.fullmatch(r"-?\d+", text):
            number = int(text)
            if number < 0 and not bound:
                raise SpecError(f"--example: got {number} as a size of {argument}; allowed: 0 or more")
            if bound or number < 2 or text in self._always:
                return number
            if number not in self._unnamed:
                name = f"{argument}_{place}"
                self._unnamed[number] = name
                self._sizes[name] = number
            return 1, self._unnamed[number]
        if always := re.fullmatch(r"(\w*)\s*==\s*(\d+)", text):
            return int(always[2])
        match = re.fullmatch(r"(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*)(?:\s*=\s*\d+)?", text)
        if match and match[2] in self._always:
            return int(match[1] or 1) * self._always[match[2]]
        if match is None or match[2] not in self._sizes:
            raise SpecError(
                f"--example: got {text!r} as a size of {argument}; allowed: a number, NAME=NUMBER, NAME==NUMBER, or a"
                f" NAME that has a number elsewhere ({', '.join(self._sizes) or 'none has'})"
            )
        return int(match[1] or 1), match[2]


def of_call(arguments: Mapping[str, Any]) -> Example:
    """The example of a real call: arguments by name, with tensors."""
    sizes: dict[str, int] = {}
    names: dict[int, str] = {}
    every = [t for value in arguments.values() for t in _tensors(value)]
    floats = [t.dtype for t in every if t.is_floating_point()]

    def size(name: str, place: int, number: int) -> Size:
        if number < 2:
            return number
        if number not in names:
            names[number] = f"{name}_{place}"
            sizes[names[number]] = number
        return 1, names[number]

    def tensor(name: str, value: Tensor) -> TensorArgument:
        if value.is_complex() or value.layout != torch.strided:
            raise SpecError(f"--example: got {name} of {value.dtype}, {value.layout}; allowed: dense, of real numbers")
        shape = tuple(size(name, place, number) for place, number in enumerate(value.shape))
        own = None if value.is_floating_point() and value.dtype == floats[0] else value.dtype
        if value.is_floating_point():
            return TensorArgument(_kind(value.double()), shape, own)
        if value.dtype == torch.bool:
            return TensorArgument("mask", shape, own)
        if _are_offsets(value) and any(int(value[-1]) in t.shape for t in every):
            return TensorArgument("offsets", shape, own, high=size(name, value.ndim, int(value[-1])))
        low, high = (int(value.min()), int(value.max()) + 1) if value.numel() else (0, 1)
        within = value[value >= 0]
        if low < 0 < within.numel() and not ((value < 0) & (value != low)).any():  # as the label of an ignored token
            return TensorArgument("randint", shape, own, int(within.min()), high, low)
        return TensorArgument("randint", shape, own, low, high)

    def argument(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return tensor(name, value)
        if isinstance(value, (list, tuple)) and _tensors(value):
            return [argument(name, one) for one in value]
        return value

    grads = tuple(name for name, value in arguments.items() if any(t.requires_grad for t in _tensors(value)))
    return Example({name: (argument(name, value),) for name, value in arguments.items()}, sizes, grads or None)


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return [one for one in values if isinstance(one, Tensor)]


def _are_offsets(values: Tensor) -> bool:
    return values.ndim == 1 < len(values) and int(values[0]) == 0 and bool((values.diff() >= 0).all())


def _kind(values: Tensor) -> str:
    """The distribution that the values of a floating-point tensor seem to have."""

    def sums_to_one(values: Tensor) -> bool:
        return values.ndim > 0 and values.shape[-1] > 1 and bool(((values.sum(-1) - 1).abs() < 1e-2).all())

    if not values.numel() or not values.isfinite().all() or not values.any():
        return "randn"
    if bool((values <= 0).all()) and sums_to_one(values.exp()):
        return "log_probabilities"
    if bool((values < 0).any()):
        return "randn"
    if sums_to_one(values):
        return "probabilities"
    if bool((values == 1).all()):
        return "ones"
    return "rand" if bool((values <= 1).all()) and values.numel() > 1 else "positive"
