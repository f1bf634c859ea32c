"""A linear layer per group of rows."""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate, pairwise
from math import nan

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
    mistake,
    nbytes,
)
from conformance.specs._mistakes import one_column_short
from conformance.tolerances.bounds import Bound, exact, joined, product
from unsloth_ref.kernels import grouped_gemm


def drawn_sizes(rows: int, groups: int, seed: int) -> list[int]:
    """Uneven sizes of groups; with seed 1 every third group is empty, with seed 2 one group has all rows."""
    weights = torch.exp(torch.randn(groups, generator=Generator().manual_seed(seed), dtype=torch.float64))
    if seed == 1 and groups > 1:
        weights[::3] = 0
    if seed == 2:
        weights[torch.arange(groups) != groups // 2] = 0
    ends = (weights.cumsum(0) / weights.sum() * rows).round().long().tolist()
    return [end - begin for begin, end in pairwise([0, *ends])]


def _build(draw: Draw, tokens: int, experts: int, out: int, hidden: int) -> Inputs:
    x, weight = draw.filled(tokens, hidden), draw.matrix(experts * out, hidden)
    sizes = torch.tensor(drawn_sizes(tokens, experts, draw.case.seed))
    return {
        "x": x,
        "weight": weight.unflatten(0, (experts, out)),
        "group_sizes": sizes.to(draw.device) if draw.case.layout == "expanded" else draw.lay_out(sizes),
    }


def moderate(columns: int) -> int:
    """A number of columns in place of a large one, of which Triton's interpreter needs seconds for each."""
    return columns if columns <= 513 else 200 + columns % 131


def moderate_column_counts(budget: int) -> st.SearchStrategy[int]:
    """Numbers of columns, which are both lengths of sums and numbers of tiles."""
    edges = [size for size in (127, 128, 129, 255, 256, 257, 511, 512, 513) if size <= budget]
    small = st.integers(1, min(budget, 100))
    return st.one_of(small, st.sampled_from(edges)) if edges else small


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    """An even number of columns is that of x, an odd one that of y."""
    few, columns = 3 + columns % 29, moderate(columns)
    return rows, 2 + columns % 3, *((few, columns) if columns % 2 == 0 else (columns, few))


def _out(budget: int) -> st.SearchStrategy[int]:
    """Numbers of columns of y, mostly small, so that x can have many columns."""
    many = [size for size in (96, 129, 512, 1024) if size <= budget // 64]
    return st.sampled_from([1, 2, 8, 16, 33, 64, *many])


def groups_of(inputs: Inputs) -> Iterator[tuple[int, slice]]:
    """Each group and its rows."""
    ends = [0, *accumulate(inputs["group_sizes"].tolist())]
    return enumerate(slice(begin, end) for begin, end in pairwise(ends))


def _y_bound(call: Call) -> Bound:
    """x @ weight^T of each group; only the result is rounded."""
    x, weight = call.inputs["x"], call.inputs["weight"]
    parts = [product(exact(x[rows]), exact(weight[g].t()), call.elements) for g, rows in groups_of(call.inputs)]
    return joined(parts)


def _x_bound(call: Call) -> Bound:
    """dy @ weight of each group."""
    dy, weight = call.grad_outputs[0], call.inputs["weight"]
    parts = [product(exact(dy[rows]), exact(weight[g]), call.elements) for g, rows in groups_of(call.inputs)]
    return joined(parts)


def _weight_bound(call: Call) -> Bound:
    """dy^T @ x of each group."""
    dy, x = call.grad_outputs[0], call.inputs["x"]
    parts = [product(exact(dy[rows].t()), exact(x[rows]), call.elements) for _, rows in groups_of(call.inputs)]
    return joined(parts, torch.stack)


def _pick(inputs: Inputs, chosen: Sequence[int]) -> tuple[Inputs, Options, Tensor]:
    """A call with these groups alone, in this order."""
    spans = dict(groups_of(inputs))
    groups = torch.tensor(chosen, device=inputs["x"].device)
    rows = torch.cat([torch.arange(spans[g].start, spans[g].stop) for g in chosen]).to(groups.device)
    picked = {"x": inputs["x"][rows], "weight": inputs["weight"][groups], "group_sizes": inputs["group_sizes"][groups]}
    return picked, {}, rows


def _sized(sizes: Callable[[int, int], list[int]]) -> Change:
    """Other sizes of groups, from the numbers of rows and of groups."""
    return change_inputs(
        lambda i: {"group_sizes": i["group_sizes"].new_tensor(sizes(len(i["x"]), len(i["group_sizes"])))}
    )


def _nan_in(group: int) -> Change:
    """All rows and the matrix of one group NaN: a tile that reads into its neighbour is found."""

    def change(inputs: Inputs) -> Inputs:
        rows = dict(groups_of(inputs))[group]
        changed = {name: inputs[name].clone() for name in ("x", "weight")}
        changed["x"][rows] = changed["weight"][group] = nan
        return changed

    return change_inputs(change)


def _bytes(inputs: Inputs) -> tuple[int, int]:
    """Forward: x, weight and y. Backward: dy, weight and dx."""
    x, weight = inputs["x"], inputs["weight"]
    y = len(x) * weight.shape[1] * x.element_size()
    return nbytes(x, weight) + y, y + nbytes(weight, x)


def _flops(inputs: Inputs, options: Options, grads: Collection[str]) -> tuple[int, int]:
    """One product, and one per gradient."""
    work = 2 * len(inputs["x"]) * inputs["weight"][0].numel()
    return work, work * len({"x", "weight"}.intersection(grads))


def _bench(tokens: int, experts: int, out: int, hidden: int, *grads: str) -> dict[str, object]:
    return {"tokens": tokens, "experts": experts, "out": out, "hidden": hidden, "grads": grads or ("x",)}


spec = Spec(
    reference=grouped_gemm,
    drawing=Drawing(
        sizes={
            "tokens": lambda budget: st.integers(1, max(1, min(budget, 300))),
            "experts": lambda budget: st.sampled_from([1, 2, 3, 5, 8]),
            "out": _out,
            "hidden": moderate_column_counts,
        },
        build=_build,
        shape=_shape,
        counts={"tokens": 2**24, "experts": 1024},
    ),
    outputs=["y"],
    grads=["x", "weight"],
    budget=Budget(bounds={"y": _y_bound, "x": _x_bound, "weight": _weight_bound}),
    rowwise=["x"],
    independent=Parts(lambda inputs: len(inputs["weight"]), _pick, ["x"]),
    far=["x", "weight"],
    exact_laws={
        "x twice as large": ExactLaw({"x": 2.0}, {"y": 2.0, "weight": 2.0}),
        "weight negated": ExactLaw({"weight": -1.0}, {"y": -1.0, "x": -1.0}),
        "dy four times as large": ExactLaw({}, {"x": 4.0, "weight": 4.0}, grad_outputs=4.0),
    },
    memory=Memory(
        Case((("tokens", 16384), ("experts", 2), ("out", 64), ("hidden", 2048))),
        grads=["x", "weight"],
    ),
    argument_kinds={
        "sizes of 32 bits": change_inputs(lambda i: {"group_sizes": i["group_sizes"].int()}),
        "all rows in the first group": _sized(lambda rows, groups: [rows] + [0] * (groups - 1)),
        "all rows in the last group": _sized(lambda rows, groups: [0] * (groups - 1) + [rows]),
        "empty groups on both sides": _sized(lambda rows, groups: [0] * (groups - 2) + [rows, 0]),
        "NaN in the first group": _nan_in(0),
        "NaN in the second group": _nan_in(1),
    },
    special_values=[nan],  # infinity gives terms of both signs
    errors=[
        mistake("x is a vector", ValueError, "x", lambda i: {"x": i["x"][0]}, undefined=True),
        mistake("x is integer", TypeError, "x", lambda i: {n: i[n].long() for n in ("x", "weight")}),
        mistake("weight is a matrix", ValueError, "weight", lambda i: {"weight": i["weight"][0]}),
        one_column_short("weight"),
        mistake("there is no group", ValueError, "weight", lambda i: {"weight": i["weight"][:0]}, undefined=True),
        mistake("weight is wider than x", TypeError, "weight", lambda i: {"weight": i["weight"].double()}),
        mistake(
            "one size too few",
            ValueError,
            "group_sizes",
            lambda i: {"group_sizes": i["group_sizes"][1:]},
            undefined=True,
        ),
        mistake("sizes are floats", TypeError, "group_sizes", lambda i: {"group_sizes": i["group_sizes"].float()}),
        mistake(
            "sizes do not reach the last row",
            ValueError,
            "group_sizes",
            lambda i: {"group_sizes": i["group_sizes"] * 0},
            undefined=True,
            device="cpu",
        ),
        mistake(
            "sizes exceed the rows",
            ValueError,
            "group_sizes",
            lambda i: {"group_sizes": i["group_sizes"] + 1},
            undefined=True,
            device="cpu",
        ),
        ErrorCase(
            "a size is negative",
            _sized(lambda rows, groups: [rows + 1, -1] + [0] * (groups - 2)),
            ValueError,
            "group_sizes",
            undefined=True,
            device="cpu",
        ),
    ],
    speed=Speed(
        shapes={
            "qwen-3-moe gate, up": _bench(131072, 128, 1536, 2048),
            "qwen-3-moe down": _bench(131072, 128, 2048, 768),
            "qwen-3-moe down, trained": _bench(131072, 128, 2048, 768, "x", "weight"),
            "mixtral down": _bench(16384, 8, 4096, 14336),
        },
        bytes=_bytes,
        flops=_flops,
    ),
)
