"""A printed case can be parsed, and its tensors have the same elements in every layout."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.case import FILLS, LAYOUTS, Case
from conformance.spec import Spec
from conformance.specs import specs

OPS = tuple(specs())


@st.composite
def specs_with_cases(draw: st.DrawFn) -> tuple[Spec, Case]:
    """A spec and one of its cases in some layout."""
    spec = specs()[draw(st.sampled_from(OPS))]
    case = draw(spec.cases(2**12))
    layout, seed = draw(st.sampled_from(sorted(LAYOUTS))), draw(st.integers(0, 2**31))
    return spec, Case(case.sizes, case.options, case.fill, layout, seed)


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(specs_with_cases())
def test_parse_reverses_str(drawn: tuple[Spec, Case]) -> None:
    spec, case = drawn
    assert spec.parse(str(case)) == case


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rows=1", "missing: hidden"),
        ("rows=1 hidden=2 depth=3", "got 'depth=3'; allowed: .*rows, hidden"),
        ("rows=1 hidden", "got 'hidden'; allowed: name=value"),
    ],
)
def test_parse_refuses_an_invalid_case(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specs()["rms_norm"].parse(line)


def test_options_may_have_the_names_of_a_case_and_values_that_are_no_literals() -> None:
    options = {"seed": [0, 7], "kind": [torch.float32, torch.int8], "of": ["", "two words"]}
    case = Case((("rows", 3),), (("seed", 7), ("kind", torch.int8), ("of", "two words")), seed=2)
    assert Case.parse(str(case), ("rows",), options) == case


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"expanded"}))
def test_a_layout_does_not_change_elements(op: str, layout: str) -> None:
    spec = specs()[op]
    case = spec.parse(" ".join(f"{name}=5" for name in spec.drawing.sizes))
    for name, contiguous in spec.inputs(case, torch.float16, "cpu").items():
        laid_out = spec.inputs(Case(case.sizes, layout=layout), torch.float16, "cpu")[name]
        assert laid_out.equal(contiguous)


def test_a_long_sum_has_no_equal_terms() -> None:
    assert LAYOUTS["expanded"](torch.randn(512, 2)).stride() == (0, 1)
    many = torch.randn(513, 2)
    assert LAYOUTS["expanded"](many) is many


@pytest.mark.parametrize("fill", FILLS)
def test_a_seed_determines_the_elements(fill: str) -> None:
    def inputs(seed: int) -> dict[str, Any]:
        return specs()["swiglu"].inputs(Case((("rows", 3), ("hidden", 9)), fill=fill, seed=seed), torch.float32, "cpu")

    assert all(inputs(1)[name].equal(inputs(1)[name]) for name in ("gate", "up"))
    if fill not in ("ones", "zeros"):
        assert not inputs(1)["gate"].equal(inputs(2)["gate"])
        assert not inputs(1)["gate"].equal(inputs(1)["up"])
