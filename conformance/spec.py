"""The declaration of an operation: tests and benchmarks follow from the `spec` in conformance/specs/<operation>.py."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, nan
from numbers import Number
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from conformance.case import EXTREMES, Case, Draw
from conformance.promises import ExactLaw, Inputs, Memory, Options, Parts, rows_as_parts
from conformance.tolerances.bounds import Bound, Terms
from unsloth_ref.accuracy import unit_roundoff

# Sizes at which kernels often fail: tile edges, primes, hidden and vocabulary sizes.
COLUMNS = (511, 512, 513, 1021, 1023, 1024, 1025, 2048, 3584, 4095, 4096, 4097, 5120, 8191, 8192, 8193, 16384, 16385)
WIDE_COLUMNS = (32768, 65537, 131072)  # only within the budgets of a GPU


def row_counts(budget: int) -> st.SearchStrategy[int]:
    """Numbers of rows, small ones first."""
    return st.integers(1, max(1, min(budget, 64)))


def few_row_counts(budget: int) -> st.SearchStrategy[int]:
    """Numbers of rows for an operation that processes rows independently: more rows would test nothing new."""
    return st.integers(1, min(budget, 12))


def column_counts(budget: int) -> st.SearchStrategy[int]:
    """Numbers of columns: any small one, or one of COLUMNS and WIDE_COLUMNS."""
    chosen = [columns for columns in (*COLUMNS, *WIDE_COLUMNS, 1) if columns <= budget]
    return st.one_of(st.integers(1, min(budget, 300)), st.sampled_from(chosen))


Change = Callable[[Inputs, Options], tuple[Inputs, Options]]  # from valid inputs and options to changed ones


@dataclass(frozen=True)
class ErrorCase:
    """A call that the contract refuses.

    Attributes:
        what: the mistake, in words.
        change: makes the mistake.
        raises: the exception type of `unsloth_ref` and `unsloth_fast`.
        names: the argument that their message names.
        undefined: whether the call has no defined result, so that any result is wrong. Calls that plain PyTorch would
            broadcast, promote or fill with a default are not undefined.
        device: "cpu" if the check is too expensive on other devices; None for every device.
    """

    what: str
    change: Change
    raises: type[Exception]
    names: str
    undefined: bool = False
    device: str | None = None


@dataclass(frozen=True)
class Call:
    """One call, the argument of a spec's `terms` and `bounds`. All floating-point tensors are float64.

    Attributes:
        inputs: by name.
        options: keywords whose value is not the default.
        grad_outputs: one per output; empty if only the forward pass is judged.
        dtype: under test.
        truncates: whether Triton's interpreter, which truncates to bfloat16, computed the result.
        wider: the inputs whose own dtype, and that of their gradients, is wider than the one under test.
    """

    inputs: Inputs
    options: Options
    grad_outputs: Sequence[Tensor]
    dtype: torch.dtype
    truncates: bool = False
    wider: frozenset[str] = frozenset()

    def inexact(self, *names: str) -> bool:
        """Whether one of these inputs has an element that the dtype under test, one of 16 bits, would round."""
        given = (self.inputs[name] for name in names if self.dtype != torch.float32)
        return any(not torch.equal(tensor.to(self.dtype).double(), tensor) for tensor in given)

    @property
    def unit(self) -> float:
        """Largest relative error of a cast to the dtype. A term times 2^-24 / unit allows it a rounding to float32."""
        return unit_roundoff(self.dtype, self.truncates)

    @property
    def smallest(self) -> float:
        """Smallest normal number of the dtype; errors of smaller numbers are absolute."""
        return torch.finfo(self.dtype).smallest_normal

    @property
    def elements(self) -> int:
        """Number of elements of the largest input."""
        return max(1, *(tensor.numel() for tensor in self.inputs.values()))


@dataclass(frozen=True)
class Drawing:
    """How cases are drawn and their tensors are built.

    Attributes:
        sizes: for each dimension, a function from an element budget to a strategy. The last dimension is drawn first.
        build: the input tensors of a case.
        options: for each keyword, the values to draw, the default first.
        added: those that the judge chose for an operation of the command line. A backend may refuse them.
        consistent: whether these options may be combined.
        required: arguments that have no default and are not inputs, as keywords, from a case.
        typed: the name of such an argument that takes the dtype under test; empty where an input has that dtype.
        fills: names in `conformance.case.FILLS`, the simplest first.
        shape: sizes for a property that needs about `rows` rows and `columns` columns.
        partial: whether the reference refuses some cases with an error; these are skipped.
        counts: dimensions of which a call may have very many, with the largest size; by default rows, any number.
        alike: fills whose rounding errors need not cancel: equal are the elements, or what is computed from them.
        costly: cases of `extents` and `guard_writes` that take an interpreter seconds; not under the profile `dev`.
    """

    sizes: Mapping[str, Callable[[int], st.SearchStrategy[int]]]
    build: Callable[..., Inputs]
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    added: Mapping[str, Any] = field(default_factory=dict)
    consistent: Callable[[Options], bool] = lambda options: True
    required: Callable[[Case], Options] = lambda case: {}
    typed: str = ""
    fills: Sequence[str] = ("randn", "ones", "zeros", "tiny", "outlier", "wide")
    shape: Callable[[int, int], tuple[int, ...]] = lambda rows, columns: (rows, columns)
    partial: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)
    alike: Sequence[str] = ("ones", "zeros", *EXTREMES)
    costly: Sequence[Case] = ()


@dataclass(frozen=True)
class Budget:
    """The error that a correct kernel may make before its last rounding. conformance/tolerances/bounds.py has formulas.

    Attributes:
        roundings: roundings to the dtype of an output or gradient that a correct kernel may make before the last one.
        terms: the terms of each output or gradient that cancels, or the sum of their sizes alone; for others |r|.
        bounds: bound of the error of an output or gradient, in place of terms.
        truth: the contract in another form, for inputs on which its intermediates do not fit in memory or cancel even
            in float64; the reference by default.
        measured: whether the error is measured instead, see conformance/tolerances/condition.py.
    """

    roundings: int = 0
    terms: Mapping[str, Callable[[Call], Tensor | Terms]] = field(default_factory=dict)
    bounds: Mapping[str, Callable[[Call], Bound]] = field(default_factory=dict)
    truth: Callable[..., Any] | None = None
    measured: bool = False

    def error(self, key: str, call: Call, r: Tensor) -> Terms | Bound:
        """The declared error of an output or gradient whose truth is r."""
        if key in self.bounds:
            return self.bounds[key](call)
        terms = self.terms[key](call) if key in self.terms else r.abs()
        return terms if isinstance(terms, Terms) else Terms(terms)


@dataclass(frozen=True)
class Speed:
    """The shapes that the bench times, and the least work that they need.

    Attributes:
        shapes: by name: sizes, options, and under "grads" the inputs to differentiate.
        bytes: fewest bytes that (forward, backward) move, from the inputs.
        flops: of the matrix products of (forward, backward), from inputs, options and names of differentiated inputs.
        layout: layout that models give the differentiated inputs, a name in `conformance.case.LAYOUTS`.
    """

    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bytes: Callable[[Inputs], tuple[int, int]] = lambda inputs: (0, 0)
    flops: Callable[[Inputs, Options, Collection[str]], tuple[int, int]] = lambda inputs, options, grads: (0, 0)
    layout: str = "contiguous"


@dataclass(frozen=True, eq=False)  # a spec is equal to itself alone, which makes it a key of caches
class Spec:
    """Everything that the judge knows about one operation.

    Attributes:
        reference: the function that defines the operation; its name is the operation's.
        drawing: how cases are drawn.
        outputs: one name per output.
        grads: the inputs that get a gradient, if a case has them.
        budget: the error that the gates allow.
        arguments: what the inputs of a case are passed as, where an argument is made of several tensors.
        in_place: the inputs that the operation changes on purpose. Each is one more output, after those returned.
        rowwise: the inputs whose first dimension counts independent rows.
        row_options: options under which every output has one entry per row.
        total_options: options of a total under which the gradients of a row do not depend on the number of rows.
        independent: the independent parts of a call; rows by default.
        bits_vary: why the bits of a part may depend on the number of parts; empty if they may not.
        far: inputs that may have more than 2^31 elements in a real run; the row-wise ones by default.
        exact_laws: by a sentence.
        memory: what a call may allocate; None for any amount.
        argument_kinds: other valid kinds of arguments, by name.
        special_values: special values that an input may contain.
        same_bits: whether outputs have the same bits with and without gradients.
        syncs: how often a pass may wait for the device. If not 0, a CUDA graph, where it cannot, may give other bits.
        errors: calls that the contract refuses.
        speed: what the bench times.
        lacks: names of properties that do not apply to this operation, and why.
    """

    reference: Callable[..., Any]
    drawing: Drawing
    outputs: Sequence[str]
    grads: Sequence[str]
    budget: Budget
    arguments: Callable[[Inputs], Mapping[str, Any]] = lambda inputs: inputs
    in_place: Sequence[str] = ()
    rowwise: Sequence[str] = ()
    row_options: Options = field(default_factory=dict)
    total_options: Options = field(default_factory=dict)
    independent: Parts | None = None
    bits_vary: str = ""
    far: Sequence[str] = ()
    exact_laws: Mapping[str, ExactLaw] = field(default_factory=dict)
    memory: Memory | None = None
    argument_kinds: Mapping[str, Change] = field(default_factory=dict)
    special_values: Sequence[float] = (nan, inf, -inf)
    same_bits: bool = True
    syncs: int = 0
    errors: Sequence[ErrorCase] = ()
    speed: Speed = field(default_factory=Speed)
    lacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def op(self) -> str:
        """The name of the operation."""
        return self.reference.__name__

    @property
    def parts(self) -> Parts:
        """The independent parts of a call."""
        return self.independent or rows_as_parts(self.rowwise)

    @property
    def row_dimension(self) -> str:
        """The name of the dimension that counts rows, the first one."""
        return next(iter(self.drawing.sizes))

    def case(self, rows: int, columns: int) -> Case:
        """The simplest case with about this many rows and columns."""
        return Case(tuple(zip(self.drawing.sizes, self.drawing.shape(rows, columns), strict=True)))

    def having(self, case: Case, options: Options) -> Case:
        """The case with these options alone; those that have their default are left out."""
        chosen = ((name, value) for name, value in options.items() if value != self.drawing.options[name][0])
        return replace(case, options=tuple(chosen))

    def inputs(self, case: Case, dtype: torch.dtype, device: str, source: str = "cpu") -> Inputs:
        """The tensors of a case; the source device draws their elements."""
        return self.drawing.build(Draw(case, dtype, device, source), **dict(case.sizes))

    def required(self, case: Case, dtype: torch.dtype) -> Options:
        """The arguments that have no default and are not inputs, as keywords."""
        return self.drawing.required(case) | ({self.drawing.typed: dtype} if self.drawing.typed else {})

    def without_options(self, options: Options) -> Options:
        """The options that have no default, each with its first value."""
        needed = [n for n, p in inspect.signature(self.reference).parameters.items() if p.default is p.empty]
        return {name: self.drawing.options.get(name, [options[name]])[0] for name in needed if name in options}

    def parse(self, line: str) -> Case:
        """Parse a case of this operation; raises ValueError, also for an option with a value that is not allowed."""
        case = Case.parse(line, tuple(self.drawing.sizes), self.drawing.options)
        for name, value in case.options:
            numbers = any(isinstance(one, Number) for one in self.drawing.options[name])
            if value not in self.drawing.options[name] and not (numbers and isinstance(value, Number)):
                allowed = ", ".join(map(str, self.drawing.options[name])) + (", or another number" if numbers else "")
                raise ValueError(f"case: got {name}={value}; allowed: {allowed}")
        return case

    def cases(self, elements: int, options: Sequence[str] | None = None) -> st.SearchStrategy[Case]:
        """A strategy for cases of at most this many elements; `options` restricts which options vary."""
        drawn = {name: values for name, values in self.drawing.options.items() if options is None or name in options}

        @st.composite
        def draw_case(draw: st.DrawFn) -> Case:
            budget, sizes = elements, {}
            for name, strategy in reversed(list(self.drawing.sizes.items())):
                sizes[name] = draw(strategy(budget), label=name)
                budget = max(1, budget // max(1, sizes[name]))
            chosen = {name: draw(st.sampled_from(values), label=name) for name, values in drawn.items()}
            assume(self.drawing.consistent(chosen))
            case = Case(
                sizes=tuple((name, sizes[name]) for name in self.drawing.sizes),
                fill=draw(st.sampled_from(self.drawing.fills), label="fill"),
                seed=draw(st.integers(0, 3), label="seed"),
            )
            return self.having(case, chosen)

        return draw_case()


def nbytes(*tensors: Tensor) -> int:
    """Total size of the elements of these tensors, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def change_inputs(change: Callable[[Inputs], Inputs]) -> Change:
    """A change of the inputs only; `change` returns the tensors that differ."""
    return lambda inputs, options: ({**inputs, **change(inputs)}, options)


def leading_dimensions(*names: str) -> dict[str, Change]:
    """Argument kinds of an operation on [..., columns]: these inputs with fewer and with more leading dimensions."""
    changes = {
        "no leading dimension": lambda tensor: tensor[0],
        "two leading dimensions": lambda tensor: tensor.unflatten(0, (2, -1)),
        "two leading dimensions that no view joins": lambda tensor: tensor.unflatten(0, (2, -1)).transpose(0, 1),
    }
    return {
        what: change_inputs(lambda inputs, change=change: {name: change(inputs[name]) for name in names})
        for what, change in changes.items()
    }


def mistake(
    what: str, raises: type[Exception], names: str, change: Callable[[Inputs], Inputs], *,
    undefined: bool = False, device: str | None = None,
) -> ErrorCase:  # fmt: skip
    """A mistake in the tensors; `change` returns the wrong ones."""
    return ErrorCase(what, change_inputs(change), raises, names, undefined, device)


def wrong_option(what: str, name: str, **options: Any) -> ErrorCase:
    """An option, or a combination of options, outside of its range."""
    return ErrorCase(what, lambda inputs, old: (inputs, {**old, **options}), ValueError, name)


def accepted_options(function: Callable[..., Any], spec: Spec) -> list[str]:
    """The spec's options that a function accepts."""
    parameters = inspect.signature(getattr(function, "forward", function)).parameters  # of a torch.nn.Module: forward
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return list(spec.drawing.options)
    return [name for name in spec.drawing.options if name in parameters]
