"""A learned spec as the text of a Python file, which judges like the learned one and can be edited."""

from __future__ import annotations

import json
from typing import Any

import torch

from conformance.counts import Counts
from conformance.learning.definition import PRESENT
from conformance.learning.example import INTEGERS, Follows, Size, TensorArgument, word_of
from conformance.learning.learn import Learner
from conformance.spec import Spec

_HINTS = """    # Measured: conformance/tolerances/condition.py. To state it by hand, give `roundings`, how often a
    # right kernel may round to the dtype before its last rounding, and `terms`: for each output and each gradient that
    # cancels, the sum of the sizes of what is added up. docs/design.md has the gates that read both.
    #     budget=Budget(roundings=1, terms={"result": lambda call: call.inputs["x"].abs()}),
"""


def text(learner: Learner, where: str) -> str:
    """The file.

    Args:
        learner: of the operation.
        where: its reference, "module:function" or "file.py:function".
    """
    spec = learner.spec()
    module, _, name = where.rpartition(":") if ":" in where else where.rpartition(".")
    counts = {name: count for name, count in spec.drawing.sizes.items() if isinstance(count, Counts)}
    lines = [
        f'"""The spec of {spec.op}: how it is drawn and judged."""',
        "",
        *_imports(learner, module, name),
        "",
        "",
        *_build(learner, spec),
        "",
        "",
        *_sizes(counts),
        "",
        "",
        "spec = Spec(",
        f"    reference={_reference(module, name)},",
        "    drawing=Drawing(",
        "        sizes=SIZES,",
        "        build=_build,",
        *_options(learner, spec),
        f"        fills={_list(spec.drawing.fills)},",
        "        shape=lambda rows, columns: shape(SIZES, rows, columns),",
        "        partial=True,  # cases that the reference refuses are skipped",
        "    ),",
        f"    outputs={_list(spec.outputs)},",
        f"    grads={_list(spec.grads)},",
        *_HINTS.rstrip("\n").split("\n"),
        "    budget=Budget(measured=True),",
        *([f"    in_place={_list(spec.in_place)},"] if spec.in_place else []),
        *([f"    rowwise={_list(spec.rowwise)},"] if spec.rowwise else []),
        *([f"    special_values=[{', '.join(map(str, spec.special_values))}],"] if spec.rowwise else []),
        *([f"    lacks={json.dumps(dict(spec.lacks))},"] if spec.lacks else []),
        ")",
    ]
    return "\n".join(lines) + "\n"


def _reference(module: str, name: str) -> str:
    return f'resolve("{module}:{name}", "reference")' if module.endswith(".py") else name


def _imports(learner: Learner, module: str, name: str) -> list[str]:
    values = [value for values in learner.example.arguments.values() for value in values]
    dtypes = any(one.dtype not in (None, torch.bool, torch.int64) for one in learner.tensors.values())
    dtypes |= any(isinstance(value, torch.dtype) for value in values)
    special = ["from math import inf, nan", ""] if learner.rows else []
    file = module.endswith(".py")
    return [
        *special,
        *(["import torch", ""] if dtypes else []),
        "from conformance.case import Draw",
        "from conformance.counts import Counts, shape",
        *(["from conformance.operations import resolve"] if file else []),
        "from conformance.spec import Budget, Drawing, Inputs, Spec",
        *([] if file else [f"from {module} import {name}"]),
    ]


def _build(learner: Learner, spec: Spec) -> list[str]:
    optional = [name for name, values in spec.drawing.options.items() if PRESENT in values]
    sizes = ", ".join(f"{name}: int" for name in spec.drawing.sizes)
    lines = [f"def _build(draw: Draw, {sizes}) -> Inputs:", "    inputs = {"]
    lines += [f'        "{name}": {_tensor(one)},' for name, one in learner.tensors.items()]
    lines.append("    }")
    for name in optional:
        group = [one for one in learner.tensors if one.partition("[")[0] == name]
        lines.append(f'    if dict(draw.case.options).get("{name}", "{PRESENT}") is None:')
        lines += [f'        del inputs["{one}"]' for one in group]
    return [*lines, "    return inputs"]


def _tensor(one: TensorArgument) -> str:
    words = [f'"{one.kind}"', *(_size(size) for size in one.shape)]
    if one.dtype not in (None, INTEGERS.get(one.kind)):
        words.append(f"dtype={one.dtype}")
    if one.kind == "offsets":
        words.append(f"high={_size(one.high)}")
    if one.kind == "randint":
        words += [f"low={_size(one.low)}", f"high={_size(one.high)}"]
        words += [] if one.other is None else [f"other={one.other}"]
    return f"draw.tensor({', '.join(words)})"


def _size(size: Size) -> str:
    return word_of(size).replace("*", " * ")


def _sizes(counts: dict[str, Counts]) -> list[str]:
    fields = ("of", "low", "high", "growth", "only", "empty")
    usual = Counts(0)
    lines = ["SIZES = {"]
    for name, count in counts.items():
        words = [str(count.example)]
        words += [f"{f}={getattr(count, f)!r}" for f in fields if getattr(count, f) != getattr(usual, f)]
        lines.append(f'    "{name}": Counts({", ".join(words)}),  # {count}')
    return [*lines, "}"]


def _options(learner: Learner, spec: Spec) -> list[str]:
    drawn = {name: f"[{', '.join(map(_value, values))}]" for name, values in spec.drawing.options.items()}
    added = {name: _value(value) for name, value in spec.drawing.added.items()}
    always = {name: _value(value) for name, value in learner.options()[1].items()}
    return [
        f"        {field}{{{', '.join(f'{json.dumps(name)}: {text}' for name, text in found.items())}}},"
        for field, found in (("options=", drawn), ("added=", added), ("required=lambda case: ", always))
        if found
    ]


def _value(value: Any) -> str:
    if isinstance(value, Follows):
        if isinstance(value.size, int):
            return str(value.size)
        factor, name = value.size
        return f'case.size("{name}")' if factor == 1 else f'{factor} * case.size("{name}")'
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _list(names: Any) -> str:
    return f"[{', '.join(json.dumps(name) for name in names)}]"
