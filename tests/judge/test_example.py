"""The text and the values of an example call."""

import pytest
import torch

from conformance.counts import Counts, rule
from conformance.declarations import SpecError
from conformance.example import Follows, TensorArgument, of_call, read, value_of


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
        ([3, 4, 5, 6, 7, 8], "from 3"),
        ([1, 2, 4, 8], "one of 1, 2, 4, 8"),
        ([4], "4"),
        ([1, 2, 3, 4], "to 4"),
    ],
)
def test_the_rule_of_the_accepted_sizes(accepted: list[int], words: str) -> None:
    counts = rule(4, accepted, range(9))
    assert isinstance(counts, Counts)
    assert str(counts) == words
