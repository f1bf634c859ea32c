"""What leaves a trace in a definition's results and need not be in a kernel's: casts, ties, and replaced operators."""

import warnings

import pytest
import torch

from conformance import backends
from conformance.case import DTYPES
from conformance.operations import Source, specs
from conformance.properties import PROPERTIES
from conformance.running.search import reproduce
from conformance.trial import Trial
from tests.judge.strangers.test_strangers import HERE, SOURCES, here, judged, path


@here
def test_a_nan_need_not_reach_what_does_not_depend_on_it() -> None:
    """Although a cast to float32 within the definition leaves a trace of the number."""
    source = Source(f"{HERE}.references:there_and_back", "x=randn(T=8,H=32) shift=randn(T)")
    ((op, spec),) = specs(source).items()
    trial = Trial(spec, backends.load(path("unmoved"), "cpu", source).functions[op], torch.float32, "cpu")
    result = reproduce(trial, PROPERTIES["special_values"], spec.parse("T=5 H=130 fill=graded"), "float32")
    assert result.verdict == "pass", result.message


@here
def test_an_operator_of_torch_that_a_library_replaces_is_found() -> None:
    """It would change what the reference computes, too."""
    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("silu", torch.sigmoid, "CPU")
        result = judged(SOURCES["shifted"], "shifted_by_copies", "process_state", "float32")
    assert "operators of torch" in str(result.message)


@here
@pytest.mark.parametrize(
    ("dtype", "case"),
    [("float32", "x_0=3 x_1=114 fill=ones"), ("float16", "x_0=3 x_1=114 fill=zeros"), ("bfloat16", "x_0=257 x_1=257")],
)
def test_any_of_equal_numbers_may_be_chosen(dtype: str, case: str) -> None:
    """Its gradient is then where the definition has 0."""
    source = Source(f"{HERE}.references:largest", "x=randn(16,8) k=2")
    ((op, spec),) = specs(source).items()
    kernel = backends.load(path("largest_the_last_of_equals"), "cpu", source).functions[op]
    trial = Trial(spec, kernel, DTYPES[dtype], "cpu")
    result = reproduce(trial, PROPERTIES["one_at_a_time"], spec.parse(case), dtype)
    assert result.verdict == "pass", result.message
