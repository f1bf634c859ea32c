"""Operators of tensors in Triton's interpreter compute what Triton does, with an analysis of their types or without."""

import importlib
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from conformance import backends
from conformance.interpreter.speed import _called_directly, _OncePerLaunch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is selected for the whole process")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The interpreter with the functions that Triton gives it."""
    backends.load("fast", "cpu")
    module: Any = importlib.import_module("triton.runtime.interpreter")
    assert isinstance(module._patch_lang, _OncePerLaunch)
    monkeypatch.setattr(module, "_patch_lang", module._patch_lang._patch)
    monkeypatch.setattr(module, "_patch_attr", module._patch_attr.__wrapped__)
    return module


@triton.jit
def operators_kernel(x_ptr, other_ptr, y_ptr, number, NUMBER: tl.constexpr, COLUMN: tl.constexpr, SMALL: tl.constexpr):
    """Operators of two vectors, or of a vector and a column; and of numbers on both sides."""
    place = tl.arange(0, 16)
    places = place[:, None] * 16 + place[None, :]
    x, other = tl.load(x_ptr + place), tl.load(other_ptr + place)
    other = other[:, None] if COLUMN else other
    for turn in range(3):  # what the first turn learns, the others use
        turn_ptr = y_ptr + turn * 2048
        tl.store(turn_ptr + places, x + other - 3)
        tl.store(turn_ptr + 256 + places, 2 * x * other)
        tl.store(turn_ptr + 512 + places, (x < other) & (x >= NUMBER) | (other == x))
        tl.store(turn_ptr + 768 + places, tl.where((x != NUMBER) ^ (other <= 1), x, other))
        tl.store(turn_ptr + 1024 + places, tl.where(other > number, x * number, 0) - x)
        tl.store(turn_ptr + 1280 + places, tl.where(x > other, 1.5, -2) / (1 + number - 0.5 * x))
        tl.store(turn_ptr + 1536 + places, 1 - (0.25 + other))
        if SMALL:  # a number that Triton takes for a float64
            tl.store(turn_ptr + 1792 + places, (2.0**-130 * x + other) * 2.0**100)


DTYPES_OF_OPERANDS = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bfloat16, torch.int8)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("other", DTYPES_OF_OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES_OF_OPERANDS)
def test_operators_whose_types_are_known_give_the_same_bits(
    interpreter: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, other: torch.dtype, column: bool
) -> None:
    launched: Any = operators_kernel
    draw = 4 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    draw[0, ::5] = draw[1, ::5]
    if dtype.is_floating_point:
        draw[0, 1:4] = torch.tensor([math.nan, math.inf, -0.0])
    operands, wanted, found = (draw[0].to(dtype), draw[1].to(other)), *torch.zeros(2, 3, 8, 256, dtype=torch.float64)
    launched[(1,)](*operands, wanted, 3, NUMBER=2, COLUMN=column, SMALL=True)
    monkeypatch.setattr(interpreter, "_patch_attr", _called_directly(interpreter))
    launched[(1,)](*operands, found, 3, NUMBER=2, COLUMN=column, SMALL=True)
    assert torch.equal(found.view(torch.int64), wanted.view(torch.int64))
    assert wanted.count_nonzero() > wanted.numel() / 2


def test_types_are_analysed_at_the_first_use_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.load("fast", "cpu")
    launched: Any = operators_kernel
    operands = torch.ones(16), torch.full((16,), 2, dtype=torch.int32), torch.zeros(3, 8, 256, dtype=torch.float64)
    launched[(1,)](*operands, 3, NUMBER=2, COLUMN=True, SMALL=False)
    semantic: Any = importlib.import_module("triton.language.semantic").TritonSemantic
    for name in ("add", "sub", "mul", "truediv", "less_than", "greater_equal", "equal", "and_", "or_", "where"):
        monkeypatch.delattr(semantic, name)
    monkeypatch.delattr(semantic, "expand_dims")
    launched[(1,)](*operands, 3, NUMBER=2, COLUMN=True, SMALL=False)


@triton.jit
def unfit_kernel(x_ptr, UNFIT: tl.constexpr):
    """Combines a block of 16 elements and one of 8."""
    x, y = tl.arange(0, 16), tl.arange(0, 8)
    if UNFIT == 0:
        tl.store(x_ptr + x, x + y)
    elif UNFIT == 1:
        tl.store(x_ptr + x + y, x)
    else:
        tl.store(x_ptr + x, tl.where(x > 3, x, y))


def test_blocks_that_do_not_fit_are_refused() -> None:
    backends.load("fast", "cpu")
    launched: Any = unfit_kernel
    for _ in range(2):
        for unfit in range(3):
            with pytest.raises(InterpreterError, match="incompatible dimensions"):
                launched[(1,)](torch.zeros(64), UNFIT=unfit)
