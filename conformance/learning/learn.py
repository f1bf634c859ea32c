"""The Spec of an operation that the project has never heard of, learned from its reference and an example call.

The signature shows which arguments have defaults. Calls of the reference show the rest: how many outputs it has, which
inputs it differentiates, which sizes it accepts. Whatever the reference refuses is not judged.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf, nan
from typing import Any

import torch

from conformance.case import Case, Draw
from conformance.counts import Counts, rule, shape
from conformance.declarations import SpecError
from conformance.learning.definition import (
    PRESENT,
    OperatorCount,
    Overwriting,
    call,
    demand_function,
    fits,
    outputs_of,
    reached,
    takes_gradients,
)
from conformance.learning.example import Example, Follows, TensorArgument, value_of
from conformance.learning.options import others
from conformance.spec import Budget, Drawing, Inputs, Options, Spec
from conformance.trial import Caught, as_leaves, describe

PROBED = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64)
OPERATORS = 2**11  # of a loop over a size: each runs some fifty times a case, in probes and both passes
FEWEST_ACCEPTED = 0.1  # of 20 random cases: with fewer, the sizes do not describe the operation


def build(arguments: Mapping[str, TensorArgument], draw: Draw, sizes: Mapping[str, int]) -> Inputs:
    """The tensors of a case, without those that its options replace; ValueError if integers are below 0 classes."""
    replaced = dict(draw.case.options)
    inputs: Inputs = {}
    for name, one in arguments.items():
        numbers = [value_of(size, sizes) for size in one.shape]
        low, high = value_of(one.low, sizes), value_of(one.high, sizes)
        if one.kind == "randint" and high <= low and 0 not in numbers:
            raise ValueError(f"{name}: got {low} to {high} as the range of integers; allowed: a range with an integer")
        tensor = draw.tensor(one.kind, *numbers, dtype=one.dtype, low=low, high=high, other=one.other)
        if replaced.get(name.partition("[")[0], PRESENT) is not None:
            inputs[name] = tensor
    return inputs


@dataclass(frozen=True)
class Learner:
    """Learns from a reference and an example.

    Attributes:
        reference: the function, with a name and a signature.
        example: the call.
        in_place: the inputs that it changes on purpose.
        rows: the inputs whose first dimension counts independent rows.
        grads: the inputs to differentiate; None for all that the reference differentiates.
    """

    reference: Callable[..., Any]
    example: Example
    in_place: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    grads: tuple[str, ...] | None = None

    @property
    def op(self) -> str:
        """The name of the operation."""
        return self.reference.__name__

    def spec(self) -> Spec:
        """The Spec.

        Raises:
            SpecError: the example does not fit the reference, or the reference refuses it or nearly everything else.
        """
        self._demand_arguments()
        spec = self._of_example()
        counts = self._counts(spec)
        drawing = replace(spec.drawing, sizes=counts, shape=partial(shape, counts))
        spec = self._with_others(replace(spec, drawing=drawing))
        self._demand_mostly_accepted(spec)
        return replace(spec, lacks=self._lacks(spec), special_values=self._special_values(spec))

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the reference."""
        return inspect.signature(self.reference).parameters

    @cached_property
    def tensors(self) -> dict[str, TensorArgument]:
        """The tensors by name; the elements of a list with their place."""
        found: dict[str, TensorArgument] = {}
        for name, values in self.example.arguments.items():
            for value in values:
                if isinstance(value, list) and all(isinstance(one, TensorArgument) for one in value) and value:
                    found |= {f"{name}[{place}]": one for place, one in enumerate(value)}
                elif isinstance(value, TensorArgument):
                    found[name] = value
        return found

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes of the example that its tensors have, that of the rows first."""
        used = [s for t in self.tensors.values() for s in (*t.shape, t.low, t.high) if not isinstance(s, int)]
        names = list(dict.fromkeys(name for _, name in used))
        for row in self.rows:
            first = self.tensors[row].shape[:1] if row in self.tensors else ()
            if not first or isinstance(first[0], int) or first[0][0] != 1:
                raise SpecError(f"--rows: got {row}; allowed: tensors of the example whose first size may vary")
            names = [first[0][1], *(name for name in names if name != first[0][1])]
        return {name: self.example.sizes[name] for name in names}

    def _demand_arguments(self) -> None:
        takes_any = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        for name, values in self.example.arguments.items():
            if name not in self.parameters and not takes_any:
                raise SpecError(f"--example: {self.op} has no argument {name}; it has {', '.join(self.parameters)}")
            others = [value for value in values if value is not None]
            tensors = any(map(_is_tensors, others))
            if tensors and len(others) > 1:
                raise SpecError(f"--example: got several values of {name}; allowed beside a tensor: None")
            if not tensors and len(values) > 1 and any(isinstance(value, (Follows, list, dict)) for value in values):
                raise SpecError(
                    f"--example: got several values of {name}; allowed: numbers, words and tuples, not lists and sizes"
                )
        for name, parameter in self.parameters.items():
            variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if name not in self.example.arguments and parameter.default is parameter.empty and not variable:
                raise SpecError(f"--example: {name} is missing, which {self.op} needs")
        if not any(all(value_of(size, self.sizes) for size in one.shape) for one in self.tensors.values()):
            raise SpecError("--example: got no tensor with an element; allowed: arguments such as x=randn(64,128)")
        for flag, names in (("--in-place", self.in_place), ("--rows", self.rows), ("--grads", self.grads or ())):
            for name in names:
                if name not in self.tensors:
                    raise SpecError(f"{flag}: got {name}; allowed: {', '.join(self.tensors)}")

    def options(self) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Known values by keyword, the default first; and those that every call gets."""
        drawn: dict[str, list[Any]] = {}
        always: dict[str, Any] = {}
        for name, values in self.example.arguments.items():
            parameter = self.parameters.get(name)
            default = [] if parameter is None or parameter.default is parameter.empty else [parameter.default]
            first = values[0]
            if any(map(_is_tensors, values)):
                if None in values or default == [None]:
                    drawn[name] = [PRESENT, None]
            elif isinstance(first, (Follows, list, dict)):
                always[name] = first
            else:
                drawn[name] = list(dict.fromkeys([*default, *values]))
                if not default:
                    always[name] = first
        for name, parameter in self.parameters.items():
            if name not in self.example.arguments and isinstance(parameter.default, (bool, int, float, tuple)):
                drawn[name] = [parameter.default]
        return drawn, always

    def _with_others(self, spec: Spec) -> Spec:
        """The Spec whose options have one more value, if there is one that the reference takes like the known ones."""
        cases = Case(tuple(self.sizes.items())), spec.case(5, 130)  # the latter judges every option
        known, added = spec.drawing.options, dict[str, Any]()
        for name, values in known.items():
            for value in (one for one in others(values) if one not in values):
                if all(fits(spec, case.with_options({name: value})) for case in cases):
                    added[name] = value
                    break
        options = {name: [*values, added[name]] if name in added else values for name, values in known.items()}
        required = spec.drawing.required(cases[0])
        given = {*self.example.arguments} - {*required}  # the others have their one value in every call
        options = {name: values for name, values in options.items() if len(values) > 1 or name in given}
        return replace(spec, drawing=replace(spec.drawing, options=options, added=added))

    def _of_example(self) -> Spec:
        """The Spec whose only sizes are those of the example; calls the reference."""
        drawn, always = self.options()
        tensors = self.tensors

        def required(case: Case) -> Options:
            sizes = dict(case.sizes)
            return {
                name: value_of(value.size, sizes) if isinstance(value, Follows) else value
                for name, value in always.items()
            }

        spec = Spec(
            reference=self.reference,
            drawing=Drawing(
                sizes={name: Counts(size, only=(size,)) for name, size in self.sizes.items()},
                build=lambda draw, **sizes: build(tensors, draw, sizes),
                options=drawn,
                required=required,
                fills=(*Drawing.fills, *(("lowest", "highest") if any(t.is_integer for t in tensors.values()) else ())),
                partial=True,
            ),
            outputs=(),
            grads=(),
            budget=Budget(measured=True),
            in_place=self.in_place,
            rowwise=self.rows,
        )
        outputs, grads = self._called(spec)
        for name in self.rows:
            rows = value_of(tensors[name].shape[0], self.sizes)
            for output, found in zip(outputs, found_shapes(spec, self.sizes), strict=True):
                if found[:1] != (rows,):
                    raise SpecError(f"--rows: got {name}, but output {output} of shape {list(found)} has no such rows")
        return replace(spec, outputs=outputs, grads=grads)

    def _called(self, spec: Spec) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the outputs, and of the inputs that have a gradient."""
        case = Case(tuple(self.sizes.items()))
        with Caught() as caught:
            plain = spec.inputs(case, torch.float32, "cpu")
        if caught.error is not None:
            raise SpecError(f"--example: its tensors cannot be made: {describe(caught.error)}") from caught.error
        demand_function(spec, case, plain)
        wanted = self.grads if self.grads is not None else self.example.grads
        names = [name for name in plain if wanted is None or name in wanted]
        inputs = as_leaves(plain, [name for name in names if takes_gradients(spec, case, plain, name)])
        outputs = outputs_of(spec, case, inputs)
        with Caught(), Overwriting() as overwriting:
            call(spec, case, plain)
        returned = len(outputs) - len(self.in_place)
        names = ["result"] if returned == 1 else [str(place) for place in range(returned)]
        names += [f"{name} (in place)" for name in self.in_place]
        grads = [] if overwriting.found and wanted is None else reached(outputs, inputs)
        for name in wanted or ():
            if name not in grads:
                raise SpecError(
                    f"--grads: got {name}; allowed: {', '.join(grads) or 'none: the reference has no gradient'}"
                )
        return tuple(names), tuple(grads if wanted is None else wanted)

    def _accepted(self, spec: Spec, sizes: Mapping[str, int]) -> bool:
        """Whether the reference accepts these sizes; it need not differentiate."""
        with Caught() as caught:
            case = Case(tuple(sizes.items()))
            call(spec, case, spec.inputs(case, torch.float32, "cpu"))
        return caught.error is None

    def _counts(self, spec: Spec) -> dict[str, Counts]:
        """Which sizes the reference accepts, one dimension at a time."""
        base = dict(self.sizes)
        for name, size in self.sizes.items():  # make the probes cheap
            small = (n for n in (2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 64, 128) if n < size)
            base[name] = next((n for n in small if self._accepted(spec, {**base, name: n})), size)
        found = {}
        for name, size in self.sizes.items():
            around = {size - 1, size, size + 1, size + 2, *((2 * size, 2 * size + 1) if size <= 4096 else ())}
            probed = sorted({*PROBED, *around})
            accepted = [n for n in probed if self._accepted(spec, {**base, name: n})]
            found[name] = self._affordable(spec, base, name, accepted, rule(size, accepted, probed))
        return found

    def _affordable(
        self, spec: Spec, base: Mapping[str, int], name: str, accepted: Sequence[int], counts: Counts
    ) -> Counts:
        """The power of a size that the reference's work grows with, from 1 to 3; no long loops of operators."""
        counts, works = replace(counts, empty=0 in accepted), list[OperatorCount]()
        pair = [n for n in accepted if n and 2 * n in accepted][-1:]
        for size in (*pair, *(2 * n for n in pair)):
            with OperatorCount() as work:
                self._accepted(spec, {**base, name: size})
            works.append(work)
        if not works:
            return counts
        once, twice = works
        grows = max(1, twice.elements) / max(1, once.elements)
        counts = replace(counts, growth=1 if grows < 2.5 else 2 if grows < 5 else 3)
        if not once.operators or twice.operators < 1.5 * once.operators or counts.only:
            return counts
        most = max(counts.example, pair[0] * OPERATORS // once.operators)
        return replace(counts, high=min(most, counts.high or most))

    def _demand_mostly_accepted(self, spec: Spec) -> None:
        drawing, sizes = spec.drawing, []
        for rows, columns in itertools.product((1, 2, 3, 5, 16), (1, 7, 16, 64)):
            sizes.append(dict(zip(drawing.sizes, drawing.shape(rows, columns), strict=True)))
        accepted = sum(self._accepted(spec, one) for one in sizes)
        if accepted < FEWEST_ACCEPTED * len(sizes):
            raise SpecError(
                f"reference: {self.op} refuses {len(sizes) - accepted} of {len(sizes)} combinations of sizes around the"
                " example; name the sizes that depend on each other, as in x=randn(T=64,2*H) y=randn(T,H=32)"
            )

    def _lacks(self, spec: Spec) -> dict[str, str]:
        """The properties that the reference itself does not have."""
        lacks = {}
        case = spec.case(3, 8)
        with Caught() as caught:
            inputs = spec.inputs(case, torch.float32, "cpu")
            plain = call(spec, case, inputs)
            with torch.autocast("cpu", torch.bfloat16):
                cast = call(spec, case, inputs)
            if any(one.dtype != other.dtype or not one.equal(other) for one, other in zip(plain, cast, strict=True)):
                lacks["autocast"] = "under autocast the reference computes in another dtype"
        if caught.error is not None:
            lacks["autocast"] = f"under autocast the reference raises {describe(caught.error)}"
        return lacks

    def _with_value(self, value: float, spec: Spec, case: Case) -> Iterator[Inputs]:
        """The inputs of a case once for each element of those that have rows, which has this value."""
        for name in self.rows:
            tensor = spec.inputs(case, torch.float32, "cpu")[name]
            for place in range(tensor.numel() if tensor.is_floating_point() else 0):
                inputs = spec.inputs(case, torch.float32, "cpu")
                inputs[name].view(-1)[place] = value
                yield inputs

    def _special_values(self, spec: Spec) -> tuple[float, ...]:
        """Infinities for which the reference returns no NaN, wherever they are, and NaN; none for integer results."""
        case, found = spec.case(3, 8), [nan]
        outputs = call(spec, case, spec.inputs(case, torch.float32, "cpu"))
        if not self.rows or not all(output.is_floating_point() for output in outputs):
            return ()
        for value in (inf, -inf):
            with Caught():
                # In each element by itself: a mask may hide some.
                outputs = [o for inputs in self._with_value(value, spec, case) for o in call(spec, case, inputs)]
                if not any(output.isnan().any() for output in outputs):
                    found.append(value)
        return tuple(found)


def _is_tensors(value: Any) -> bool:
    """Whether a value of an argument is a tensor, or a list with one."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(one, TensorArgument) for one in values)


def found_shapes(spec: Spec, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """The shapes of the outputs at these sizes."""
    case = Case(tuple(sizes.items()))
    return [tuple(output.shape) for output in call(spec, case, spec.inputs(case, torch.float32, "cpu"))]
