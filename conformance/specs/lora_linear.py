"""A linear layer with a low-rank adapter beside it."""

from collections.abc import Callable, Collection
from copy import copy
from dataclasses import dataclass
from math import log2, nan

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.case import Draw
from conformance.spec import Call, ErrorCase, Inputs, Options, Spec, columns, nbytes, rows

ROUNDINGS = 1
FLOAT32 = 2.0**-24
NARROW = {2.0**-11: torch.float16, 2.0**-8: torch.bfloat16}  # by unit roundoff


def _build(draw: Draw, rows: int, rank: int, wide: int, columns: int, out: int) -> Inputs:
    """Wide adapters are float32 whatever the dtype; a bias under odd seeds."""
    x, weight, bias = draw.rows(rows, columns), draw.matrix(out, columns), draw.weight(out)
    adapters = copy(draw)
    if wide:
        adapters.dtype = torch.float32
    inputs = {
        "x": x,
        "weight": weight,
        "lora_a": adapters.matrix(rank, columns),
        "lora_b": adapters.matrix(out, rank),
    }
    return inputs | ({"bias": bias} if draw.case.seed % 2 else {})


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """Columns of x or, under an odd number, of y; wide adapters beside an odd number of rows."""
    few = 3 + columns % 29
    return rows, 1 + (columns + 1) % 5, rows % 2, *((few, columns) if columns % 2 else (columns, few))


def _out(budget: int) -> st.SearchStrategy[int]:
    """A number of columns of y, mostly so few that those of x get their share of the elements."""
    many = [size for size in (96, 129, 512, 1024, 2048, 4096) if size <= budget // 64]
    return st.sampled_from([1, 2, 4, 8, 16, 33, 64, *many])


@dataclass(frozen=True)
class _Sum:
    """Something that is added up, in float64, and by how much it may be off."""

    value: Tensor
    error: Tensor


class _Terms:
    """What a call computes on the way, with errors.

    Each product is a sum in float32 and is rounded to the dtype of x, as is what it was computed from: x @ lora_a^T,
    its product with lora_b, that times scaling, and on the way back dy times scaling and its product with lora_b.
    Adapters of more bits than x has are rounded to its dtype first.
    """

    def __init__(self, call: Call) -> None:
        self.unit, self.least = call.unit, call.unit * call.smallest
        self.float32 = _float32(call)
        self.scaling = call.options.get("scaling", 1.0)
        self.x, self.weight = _exactly(_rows(call.inputs["x"])), _exactly(call.inputs["weight"])
        share = call.unit if _wide(call) else 0.0
        self.a, self.b = (_Sum(t, share * t.abs()) for t in (call.inputs["lora_a"], call.inputs["lora_b"]))
        self.low = self.rounded(self.product(self.x, _transposed(self.a)))
        if call.grad_outputs:
            self.dy = _exactly(_rows(call.grad_outputs[0]))
            self.dz = self.rounded(_Sum(self.scaling * self.dy.value, self.dy.error))
            self.dlow = self.rounded(self.product(self.dz, self.b))

    def product(self, left: _Sum, right: _Sum) -> _Sum:
        """left @ right, not rounded yet."""
        size = left.value.abs()
        error = (left.error + self.float32 * size) @ right.value.abs() + (size + left.error) @ right.error
        return _Sum(left.value @ right.value, error)

    def rounded(self, sum_: _Sum) -> _Sum:
        """The same, rounded to the dtype of x."""
        return _Sum(sum_.value, sum_.error + self.unit * (sum_.value.abs() + sum_.error) + self.least)


def _rows(tensor: Tensor) -> Tensor:
    """[..., C] as [T, C]."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _exactly(tensor: Tensor) -> _Sum:
    return _Sum(tensor, torch.zeros_like(tensor))


def _transposed(sum_: _Sum) -> _Sum:
    return _Sum(sum_.value.t(), sum_.error.t())


def _float32(call: Call) -> float:
    """What float32 arithmetic may cost a term: as much as gate G1 grants one."""
    return 2 * max(1.0, log2(max(1, *(tensor.numel() for tensor in call.inputs.values())))) * FLOAT32


def _wide(call: Call) -> bool:
    """Whether adapters have more bits than x: normal numbers drawn in float32 are none of 16 bits."""
    narrow = NARROW.get(call.unit)
    adapters = call.inputs["lora_a"], call.inputs["lora_b"]
    return narrow is not None and any(not torch.equal(t.to(narrow).double(), t) for t in adapters)


def _granted(call: Call, error: Tensor, unit: float) -> Tensor:
    """The size of terms of which gate G1 grants this error to a result of this unit roundoff."""
    return error / (ROUNDINGS * unit + _float32(call))


def _y_terms(call: Call) -> Tensor:
    """Two products and a bias, rounded one after the other; scaling is a rounding of its own."""
    terms = _Terms(call)
    base = terms.rounded(terms.product(terms.x, _transposed(terms.weight)))
    error = base.error
    if "bias" in call.inputs:
        bias = call.inputs["bias"]  # which may be the first term of the sum: each of the others is added to it
        error = error + terms.float32 * bias.abs() + call.unit * (base.value + bias).abs() + terms.least
    added = terms.rounded(terms.product(terms.low, _transposed(terms.b)))
    scaled = terms.rounded(_Sum(terms.scaling * added.value, abs(terms.scaling) * added.error))
    shape = *call.inputs["x"].shape[:-1], call.inputs["weight"].shape[0]
    return _granted(call, (error + scaled.error).reshape(shape), call.unit)


def _x_terms(call: Call) -> Tensor:
    """dy @ weight and dlow @ lora_a, each rounded."""
    terms = _Terms(call)
    error = terms.rounded(terms.product(terms.dy, terms.weight)).error
    error = error + terms.rounded(terms.product(terms.dlow, terms.a)).error
    return _granted(call, error.reshape(call.inputs["x"].shape), call.unit)


def _adapter_terms(product: Callable[[_Terms], _Sum]) -> Callable[[Call], Tensor]:
    """Of an adapter's gradient, which plain PyTorch rounds to the dtype of x even where the adapter has more bits."""

    def terms(call: Call) -> Tensor:
        found = _Terms(call)
        return _granted(call, found.rounded(product(found)).error, FLOAT32 if _wide(call) else call.unit)

    return terms


def _weight_terms(call: Call) -> Tensor:
    """A product of two exact matrices, of which there is no rounding but the last."""
    terms = _Terms(call)
    return _granted(call, terms.product(_transposed(terms.dy), terms.x).error, call.unit)


def _bias_terms(call: Call) -> Tensor:
    """The sum of |dy|."""
    return _granted(call, _float32(call) * _rows(call.grad_outputs[0]).abs().sum(0), call.unit)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """x, all weights and y; then dy, the same, dx and the gradients of the adapters. A frozen weight gets none."""
    x, adapters = inputs["x"], nbytes(inputs["lora_a"], inputs["lora_b"])
    read = nbytes(x, inputs["weight"]) + adapters
    y = x[..., 0].numel() * len(inputs["weight"]) * x.element_size()
    return read + y, read + y + nbytes(x) + adapters


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """The product with the weight and the two of the adapter; on the way back those that the gradients need."""
    x, (out, columns), rank = inputs["x"], inputs["weight"].shape, len(inputs["lora_a"])
    tokens = 2 * x[..., 0].numel()
    whole, narrow_in, narrow_out = tokens * out * columns, tokens * rank * columns, tokens * rank * out
    needs = {
        "x": whole + narrow_in,  # dy @ weight, dlow @ lora_a
        "weight": whole,
        "lora_a": narrow_in,
        "lora_b": narrow_out,
    }
    dlow = narrow_out if {"x", "lora_a"}.intersection(grads) else 0
    return whole + narrow_in + narrow_out, dlow + sum(needs.get(name, 0) for name in grads)


def _kind(change: Callable[[Inputs], Inputs]) -> Callable[[Inputs, Options], tuple[Inputs, Options]]:
    """Other tensors."""
    return lambda inputs, options: ({**inputs, **change(inputs)}, options)


def _mistake(
    what: str, raises: type[Exception], names: str, change: Callable[[Inputs], Inputs], senseless: bool = False
) -> ErrorCase:
    """Wrong tensors; a bias, which stands behind an option, goes by name."""

    def changed(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        wrong = change(inputs)
        by_name = {name: tensor for name, tensor in wrong.items() if name == "bias"}
        return {**inputs, **{name: tensor for name, tensor in wrong.items() if name != "bias"}}, {**options, **by_name}

    return ErrorCase(what, changed, raises, names, senseless=senseless)


def _bench(columns: int, out: int, wide: int = 1, tokens: int = 16384) -> dict[str, object]:
    """A frozen layer under an adapter of rank 16, in float32 as peft keeps it."""
    return {
        "rows": tokens, "rank": 16, "wide": wide, "columns": columns, "out": out, "grads": ("x", "lora_a", "lora_b")
    }  # fmt: skip


spec = Spec(
    op="lora_linear",
    sizes={
        "rows": lambda budget: rows(max(budget, 16)),
        "rank": lambda budget: st.sampled_from([1, 4, 8, 16, 64]),
        "wide": lambda budget: st.sampled_from([0, 1]),
        "columns": columns,
        "out": _out,
    },
    options={"scaling": [1.0, 2.0, 0.25, 0.0]},
    build=_build,
    shape=_shape,
    outputs=["y"],
    grads=["x", "weight", "lora_a", "lora_b", "bias"],
    rowwise=["x"],
    specials=[nan],  # an infinity makes terms of both signs, and may or may not meet a scaling of 0
    roundings=ROUNDINGS,
    terms={
        "y": _y_terms,
        "x": _x_terms,
        "weight": _weight_terms,
        "lora_a": _adapter_terms(lambda terms: terms.product(_transposed(terms.dlow), terms.x)),
        "lora_b": _adapter_terms(lambda terms: terms.product(_transposed(terms.dz), terms.low)),
        "bias": _bias_terms,
    },
    kinds={
        "no leading dimension": _kind(lambda i: {"x": i["x"][0]}),
        "two leading dimensions": _kind(lambda i: {"x": i["x"].unflatten(0, (2, -1))}),
        "a bias": _kind(lambda i: {"bias": i["weight"][:, 0].contiguous()}),
        "adapters in float32": _kind(lambda i: {n: i[n].float() * (1 + 2**-13) for n in ("lora_a", "lora_b")}),
        "rank 0": _kind(lambda i: {"lora_a": i["lora_a"][:0], "lora_b": i["lora_b"][:, :0]}),
        "no columns but a bias": _kind(
            lambda i: {n: i[n][..., :0] for n in ("x", "weight", "lora_a")} | {"bias": i["weight"][:, 0].contiguous()}
        ),
        "no output": _kind(lambda i: {n: i[n][:0] for n in ("weight", "lora_b")}),
    },
    bytes=_bytes,
    flops=_flops,
    bench={
        "llama-3.2-1b q, o": _bench(2048, 2048),
        "llama-3.2-1b gate, up": _bench(2048, 8192),
        "llama-3.2-1b down": _bench(8192, 2048),
        "llama-3.2-1b down, adapters as x": _bench(8192, 2048, wide=0),
        "llama-3.2-1b q, o, few": _bench(2048, 2048, tokens=2048),
    },
    errors=[
        _mistake("weight is one column short", ValueError, "weight", lambda i: {"weight": i["weight"][:, :-1]}, True),
        _mistake("weight is a vector", ValueError, "weight", lambda i: {"weight": i["weight"][0]}),
        _mistake("lora_a is one column short", ValueError, "lora_a", lambda i: {"lora_a": i["lora_a"][:, :-1]}, True),
        _mistake("lora_a is a vector", ValueError, "lora_a", lambda i: {"lora_a": i["lora_a"][0]}),
        _mistake("lora_b is one row short", ValueError, "lora_b", lambda i: {"lora_b": i["lora_b"][1:]}, True),
        _mistake("lora_b has another rank", ValueError, "lora_b", lambda i: {"lora_b": i["lora_b"][:, 1:]}, True),
        _mistake("lora_b would broadcast", ValueError, "lora_b", lambda i: {"lora_b": i["lora_b"][:1]}),
        _mistake("bias is one short", ValueError, "bias", lambda i: {"bias": i["weight"][1:, 0]}, True),
        _mistake("bias would broadcast", ValueError, "bias", lambda i: {"bias": i["weight"][:1, 0]}),
        _mistake("x has no dimension", ValueError, "x", lambda i: {"x": i["x"][0, 0]}, True),
        _mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
        _mistake("weight is wider than x", TypeError, "weight", lambda i: {"weight": i["weight"].double()}),
        _mistake("bias is wider than x", TypeError, "bias", lambda i: {"bias": i["weight"][:, 0].double()}),
        _mistake(
            "adapters are narrower than x",
            TypeError,
            "lora_a",
            lambda i: {n: i[n].to(torch.bfloat16) for n in ("lora_a", "lora_b")},
        ),
        _mistake("adapters of two dtypes", TypeError, "lora_b", lambda i: {"lora_b": i["lora_b"].half()}),
    ],
)
