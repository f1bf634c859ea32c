"""Rotary position embedding of queries and keys."""

from collections.abc import Callable, Sequence
from math import pi

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from conformance.case import Case, Draw
from conformance.promises import ExactLaw, Memory, Parts
from conformance.spec import (
    Budget,
    Call,
    Change,
    Drawing,
    ErrorCase,
    Inputs,
    Options,
    Spec,
    Speed,
    change_inputs,
    nbytes,
)
from conformance.tolerances.bounds import Terms
from unsloth_ref.kernels import rope

ROUNDINGS = 1  # each product, before their sum
ROTARY = (2, 4, 6, 16, 30, 32, 62, 64, 66, 80, 96, 128, 256)


def _build(
    draw: Draw, batch: int, heads: int, kv_heads: int, length: int, rotary: int, rest: int, table: int
) -> Inputs:
    """Angles of any size, one per two columns.

    With `table` rows they are in a table. Without one (table=0) there is a row per token, the same for all sequences;
    with an odd seed each sequence has its own.
    """
    generator = Generator().manual_seed(draw.case.seed)
    rows = (table,) if table else (batch if draw.case.seed % 2 else 1, length)
    angles = 2 * pi * torch.rand((*rows, rotary // 2), generator=generator, dtype=torch.float64)
    angles = torch.cat([angles, angles], -1)
    inputs = {
        "q": draw.filled(batch, heads, length, rotary + rest),
        "k": draw.filled(batch, kv_heads, length, rotary + rest),
    }
    inputs |= {"cos": draw.place(angles.cos()), "sin": draw.place(angles.sin())}
    if table:
        positions = torch.randint(table, (batch, length), generator=generator)
        positions.view(-1)[:2] = torch.tensor([table - 1, 0])[: positions.numel()]
        inputs["positions"] = draw.lay_out(positions)
    return inputs


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """Columns up to 256 are the width of a head, more make the sequence longer; heads in every ratio."""
    rotary = max(2, min(columns, 256) // 2 * 2)
    rest = columns % 2 if columns > 2 else 0
    return rows, 1 + columns % 4, 1 + columns % 3, 1 + min(columns // 64, 2), rotary, rest, 0


def _angles(call: Call, like: Tensor) -> tuple[Tensor, Tensor]:
    """|cos| and |sin| of each token; 1 and 0 for the columns that are not rotated."""
    cos, sin = call.inputs["cos"], call.inputs["sin"]
    if "positions" in call.inputs:
        cos, sin = cos[call.inputs["positions"]], sin[call.inputs["positions"]]
    rest = like.shape[-1] - cos.shape[-1]
    pad = torch.nn.functional.pad
    return pad(cos, (0, rest), value=1.0)[:, None].abs(), pad(sin, (0, rest))[:, None].abs()


def _halves_first(call: Call, x: Tensor) -> Tensor:
    """The columns in the order of halves: interleaved, the even ones of those that are rotated come first."""
    rotary = call.inputs["cos"].shape[-1]
    order = torch.arange(x.shape[-1], device=x.device)
    if call.options.get("interleaved"):
        order[:rotary] = torch.cat([order[0:rotary:2], order[1:rotary:2]])
    return order


def _other_half(values: Tensor, rotary: int) -> Tensor:
    """The values with the halves of the rotated columns exchanged."""
    first, second, rest = values.split([rotary // 2, rotary // 2, values.shape[-1] - rotary], -1)
    return torch.cat([second, first, rest], -1)


def _sum_of_two(first: Tensor, second: Tensor, order: Tensor) -> Terms:
    """The terms, whose columns come in this order."""
    back = order.argsort()
    return Terms((first + second)[..., back], root=torch.hypot(first, second)[..., back])


def _forward_terms(call: Call, x: Tensor) -> Terms:
    """A sum of two products: |x cos| + |x' sin|, where x' is the other half; in float32 if cos and sin are."""
    cos, sin = _angles(call, x)
    order = _halves_first(call, x)
    x = x.abs()[..., order]
    terms = _sum_of_two(x * cos, _other_half(x, call.inputs["cos"].shape[-1]) * sin, order)
    if call.inexact("cos", "sin"):
        return Terms(torch.zeros_like(terms.size), in_float32=terms.size)
    return terms


def _backward_terms(call: Call, dy: Tensor) -> Terms:
    """|dy cos| + |(dy sin)'|."""
    cos, sin = _angles(call, dy)
    order = _halves_first(call, dy)
    dy = dy.abs()[..., order]
    return _sum_of_two(dy * cos, _other_half(dy * sin, call.inputs["cos"].shape[-1]), order)


def _halves_that_differ(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """cos and sin whose second halves have other angles than the first."""
    return {**inputs, **{name: inputs[name].cumsum(-1).cos() for name in ("cos", "sin")}}, options


def _by_table(
    inputs: Inputs, options: Options, batch: int | None = None, dtype: torch.dtype = torch.int64
) -> tuple[Inputs, Options]:
    """A table of cos and sin, and the position of every token, the last positions first."""
    sequences, _, length, _ = inputs["q"].shape
    positions = torch.arange(length, device=inputs["q"].device, dtype=dtype).flip(0).expand(batch or sequences, length)
    return {**inputs, "cos": inputs["cos"][0], "sin": inputs["sin"][0], "positions": positions}, options


def _change(**changes: Callable[[Inputs], Tensor]) -> Change:
    """A change of these inputs, each computed from the valid inputs."""
    return change_inputs(lambda inputs: {name: change(inputs) for name, change in changes.items()})


def _sequences(inputs: Inputs, chosen: Sequence[int]) -> tuple[Inputs, Options, Tensor]:
    """A call with these sequences alone; cos, sin and positions are those of all sequences, or of each."""
    rows, batch = torch.tensor(chosen, device=inputs["q"].device), len(inputs["q"])
    table = "positions" in inputs
    own = ["q", "k", *(["positions"] if table else ["cos", "sin"])]
    return {n: t[rows] if n in own and len(t) == batch else t for n, t in inputs.items()}, {}, rows


def _wide_angles(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """Numbers that do not fit in 16 bits, as computed angles do not."""
    return {**inputs, **{name: inputs[name].float() * (1 + 2**-13) for name in ("cos", "sin")}}, options


def _bench(batch: int, length: int, width: int) -> dict[str, int]:
    return {
        "batch": batch, "heads": 32, "kv_heads": 8, "length": length, "rotary": width, "rest": 0, "table": 0,
    }  # fmt: skip


spec = Spec(
    reference=rope,
    drawing=Drawing(
        sizes={
            "batch": lambda budget: st.integers(1, max(1, min(budget, 3))),
            "heads": lambda budget: st.integers(1, max(1, min(budget, 9))),
            "kv_heads": lambda budget: st.integers(1, max(1, min(budget, 9))),
            "length": lambda budget: st.integers(1, max(1, min(budget, 2))),
            "rotary": lambda budget: st.sampled_from(ROTARY),
            "rest": lambda budget: st.sampled_from([0, 0, 1, 16, 33]),
            "table": lambda budget: st.sampled_from([0, 1, 7, 40]),
        },
        build=_build,
        options={"interleaved": [False, True]},
        shape=_shape,
        counts={"batch": 2**24, "length": 2**24},
    ),
    outputs=["rotated_q", "rotated_k"],
    grads=["q", "k"],
    budget=Budget(
        roundings=ROUNDINGS,
        terms={
            "rotated_q": lambda call: _forward_terms(call, call.inputs["q"]),
            "rotated_k": lambda call: _forward_terms(call, call.inputs["k"]),
            "q": lambda call: _backward_terms(call, call.grad_outputs[0]),
            "k": lambda call: _backward_terms(call, call.grad_outputs[1]),
        },
    ),
    rowwise=["q", "k"],
    independent=Parts(lambda inputs: len(inputs["q"]), _sequences, ["q", "k"]),
    exact_laws={
        "q and k twice as large": ExactLaw({"q": 2.0, "k": 2.0}, {"rotated_q": 2.0, "rotated_k": 2.0}),
        "q and k negated": ExactLaw({"q": -1.0, "k": -1.0}, {"rotated_q": -1.0, "rotated_k": -1.0}),
        "gradients four times as large": ExactLaw({}, {"q": 4.0, "k": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(
        Case(tuple(_bench(4, 4096, 128).items())),
        grads=["q", "k"],
    ),
    argument_kinds={
        "halves of cos and sin differ": _halves_that_differ,
        "each sequence has its own cos and sin": lambda i, o: (
            {**i, "cos": i["cos"].expand(len(i["q"]), -1, -1), "sin": i["sin"].expand(len(i["q"]), -1, -1)},
            o,
        ),
        "cos and sin in float32": _wide_angles,
        "a table": _by_table,
        "a table and one row of positions": lambda i, o: _by_table(i, o, batch=1),
        "positions of 32 bits": lambda i, o: _by_table(i, o, dtype=torch.int32),
        "queries alone": _change(k=lambda i: i["k"][:, :0]),
        "keys alone": _change(q=lambda i: i["q"][:, :0]),
        "heads that a kernel may take in several steps": _change(
            q=lambda i: i["q"].repeat(1, 40, 1, 1), k=lambda i: i["k"].repeat(1, 80, 1, 1)
        ),
    },
    errors=[
        ErrorCase("k has another length", _change(k=lambda i: i["k"][:, :, :0]), ValueError, "k", undefined=True),
        ErrorCase("k has another width", _change(k=lambda i: i["k"][..., :-1]), ValueError, "k", undefined=True),
        ErrorCase("q is a cube", _change(q=lambda i: i["q"][0]), ValueError, "q"),
        ErrorCase("k has another dtype", _change(k=lambda i: i["k"].double()), TypeError, "k"),
        ErrorCase("q is integer", _change(q=lambda i: i["q"].long(), k=lambda i: i["k"].long()), TypeError, "q"),
        ErrorCase(
            "cos is wider than q",
            _change(cos=lambda i: i["cos"].repeat(1, 1, 2), sin=lambda i: i["sin"].repeat(1, 1, 2)),
            ValueError,
            "cos",
            undefined=True,
        ),
        ErrorCase(
            "cos has an odd number of columns",
            _change(cos=lambda i: i["cos"][..., 1:], sin=lambda i: i["sin"][..., 1:]),
            ValueError,
            "cos",
            undefined=True,
        ),
        ErrorCase(
            "cos is of another length",
            _change(cos=lambda i: i["cos"].repeat(1, 3, 1), sin=lambda i: i["sin"].repeat(1, 3, 1)),
            ValueError,
            "cos",
            undefined=True,
        ),
        ErrorCase(
            "sin is narrower than cos", _change(sin=lambda i: i["sin"][..., :-2]), ValueError, "sin", undefined=True
        ),
        ErrorCase("cos is integer", _change(cos=lambda i: i["cos"].long()), TypeError, "cos"),
        ErrorCase("cos is a table without positions", _change(cos=lambda i: i["cos"][0]), ValueError, "cos"),
        ErrorCase("cos is trained", _change(cos=lambda i: i["cos"].clone().requires_grad_()), ValueError, "cos"),
        ErrorCase(
            "a position is the table's length",
            lambda i, o: _change(positions=lambda j: j["positions"] + 1)(*_by_table(i, o)),
            ValueError,
            "positions",
            undefined=True,
            device="cpu",
        ),
        ErrorCase(
            "a position is negative",
            lambda i, o: _change(positions=lambda j: j["positions"] - 1 - j["positions"].max())(*_by_table(i, o)),
            ValueError,
            "positions",
            device="cpu",
        ),
        ErrorCase(
            "positions are floats",
            lambda i, o: _change(positions=lambda j: j["positions"].float())(*_by_table(i, o)),
            TypeError,
            "positions",
            undefined=True,
        ),
        ErrorCase(
            "positions are too many",
            lambda i, o: _change(positions=lambda j: j["positions"].repeat(1, 3))(*_by_table(i, o)),
            ValueError,
            "positions",
            undefined=True,
        ),
    ],
    speed=Speed(
        shapes={
            "llama-3.1-8b": _bench(4, 2048, 128),
            "llama-3.2-1b": _bench(4, 2048, 64),
            "long": _bench(1, 16384, 128),
            "glm-4-9b": _bench(4, 2048, 64) | {"kv_heads": 2, "rest": 64, "interleaved": True},
        },
        bytes=lambda inputs: (
            2 * nbytes(inputs["q"], inputs["k"]) + nbytes(inputs["cos"], inputs["sin"]),
            2 * nbytes(inputs["q"], inputs["k"]) + nbytes(inputs["cos"], inputs["sin"]),
        ),
        layout="transposed",  # token by token, as projections produce them
    ),
)
