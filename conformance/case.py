"""A small frozen case, and the tensors built from it.

A case holds sizes, options and names but no elements, so that Hypothesis can shrink it to a line that a person can
read. Its tensors come from a seeded CPU generator in float64, are rounded to the dtype under test and moved to the
device, so that every device sees the same bits; there they get their memory layout.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from unsloth_ref.types import IGNORE_INDEX

# The dtypes that an operation is judged in, by the names of the command line.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of an expanded tensor. Plain PyTorch's linear cross entropy uses 0.4 of the budget at 512, 1.3 at 2048, 5 at 16384.
MOST_EQUAL_ROWS = 512
OTHER = 0.2  # the share of integers that are the one number outside of their range
EXTREMES = ("lowest", "highest", "one_lowest", "one_highest")  # fills whose integers are at an end, with or without one
OF_CASES = ("fill", "layout", "seed")  # what a case names besides sizes and options


@dataclass(frozen=True)
class Case:
    """One drawn input.

    Attributes:
        sizes: (name, value) of each dimension, in the order of the spec.
        options: (name, value) of each keyword whose value is not the default.
        fill: the distribution of the elements, a name in FILLS.
        layout: strides and storage offset of the tensors, a name in LAYOUTS.
        seed: of the elements.
    """

    sizes: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, Any], ...] = ()
    fill: str = "randn"
    layout: str = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        """The case in the form that `conformance repro` reads: "rows=4 hidden=129 fill=tiny seed=0"."""
        own = ("fill", self.fill), ("layout", self.layout), ("seed", self.seed)
        return " ".join(f"{name}={_word(value)}" for name, value in (*self.sizes, *self.options, *own))

    def size(self, name: str) -> int:
        """The size of one dimension."""
        return dict(self.sizes)[name]

    def resized(self, **sizes: int) -> Case:
        """The same case with other sizes."""
        return replace(self, sizes=tuple((name, sizes.get(name, size)) for name, size in self.sizes))

    def with_options(self, options: Mapping[str, Any]) -> Case:
        """The same case with these options, which replace its own of the same name."""
        return replace(self, options=tuple({**dict(self.options), **options}.items()))

    @classmethod
    def parse(cls, line: str, size_names: tuple[str, ...], options: Mapping[str, Sequence[Any]]) -> Case:
        """Parse the output of `str(case)`.

        Raises:
            ValueError: a word is not name=value, a name is unknown, a size is missing, or a value is not allowed.
        """
        words: dict[str, Any] = {}
        chosen: dict[str, Any] = {}
        names = [*size_names, *options, *OF_CASES]
        for word in line.split():
            name, equals, value = word.partition("=")
            if not equals or name not in names:
                raise ValueError(f"case: got {word!r}; allowed: name=value with a name of {', '.join(names)}")
            if name in words and name in options:  # an option called fill, layout or seed comes before that of the case
                chosen[name] = words[name]
            of_text = {_word(one): one for one in options.get(name, ())}
            try:
                words[name] = of_text[value] if value in of_text else ast.literal_eval(value)
            except (ValueError, SyntaxError):
                words[name] = value
        missing = [name for name in size_names if name not in words]
        if missing:
            raise ValueError(f"case: got {line!r}; missing: {', '.join(missing)}")
        for name in (*size_names, "seed"):
            if not isinstance(words.get(name, 0), int) or words.get(name, 0) < 0:
                raise ValueError(f"case: got {name}={words[name]}; allowed: a whole number, 0 or more")
        for name, allowed in (("fill", FILLS), ("layout", LAYOUTS)):
            if name in words and words[name] not in allowed:
                raise ValueError(f"case: got {name}={words[name]}; allowed: {', '.join(allowed)}")
        sizes = tuple((name, int(words.pop(name))) for name in size_names)
        chosen |= {name: words.pop(name) for name in options if name in words and name not in OF_CASES}
        return cls(sizes, tuple((name, chosen[name]) for name in options if name in chosen), **words)


def _word(value: Any) -> str:
    return str(value).replace(" ", "")


def _randn(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)


def _outlier(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    values = _randn(generator, shape)
    values[..., ::2, :] *= 64  # whole rows
    values[..., :, -1:] *= 16  # and the last column, which exposes a wrong mask
    return values


def _saturated(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    return _randn(generator, shape).sign() * 1e4


def _confident(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    values = _randn(generator, shape)
    if shape[-1]:
        likely = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator, device=generator.device)
        values.scatter_(-1, likely, 20.0)
    return values


def _short(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    """Few digits: sums and products are exact in float32 in any order, and often half-way between two of 16 bits."""
    places = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return _randn(generator, shape).sign() * torch.exp2(12 * places).floor() / 1024


FILLS: Mapping[str, Callable[[Generator, tuple[int, ...]], Tensor]] = {
    "randn": _randn,
    "ones": lambda generator, shape: torch.ones(shape, dtype=torch.float64),
    "zeros": lambda generator, shape: torch.zeros(shape, dtype=torch.float64),
    "tiny": lambda generator, shape: 1e-3 * _randn(generator, shape),
    "wide": lambda generator, shape: 8 * _randn(generator, shape),
    "outlier": _outlier,
    "saturated": _saturated,
    "confident": _confident,
    "far": lambda generator, shape: 120 * _randn(generator, shape).sign(),
    "graded": lambda generator, shape: _randn(generator, shape) * 2.0 ** -(torch.arange(shape[-1]) % 17).double(),
    "level": lambda generator, shape: 512 + _randn(generator, shape),
    "short": _short,
    **dict.fromkeys(EXTREMES, _randn),
}


def _offset(values: Tensor) -> Tensor:
    """Start one element into the storage, which breaks 16-byte alignment."""
    return torch.cat([values.new_zeros(1), values.reshape(-1)])[1:].view(values.shape)


def _step(values: Tensor) -> Tensor:
    """Every second element of a larger tensor, in each dimension."""
    larger = values.new_zeros([2 * size for size in values.shape])
    view = larger[tuple(slice(None, None, 2) for _ in values.shape)]
    return view.copy_(values)


def _halves(values: Tensor) -> Tensor:
    """The left half of rows twice as long, as after splitting a gate_up tensor."""
    return torch.cat([values, values], -1)[..., : values.shape[-1]] if values.ndim else values


def _transposed(values: Tensor) -> Tensor:
    """A matrix in column-major order; with more dimensions, the second and third exchanged, as for attention heads."""
    if values.ndim < 2:
        return values
    first, second = (0, 1) if values.ndim == 2 else (1, 2)
    return values.transpose(first, second).contiguous().transpose(first, second)


def _expanded(values: Tensor) -> Tensor:
    """The first row with a stride of 0, for as many rows as there are.

    Not of many rows, over which a product may add up: roundings of a long sum of equal terms all go to the same side,
    and plain PyTorch would leave the gates too.
    """
    if values.ndim == 0 or not 0 < len(values) <= MOST_EQUAL_ROWS:
        return values
    return values[:1].expand(values.shape)


LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "offset": _offset,
    "step": _step,
    "halves": _halves,
    "transposed": _transposed,
    "expanded": _expanded,
}


# What becomes of a fill in `Draw.tensor`.
KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "randn": lambda values: values,
    "zeros": lambda values: values,
    "ones": lambda values: 1 + 0.5 * values,
    "rand": lambda values: values.abs() / (1 + values.abs()),
    "positive": lambda values: values.abs() + 1e-3,
    "probabilities": lambda values: values.softmax(-1),
    "log_probabilities": lambda values: values.log_softmax(-1),
}


class Draw:
    """Builds the tensors of one case; passed to a spec's `build`.

    Every tensor has its own generator, so that adding a tensor does not change the bits of the others.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str, source: str = "cpu") -> None:
        """Build tensors of this dtype on this device.

        `source` is the device that draws the elements: a CPU gives every device the same bits, a GPU is fast enough
        for the 10^9 elements of a benchmark.
        """
        self.case, self.dtype, self.device, self._source = case, dtype, device, source
        self._count = 0

    def _generator(self) -> Generator:
        self._count += 1
        return Generator(self._source).manual_seed(1000 * self.case.seed + self._count)

    def place(self, values: Tensor) -> Tensor:
        """Round to the dtype, move to the device, apply the case's layout."""
        return self.lay_out(values.to(self.dtype))

    def lay_out(self, values: Tensor) -> Tensor:
        """Move values that have their dtype, such as integers, to the device, apply the case's layout."""
        return LAYOUTS[self.case.layout](values.to(self.device))

    def filled(self, *shape: int) -> Tensor:
        """[..., columns] with the case's fill and layout."""
        return self.place(FILLS[self.case.fill](self._generator(), shape))

    def tensor(
        self,
        kind: str,
        *shape: int,
        dtype: torch.dtype | None = None,
        low: int = 0,
        high: int = 2,
        other: int | None = None,
    ) -> Tensor:
        """A tensor of any shape, with the case's fill and layout.

        Args:
            kind: "randn" takes the case's fill as it is; "ones" lies around 1, as a weight; "rand" is in [0, 1),
                "positive" above 0; "probabilities" and "log_probabilities" are so along the last dimension; "randint"
                and "mask" are integers and booleans, under the fills of EXTREMES all equal, or all but one;
                "offsets" are sorted integers from 0 to `high`, those between as of "randint".
            shape: may be empty.
            dtype: instead of that of the case.
            low, high: the range of "randint", without `high`; both ends occur, and one number twice.
            other: one more number, that of one element in five, and the lowest.
        """
        generator = self._generator()
        if kind in ("randint", "mask", "offsets"):
            own = dtype or (torch.bool if kind == "mask" else torch.int64)
            if kind == "offsets":
                values = self._offsets(generator, shape, high).to(own)
                expanded = self.case.layout == "expanded" and len(shape) == 1  # to zeros, which divide nothing
                return values.to(self.device) if expanded else self.lay_out(values)
            return self.lay_out(self._integers(generator, shape, low, max(high, low + 1), other).to(own))
        fill = "randn" if kind == "ones" else self.case.fill
        values = FILLS[fill](generator, (1,) * (2 - len(shape)) + shape).reshape(shape)
        values = KINDS[kind](values)
        return self.lay_out(values.to(dtype or self.dtype))

    def _integers(self, generator: Generator, shape: tuple[int, ...], low: int, high: int, other: int | None) -> Tensor:
        """Integers from low to high - 1, some of them `other`; under EXTREMES all equal, or all but one."""
        values = torch.randint(low, high, shape, generator=generator, device=generator.device)
        flat = values.reshape(-1)
        ends = flat[: 3 if len(flat) > 3 else 2]  # of up to three, one stays random
        ends.copy_(torch.tensor([high - 1, low, high - 1])[: len(ends)])
        if other is not None:
            chosen = torch.rand(flat.shape, generator=generator, device=generator.device) < OTHER
            flat[chosen] = other
            flat[3:4] = other
        lowest, last = low if other is None else other, high - 1
        if self.case.fill in EXTREMES:
            flat.fill_(last if self.case.fill in ("highest", "one_lowest") else lowest)
        if self.case.fill in ("one_lowest", "one_highest") and len(flat):
            place = torch.randint(len(flat), (1,), generator=generator, device=generator.device)
            flat[place] = last if self.case.fill == "one_highest" else lowest
        return values

    def _offsets(self, generator: Generator, shape: tuple[int, ...], last: int) -> Tensor:
        """Where parts begin along the last dimension, and the end of the last part; some parts may be empty."""
        if shape[-1] < 2:
            raise ValueError(f"offsets: got {shape[-1]} of them; allowed: at least 2, the ends of one part")
        inner = (*shape[:-1], shape[-1] - 2)
        inside = torch.randint(last + 1, inner, generator=generator, device=generator.device)
        inside[..., 1:2] = inside[..., :1]  # a part without elements
        if self.case.fill in EXTREMES:
            inside = self._integers(generator, inner, 0, last + 1, None)
        values = inside.new_full(shape, last)
        values[..., :1] = 0
        values[..., 1:-1] = inside.sort(-1).values
        return values

    def weight(self, size: int) -> Tensor:
        """[size] around 1, never constant: a weight of ones would hide a wrong index."""
        return self.place(1 + 0.5 * _randn(self._generator(), (size,)))

    def matrix(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] normal for every fill, scaled so that a product has the magnitude of its other factor."""
        return self.place(_randn(self._generator(), (rows, columns)) / max(1, columns) ** 0.5)

    def grad_output(self, like: Tensor) -> Tensor:
        """Standard normal in the dtype of an output, contiguous; for a scalar output 1 if the seed is even."""
        if not like.is_floating_point():
            return torch.zeros_like(like)  # takes the place of a gradient that does not exist
        if like.ndim == 0 and self.case.seed % 2 == 0:
            return torch.ones_like(like)
        return _randn(self._generator(), tuple(like.shape)).to(like.dtype).to(self.device)

    def labels(self, tokens: int, classes: int, ignored_fraction: float = 0.2) -> Tensor:
        """[tokens] int64 in [0, classes): both ends, the neighbours of likely tile edges, random ones; some ignored."""
        generator = Generator().manual_seed(self.case.seed)
        labels = torch.randint(max(classes, 1), (tokens,), generator=generator)
        edges = [0, classes - 1, *(edge + side for edge in (128, 1024, 4096, 8192, 32768, 65536) for side in (-1, 0))]
        edges = [edge for edge in edges if 0 <= edge < classes]
        where = torch.randperm(tokens, generator=generator)[: len(edges)]
        labels[where] = torch.tensor(edges[: len(where)], dtype=torch.int64)
        ignored = torch.rand(tokens, generator=generator) < ignored_fraction
        ignored[tokens // 2 : tokens // 2 + (tokens > 2 and ignored_fraction > 0)] = True  # one, if others remain
        labels[ignored] = dict(self.case.options).get("ignore_index", IGNORE_INDEX)
        return self.lay_out(labels)
