"""The text and the values of an example call."""

import math
from typing import Any

import pytest
import torch

from conformance.case import LAYOUTS, Case, Draw
from conformance.counts import Counts, rule
from conformance.declarations import SpecError
from conformance.learning.example import Follows, TensorArgument, of_call, read, value_of
from conformance.learning.options import beside, others


def test_equal_numbers_are_one_size_unless_they_are_named() -> None:
    found = read("x=randn(64,128) weight=randn(128) y=randn(T=64,2*H) z=randn(H=32)")
    assert found.sizes == {"T": 64, "H": 32, "x_0": 64, "x_1": 128}
    assert found.arguments["x"][0].shape == ((1, "x_0"), (1, "x_1"))
    assert found.arguments["weight"][0].shape == ((1, "x_1"),)
    assert [value_of(size, found.sizes) for size in found.arguments["y"][0].shape] == [64, 64]


def test_options_and_their_alternatives() -> None:
    found = read("x=randn(4, 1) eps=1e-6|1e-5 mode=mean|sum flag=True shape=(2, 3) bias=None|randn(4) n=T y=randn(T=4)")
    assert found.arguments["eps"] == (1e-6, 1e-5)
    assert found.arguments["mode"] == ("mean", "sum")
    assert found.arguments["shape"] == ((2, 3),)
    assert found.arguments["bias"][0] is None
    assert found.arguments["n"] == (Follows((1, "T")),)
    assert found.arguments["x"][0].shape[1] == 1  # a size of 1 broadcasts: it does not vary


def test_integers_have_a_range() -> None:
    found = read("labels=randint(V=1000,T=64) where=randint(-1,5,T,dtype=int32) keep=mask(T)")
    assert found.arguments["labels"] == (TensorArgument("randint", ((1, "T"),), torch.int64, 0, (1, "V")),)
    assert found.arguments["where"] == (TensorArgument("randint", ((1, "T"),), torch.int32, -1, 5),)
    assert found.arguments["keep"][0].dtype == torch.bool


def test_integers_may_have_one_number_more() -> None:
    (labels,) = read("labels=randint(V=9,T=50,or=-100,dtype=int32) x=randn(T,V)").arguments["labels"]
    assert (labels.low, labels.high, labels.other, labels.dtype) == (0, (1, "V"), -100, torch.int32)
    assert str(labels) == "randint(0, V, T, dtype=int32, or=-100)"
    assert read(f"y={labels} x=randn(T=3,V=4)").arguments["y"][0].other == -100
    found = of_call({"labels": torch.tensor([3, -100, 8, 2]), "x": torch.randn(4), "at": torch.tensor([-2, -1, 5])})
    assert [(t.low, t.high, t.other) for (t,) in (found.arguments["labels"], found.arguments["at"])] == [
        (2, 9, -100), (-2, 6, None),
    ]  # fmt: skip


def test_integers_of_some_fills_are_all_equal_or_all_but_one() -> None:
    for fill, values in (("lowest", [{0}, {False}, {-100}]), ("highest", [{8}, {True}, {8}])):
        draw = Draw(Case((), fill=fill), torch.float16, "cpu")
        labels = [draw.tensor("randint", 40, high=9, other=other) for other in (None, -100)]
        tensors = (labels[0], draw.tensor("mask", 5, 8), labels[1])
        assert [set(t.flatten().tolist()) for t in tensors] == values
        assert draw.tensor("randn", 40).unique().numel() > 30
    for fill, usual, one in (("one_lowest", 8, 0), ("one_highest", 0, 8)):
        draw = Draw(Case((), fill=fill), torch.float16, "cpu")
        labels = draw.tensor("randint", 40, high=9).tolist()
        assert (labels.count(usual), labels.count(one)) == (39, 1)
        assert draw.tensor("mask", 5, 8).sum() == (39 if fill == "one_lowest" else 1)
        assert not draw.tensor("mask", 0).numel()
    drawn = Draw(Case(()), torch.float16, "cpu").tensor("randint", 400, high=9, other=-100)
    assert set(drawn.tolist()) == {*range(9), -100}
    assert 40 < int((drawn == -100).sum()) < 120


def test_offsets_divide_a_size_into_parts() -> None:
    (starts,) = read("starts=offsets(T,S=9,dtype=int32) x=randn(T=40,H=3)").arguments["starts"]
    assert starts == TensorArgument("offsets", ((1, "S"),), torch.int32, 0, (1, "T"))
    assert str(starts) == "offsets(T, S, dtype=int32)"
    found = of_call({"starts": torch.tensor([0, 3, 3, 7]), "x": torch.randn(7, 5), "at": torch.tensor([0, 2, 6])})
    assert [one.kind for (one,) in found.arguments.values()] == ["offsets", "randn", "randint"]
    assert value_of(found.arguments["starts"][0].high, found.sizes) == 7
    drawn = [Draw(Case((), seed=seed), torch.float16, "cpu").tensor("offsets", 9, high=40).diff() for seed in range(9)]
    assert all(int(one.sum()) == 40 and (one == 0).any() and (one >= 0).all() for one in drawn)
    for place in (0, -1):
        assert any(one[place] > 0 for one in drawn)
    for fill, values in (("lowest", [0, 0, 0, 4]), ("highest", [0, 4, 4, 4])):
        assert Draw(Case((), fill=fill), torch.float16, "cpu").tensor("offsets", 4, high=4).tolist() == values
    for layout in LAYOUTS:
        starts = Draw(Case((), layout=layout), torch.float16, "cpu").tensor("offsets", 4, high=4)
        assert (int(starts[0]), int(starts[-1])) == (0, 4)
    with pytest.raises(ValueError, match="got 1 of them; allowed: at least 2"):
        Draw(Case(()), torch.float16, "cpu").tensor("offsets", 1, high=4)


@pytest.mark.parametrize("value", [0.5, 1.0, -2.0, 0.1, 0.9, 1e-6, 3.5e4])
def test_a_number_beside_a_float_changes_by_nearly_a_unit_roundoff_in_16_bits(value: float) -> None:
    near = beside(value)
    assert 0 < abs(near / value - 1) < 1 / 64
    for dtype in (torch.bfloat16, torch.float16) if 2**-14 < abs(value) < 6e4 else (torch.bfloat16,):
        exponent, rounded = math.frexp(abs(near))[1], abs(float(torch.tensor(near, dtype=dtype)))
        assert 0.8 < (abs(near) - rounded) / 2.0 ** (exponent - 1) / (torch.finfo(dtype).eps / 2) < 1


def test_other_values_have_no_number_beside_them() -> None:
    assert [beside(value) for value in (2, True, "mean", 0.0, math.inf, (1, 2))] == [None] * 6
    assert beside((0.5, 3, 1.0)) == (beside(0.5), 3, beside(1.0))


@pytest.mark.parametrize(
    ("known", "values"),
    [
        ([1e-6], [beside(0.03), beside(1e-6)]),
        ([-30.0], [beside(-15.0), beside(-30.0)]),
        ([(1.0, 2)], [(beside(0.5), 2), (beside(1.0), 2)]),
        ([0], [1, 0]),
        ([4], [5, 8, 2]),
        ([-1], []),
        ([2, 3], []),
        ([True], [False]),
        ([(1, 3)], [(2, 4), (2, 6)]),
        ([(1, "same")], []),
        (["mean"], []),
        ([0.0], [beside(0.1)]),
        ([0.0, 0.5], [beside(0.5), beside(0.1)]),
    ],
)
def test_values_to_add_to_the_known_ones_of_an_option(known: list[Any], values: list[Any]) -> None:
    assert [*others(known)] == values


def test_a_size_after_two_equals_signs_never_varies() -> None:
    found = read("x=randn(T=64,D==128) weight=randn(D) y=randn(2*D,==9) z=randn(9,128) width=D labels=randint(V==5,T)")
    assert found.sizes == {"T": 64, "z_1": 128}
    shapes = [found.arguments[name][0].shape for name in ("x", "weight", "y", "z")]
    assert shapes == [((1, "T"), 128), (128,), (256, 9), (9, (1, "z_1"))]
    assert (found.arguments["width"], found.arguments["labels"][0].high) == ((Follows(128),), 5)


def test_a_product_has_its_number() -> None:
    found = read("x=randn(B=2,4*Q=16) y=randn(Q)")
    assert found.sizes == {"B": 2, "Q": 4}
    assert found.arguments["x"][0].shape[1] == (4, "Q")


def test_lists_of_tensors() -> None:
    assert [one.kind for one in read("xs=[randn(4,8),rand(4)]").arguments["xs"][0]] == ["randn", "rand"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "got 'x'; allowed: NAME=VALUE"),
        ("x=rand_n(3)", r"got x=rand_n\(...\); allowed: randn"),
        ("x=randn(T)", "got 'T' as a size of x; allowed: a number, NAME=NUMBER"),
        ("x=randn(3,dtype=int3)", "got x with dtype=int3"),
        ("T=3 x=randn(T=4)", "T is an argument and a size"),
        ("x=randn(T=4) y=randn(T=5)", "got T=4 and T=5; allowed: one number"),
        ("x=randn(T==4) y=randn(T=5)", "got T=4 and T=5; allowed: one number"),
        ("x=randn(T==4) y=randn(T==5)", "got T==4 and T==5; allowed: one number"),
        ("x=randn(2*T==4)", r"got '2\*T==4' as a size of x; allowed: a number, NAME=NUMBER, NAME==NUMBER"),
        ("x=randn(4*Q=18)", r"got 4\*Q=18; allowed: a multiple of 4"),
        ("x=offsets(3)", r"got x=offsets\(3\); allowed: offsets\(NUMBER, SIZE, ...\)"),
        ("x=randn(3,or=-1)", r"got x with or=-1; allowed: a number, in randint"),
        ("x=randint(3,4,or=x)", r"got x with or=x; allowed: a number, in randint"),
        ("x=randn(-4,5)", "got -4 as a size of x; allowed: 0 or more"),
        ("x=randn(4) x=randn(5)", "got x twice; allowed: once, with | between several values"),
        ("x=randn(seed=4)", "got seed as the name of a size; allowed: others than fill, layout, seed"),
        ("x=3+", r"got x=3\+; allowed: a tensor such as"),
        ("nowhere.py", "there is no such file"),
    ],
)
def test_a_mistake_is_named(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read(text)


def test_numbers_that_are_not_real_are_refused() -> None:
    with pytest.raises(SpecError, match=r"got x of torch\.complex64"):
        of_call({"x": torch.ones(3, dtype=torch.complex64)})


def test_a_real_call_tells_kinds_and_dtypes() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    found = of_call({"x": x, "p": x.softmax(-1), "table": torch.ones(5).double(), "at": torch.tensor([3, 7]), "eps": 1})
    assert found.grads == ("x", "p")
    kinds = {name: value[0].kind for name, value in found.arguments.items() if name != "eps"}
    assert kinds == {"x": "randn", "p": "probabilities", "table": "ones", "at": "randint"}
    assert (found.arguments["at"][0].low, found.arguments["at"][0].high) == (3, 8)
    assert found.arguments["table"][0].dtype == torch.float64


@pytest.mark.parametrize(
    ("accepted", "words"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], "any"),
        ([0, 2, 4, 6, 8], "multiples of 2"),
        ([0, 3, 6], "multiples of 3"),  # 9 was not tried
        ([0, 3], "multiples of 3 to 3"),
        ([3, 4, 5, 6, 7, 8], "from 3"),
        ([1, 2, 4, 8], "one of 1, 2, 4, 8"),
        ([4], "4"),
        ([0, 1, 4], "4"),  # as a kernel may refuse what operators broadcast
        ([1, 2, 3, 4], "to 4"),
    ],
)
def test_the_rule_of_the_accepted_sizes(accepted: list[int], words: str) -> None:
    counts = rule(4, accepted, range(9))
    assert isinstance(counts, Counts)
    assert str(counts) == words
