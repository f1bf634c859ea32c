"""What is declared: one Spec an operation, from which tests, benchmarks and tables all follow.

`conformance/specs/<operation>.py` holds a module-level `spec`.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf, nan
from numbers import Number
from types import ModuleType
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import conformance.specs
import unsloth_ref.kernels
from conformance.case import Case, Draw

Inputs = dict[str, Tensor]
Options = dict[str, Any]

# Tile edges, primes and vocabulary sizes: where kernels break.
COLUMNS = (511, 512, 513, 1021, 1023, 1024, 1025, 2048, 3584, 4095, 4096, 4097, 5120, 8191, 8192, 8193, 16384, 16385)


def rows(budget: int) -> st.SearchStrategy[int]:
    """A number of rows, few first."""
    return st.integers(1, max(1, min(budget, 64)))


def few_rows(budget: int) -> st.SearchStrategy[int]:
    """A number of rows for an operation that takes each row by itself: more of them would say nothing new."""
    return st.integers(1, min(budget, 12))


def columns(budget: int) -> st.SearchStrategy[int]:
    """A number of columns: any small one, or one beside a tile's edge."""
    return st.one_of(st.integers(1, min(budget, 300)), st.sampled_from([c for c in (*COLUMNS, 1) if c <= budget]))


class SpecError(Exception):
    """Specs and operations that do not belong together; its text says which."""


@dataclass(frozen=True)
class ErrorCase:
    """A call that the contract refuses.

    Attributes:
        what: the mistake, in words.
        change: from right inputs and options to wrong ones.
        raises: the type that `unsloth_ref` and `unsloth_fast` raise.
        names: the argument that their message names.
        senseless: whether there is nothing to compute, so that whoever gives a result gives a wrong one. What plain
            PyTorch would broadcast, promote or take for a default is not.
        device: "cpu" where only a CPU can afford to look.
    """

    what: str
    change: Callable[[Inputs, Options], tuple[Inputs, Options]]
    raises: type[Exception]
    names: str
    senseless: bool = False
    device: str | None = None


@dataclass(frozen=True)
class Call:
    """One call as the terms of a spec see it: everything in float64.

    Attributes:
        inputs: by name.
        options: keywords that differ from their default.
        grad_outputs: one for each output; empty when only the forward pass is judged.
        smallest: the smallest normal number of the dtype under test: below it, errors are absolute.
        unit: the unit roundoff of the dtype under test: 2^-24 / unit of a term is one rounding of it to float32.
    """

    inputs: Inputs
    options: Options
    grad_outputs: Sequence[Tensor]
    smallest: float
    unit: float


@dataclass(frozen=True)
class Spec:
    """Everything the judge knows about one operation.

    Attributes:
        op: its name in `unsloth_ref.kernels`.
        sizes: for each dimension, a strategy from an element budget; the last one is drawn first.
        options: for each keyword, the values to draw, the default first.
        required: arguments beside the inputs that have no default, from a case, as keywords.
        fills: names in `conformance.case.FILLS`, the simplest first.
        build: the input tensors of a case.
        outputs: a name for each output.
        grads: the inputs that get a gradient, where a case has them.
        rowwise: the inputs whose first dimension counts rows that must not see each other.
        row_options: options under which the outputs are rows too.
        roundings: roundings to the dtype of an output or gradient that a right order may make before the last one.
        terms: for an output or gradient that cancels, the size S of what is added up; others use their own magnitude.
        kinds: other kinds of arguments that are as right, by name: from inputs and options to changed ones.
        consistent: whether options may stand together.
        specials: special values that an input may hold.
        same_bits: whether outputs have the bits that they have in training where no gradient is wanted.
        shape: its sizes for a law that asks for so many rows of about so many columns.
        truth: the contract written otherwise, for inputs on which its own intermediates would fit no memory or cancel
            even in float64; itself by default.
        waits: how often a pass may wait for the device: for the count that a matmul's size depends on, say. Where it
            must not, in a CUDA graph, its results may have other bits.
        bytes: fewest bytes that (forward, backward) move, from the inputs.
        flops: floating-point operations of the matrix products of (forward, backward), from the inputs, the options
            and the names of the inputs that get a gradient; none by default.
        bench: sizes worth timing, and options beside them, by name; under "grads", which inputs get a gradient there.
        bench_layout: how models lay out the inputs that get a gradient, a name in `conformance.case.LAYOUTS`.
        errors: calls that the contract refuses.
    """

    op: str
    sizes: Mapping[str, Callable[[int], st.SearchStrategy[int]]]
    build: Callable[..., Inputs]
    outputs: Sequence[str]
    grads: Sequence[str]
    rowwise: Sequence[str]
    roundings: int
    bytes: Callable[[Inputs], tuple[int, int]]
    bench: Mapping[str, Mapping[str, Any]]
    errors: Sequence[ErrorCase]
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    required: Callable[[Case], Options] = lambda case: {}
    flops: Callable[[Inputs, Options, Collection[str]], tuple[int, int]] = lambda inputs, options, grads: (0, 0)
    truth: Callable[..., Any] | None = None
    fills: Sequence[str] = ("randn", "ones", "zeros", "tiny", "outlier", "wide")
    row_options: Options = field(default_factory=dict)
    kinds: Mapping[str, Callable[[Inputs, Options], tuple[Inputs, Options]]] = field(default_factory=dict)
    consistent: Callable[[Options], bool] = lambda options: True
    specials: Sequence[float] = (nan, inf, -inf)
    same_bits: bool = True
    waits: int = 0
    bench_layout: str = "contiguous"
    shape: Callable[[int, int], tuple[int, ...]] = lambda rows, columns: (rows, columns)
    terms: Mapping[str, Callable[[Call], Tensor]] = field(default_factory=dict)

    @property
    def reference(self) -> Callable[..., Any]:
        """The contract."""
        return getattr(unsloth_ref.kernels, self.op)

    @property
    def rows(self) -> str:
        """The name of the first dimension, which counts rows."""
        return next(iter(self.sizes))

    def case(self, rows: int, columns: int) -> Case:
        """The plainest case of so many rows of about so many columns."""
        return Case(tuple(zip(self.sizes, self.shape(rows, columns), strict=True)))

    def inputs(self, case: Case, dtype: torch.dtype, device: str, source: str = "cpu") -> Inputs:
        """The tensors of a case, drawn on the source device."""
        return self.build(Draw(case, dtype, device, source), **dict(case.sizes))

    def parse(self, line: str) -> Case:
        """Read a case of this operation from one line; raises ValueError, for an option of another kind too."""
        case = Case.parse(line, tuple(self.sizes), tuple(self.options))
        for name, value in case.options:
            numbers = any(isinstance(one, Number) for one in self.options[name])
            if value not in self.options[name] and not (numbers and isinstance(value, Number)):
                allowed = ", ".join(map(str, self.options[name])) + (", or another number" if numbers else "")
                raise ValueError(f"case: got {name}={value}; allowed: {allowed}")
        return case

    def cases(self, elements: int, options: Sequence[str] | None = None) -> st.SearchStrategy[Case]:
        """Cases of at most this many elements; of the options only those named, where names are given."""
        drawn = {name: values for name, values in self.options.items() if options is None or name in options}

        @st.composite
        def draw_case(draw: st.DrawFn) -> Case:
            budget, sizes = elements, {}
            for name, strategy in reversed(list(self.sizes.items())):
                sizes[name] = draw(strategy(budget), label=name)
                budget = max(1, budget // max(1, sizes[name]))
            chosen = {name: draw(st.sampled_from(values), label=name) for name, values in drawn.items()}
            assume(self.consistent(chosen))
            return Case(
                sizes=tuple((name, sizes[name]) for name in self.sizes),
                options=tuple((name, value) for name, value in chosen.items() if value != self.options[name][0]),
                fill=draw(st.sampled_from(self.fills), label="fill"),
                seed=draw(st.integers(0, 3), label="seed"),
            )

        return draw_case()


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@cache
def specs() -> Mapping[str, Spec]:
    """The spec of every operation, by name.

    Raises:
        SpecError: an operation has no spec, a spec has no operation, or names another than its file.
    """
    found: dict[str, Spec] = {}
    for info in pkgutil.iter_modules(conformance.specs.__path__):
        if info.name not in unsloth_ref.kernels.__all__:
            raise SpecError(f"conformance/specs/{info.name}.py: unsloth_ref.kernels has no operation {info.name}")
    for op in unsloth_ref.kernels.__all__:
        try:
            module: ModuleType = importlib.import_module(f"conformance.specs.{op}")
        except ModuleNotFoundError as missing:
            if missing.name != f"conformance.specs.{op}":
                raise
            raise SpecError(f"operation {op} has no spec: conformance/specs/{op}.py is missing") from missing
        spec = getattr(module, "spec", None)
        if not isinstance(spec, Spec):
            raise SpecError(f"conformance/specs/{op}.py: got spec = {spec!r}; allowed: a Spec")
        if spec.op != op:
            raise SpecError(f"conformance/specs/{op}.py: its spec names {spec.op}")
        found[op] = spec
    return found


def accepted_options(function: Callable[..., Any], spec: Spec) -> list[str]:
    """The spec's options that a function takes."""
    parameters = inspect.signature(getattr(function, "forward", function)).parameters  # a torch.nn.Module's own
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return list(spec.options)
    return [name for name in spec.options if name in parameters]
