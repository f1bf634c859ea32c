"""A case survives being printed, and its tensors are the same wherever and however they lie."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.case import FILLS, LAYOUTS, Case
from conformance.spec import Spec, specs

OPS = tuple(specs())


@st.composite
def specs_with_cases(draw: st.DrawFn) -> tuple[Spec, Case]:
    """A spec and one of its cases, in any layout."""
    spec = specs()[draw(st.sampled_from(OPS))]
    case = draw(spec.cases(2**12))
    layout, seed = draw(st.sampled_from(sorted(LAYOUTS))), draw(st.integers(0, 2**31))
    return spec, Case(case.sizes, case.options, case.fill, layout, seed)


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(specs_with_cases())
def test_parse_reads_what_str_writes(drawn: tuple[Spec, Case]) -> None:
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
def test_parse_refuses_what_is_no_case(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specs()["rms_norm"].parse(line)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"expanded"}))
def test_a_layout_moves_elements_and_changes_none(op: str, layout: str) -> None:
    spec = specs()[op]
    case = spec.parse(" ".join(f"{name}=5" for name in spec.sizes))
    for name, plain in spec.inputs(case, torch.float16, "cpu").items():
        laid_out = spec.inputs(Case(case.sizes, layout=layout), torch.float16, "cpu")[name]
        assert laid_out.equal(plain)


@pytest.mark.parametrize("fill", FILLS)
def test_a_seed_repeats_its_elements(fill: str) -> None:
    def rows(seed: int) -> dict[str, Any]:
        return specs()["swiglu"].inputs(Case((("rows", 3), ("hidden", 9)), fill=fill, seed=seed), torch.float32, "cpu")

    assert all(rows(1)[name].equal(rows(1)[name]) for name in ("gate", "up"))
    if fill not in ("ones", "zeros"):
        assert not rows(1)["gate"].equal(rows(2)["gate"])
        assert not rows(1)["gate"].equal(rows(1)["up"])
