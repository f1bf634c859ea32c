"""Kernels that Triton's interpreter runs are noticed; patching it does not change its results."""

import importlib
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from conformance import backends
from conformance.interpreter import reads
from conformance.interpreter.speed import (
    _broadcast_if_shapes_differ,
    _checked_if_debugging,
    _converted_if_types_differ,
    _Memoised,
    _OncePerLaunch,
    _shared_shapes,
    _shared_types,
    _with_indices,
)
from conformance.properties import PROPERTIES
from conformance.specs import swiglu
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial
from unsloth_ref import kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is selected for the whole process")

PATCHED = {
    "broadcast_impl_value": _broadcast_if_shapes_differ,
    "binary_op_type_checking_impl": _converted_if_types_differ,
    "binary_op_sanitize_overflow_impl": _checked_if_debugging,
}


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The interpreter with Triton's original functions, which loading a backend has patched."""
    backends.load("fast", "cpu")
    module: Any = importlib.import_module("triton.runtime.interpreter")
    assert isinstance(module._patch_lang, _OncePerLaunch)
    assert isinstance(module._get_np_dtype, _Memoised)
    monkeypatch.setattr(module, "_patch_lang", module._patch_lang._patch)
    monkeypatch.setattr(module, "_patch_attr", module._patch_attr.__wrapped__)
    monkeypatch.setattr(module, "_get_np_dtype", module._get_np_dtype._numpy_dtype)
    for kind in (tl.core.block_type, tl.core.tensor):
        monkeypatch.setattr(kind, "__init__", kind.__init__.__wrapped__)
    for name in PATCHED:
        monkeypatch.setattr(tl.semantic.TritonSemantic, name, getattr(tl.semantic.TritonSemantic, name).__wrapped__)
    return module


def loss_and_gradient() -> tuple[Tensor, Tensor]:
    """Results of a kernel that calls device functions, its own and those of `triton.language.standard`."""
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = backends.load("fast", "cpu").functions["cross_entropy"](logits, torch.arange(6))
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_an_array_of_one_number_is_an_integer() -> None:
    """Such as the bound of a loop; Triton 3.6 leaves it to NumPy, which refuses one with dimensions since 2.4."""
    changed: dict[str, Any] = {}
    scope = SimpleNamespace(set_attr=lambda owner, name, value: changed.update({name: value}))
    _with_indices(lambda tensor, scope: None)(object, scope)
    one = SimpleNamespace(handle=SimpleNamespace(data=np.array([3], dtype=np.int32)))
    assert changed["__index__"](one) == 3


def test_fewer_patches_give_the_same_bits(interpreter: Any) -> None:
    original, calls = interpreter._patch_lang, []

    def counted(function: Any) -> Any:
        calls.append(function)
        return original(function)

    interpreter._patch_lang = counted
    wanted, many = loss_and_gradient(), len(calls)
    calls.clear()
    interpreter._patch_lang = _OncePerLaunch(counted, interpreter._LangPatchScope)
    found = loss_and_gradient()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert len(calls) < many / 4


def test_the_modules_are_searched_at_the_first_launch_alone(interpreter: Any) -> None:
    searches = []

    def counted(function: Any) -> Any:
        searches.append(function)
        return original(function)

    original, interpreter._patch_lang = interpreter._patch_lang, _OncePerLaunch(counted, interpreter._LangPatchScope)
    before = {name: vars(module).copy() for name, module in sys.modules.items() if name.startswith("triton.language")}
    first, many = loss_and_gradient(), len(searches)
    again = loss_and_gradient()
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len(searches) == many
    assert all(vars(sys.modules[name]) == values for name, values in before.items())


def test_the_language_is_restored_when_the_launch_ends(interpreter: Any) -> None:
    language, gated = (importlib.import_module(name) for name in ("triton.language", "unsloth_fast.kernels._gated"))
    kernel, before, once = (
        gated.gated_forward_kernel.fn,
        language.load,
        _OncePerLaunch(interpreter._patch_lang, interpreter._LangPatchScope),
    )
    for _ in range(2):
        launch, device_call = once(kernel), once(kernel)
        assert language.load is not before
        device_call.restore()
        assert language.load is not before
        launch.restore()
        assert language.load is before


def test_fewer_tables_give_the_same_dtypes(interpreter: Any) -> None:
    language: Any = importlib.import_module("triton.language")
    scalars = [getattr(language, name) for name in ("int1", "int32", "uint16", "int64", "bfloat16", "float32")]
    scalars += [language.pointer_type(scalar) for scalar in scalars]
    calls = []

    def counted(dtype: Any) -> Any:
        calls.append(dtype)
        return interpreter._get_np_dtype(dtype)

    memoised = _Memoised(counted)
    for dtype in (*scalars, *(language.block_type(scalar, [4, 8]) for scalar in scalars)):
        assert memoised(dtype) == interpreter._get_np_dtype(dtype)
    assert calls == scalars


def test_a_function_that_is_replaced_between_launches_is_patched(
    interpreter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = _OncePerLaunch(interpreter._patch_lang, interpreter._LangPatchScope)
    once(doubling_kernel.fn).restore()
    monkeypatch.setattr(tl, "load", tl.store)
    launch, patched = once(doubling_kernel.fn), tl.load
    launch.restore()
    assert patched is not tl.load is tl.store


def test_shared_attributes_give_the_same_bits(interpreter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = loss_and_gradient()
    monkeypatch.setattr(tl.core.block_type, "__init__", _shared_types(tl.core.block_type.__init__))
    monkeypatch.setattr(tl.core.tensor, "__init__", _shared_shapes(tl.core.tensor.__init__))
    for name, patched in PATCHED.items():
        monkeypatch.setattr(tl.semantic.TritonSemantic, name, patched(getattr(tl.semantic.TritonSemantic, name)))
    assert all(torch.equal(one, other) for one, other in zip(loss_and_gradient(), wanted, strict=True))
    first, second = (tl.core.tensor(handle, tl.core.block_type(tl.float32, [4, 8])) for handle in (1, 2))
    assert first.shape is second.shape and first.type == second.type
    assert (first.handle, second.handle) == (1, 2)
    other = tl.core.tensor(3, tl.core.block_type(tl.int32, [4, 8]))
    assert other.type != first.type and other.dtype == tl.int32


@triton.jit
def arithmetic_kernel(x_ptr, other_ptr, y_ptr, OPERATION: tl.constexpr):
    """One operation of 16 pairs of numbers."""
    place = tl.arange(0, 16)
    x, other = tl.load(x_ptr + place), tl.load(other_ptr + place)
    if OPERATION == "+":
        y = x + other
    elif OPERATION == "-":
        y = x - other
    elif OPERATION == "*":
        y = x * other
    else:
        y = x / other
    tl.store(y_ptr + place, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int32, torch.int8])
@pytest.mark.parametrize("operation", ["+", "-", "*", "/"])
def test_operands_of_one_type_give_the_same_bits(
    interpreter: ModuleType, monkeypatch: pytest.MonkeyPatch, operation: str, dtype: torch.dtype
) -> None:
    launched: Any = arithmetic_kernel
    operands = (30 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    wanted, found = torch.zeros(2, 16)
    launched[(1,)](*operands, wanted, OPERATION=operation)
    for name, patched in PATCHED.items():
        monkeypatch.setattr(tl.semantic.TritonSemantic, name, patched(getattr(tl.semantic.TritonSemantic, name)))
    launched[(1,)](*operands, found, OPERATION=operation)
    assert torch.equal(found, wanted) and wanted.count_nonzero() > 8


def test_an_overflow_is_found_in_debugging_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.load("fast", "cpu")
    module: Any = importlib.import_module("triton.runtime.interpreter")
    launched: Any = arithmetic_kernel
    x, y = torch.full((16,), 2**31 - 1, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    launched[(1,)](x, torch.ones_like(x), y, OPERATION="+")
    assert y.eq(-(2**31)).all()
    monkeypatch.setattr(module.interpreter_builder, "options", module.InterpreterOptions(debug=True))
    with pytest.raises(InterpreterError, match="AssertionError"):
        launched[(1,)](x, torch.ones_like(x), y, OPERATION="+")


@pytest.mark.parametrize(("shape", "error"), [([4.0], TypeError), ([3], ValueError), ([], TypeError)])
def test_a_wrong_shape_is_refused_after_a_right_one(shape: list[Any], error: type[Exception]) -> None:
    backends.load("fast", "cpu")
    tl.core.block_type(tl.float32, [4])
    for _ in range(2):
        with pytest.raises(error):
            tl.core.block_type(tl.float32, shape)


def truncated_to_bfloat16(gate: Tensor, up: Tensor) -> Tensor:
    y = kernels.swiglu(gate.float(), up.float())
    return (y.view(torch.int32) & -(2**16)).view(torch.float32).to(gate.dtype)


def test_truncation_is_allowed_where_the_interpreter_ran_a_kernel_in_that_call() -> None:
    fast = backends.load("fast", "cpu").functions["swiglu"]

    def either(gate: Tensor, up: Tensor) -> Tensor:
        return (fast if len(gate) > 1 else truncated_to_bfloat16)(gate, up)

    trial = Trial(swiglu.spec, either, torch.bfloat16, "cpu")
    of_kernel, of_torch = (trial.run(swiglu.spec.case(rows, 2000), grads=()) for rows in (2, 1))
    assert of_kernel.interpreted() == [True]
    assert of_torch.interpreted() == [False]
    trial.judge(swiglu.spec.case(2, 2000), of_kernel)
    with pytest.raises(Failure, match="gate G3"):
        trial.judge(swiglu.spec.case(1, 2000), of_torch)


class KernelBackward(torch.autograd.Function):
    """swiglu in PyTorch whose backward pass runs a kernel."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            y = backends.load("fast", "cpu").functions["swiglu"](*leaves)
        return torch.autograd.grad(y, leaves, dy)


def test_gradients_depend_on_the_kernels_of_both_passes() -> None:
    trial = Trial(swiglu.spec, KernelBackward.apply, torch.bfloat16, "cpu")
    run = trial.run(swiglu.spec.case(1, 40))
    assert run.interpreted() == [False, True, True]
    assert Run(run.outputs, run.grads, True, False).interpreted() == [True] * 3
    assert trial.run(swiglu.spec.case(1, 40), grads=()).interpreted() == [False]


@triton.jit
def doubling_kernel(x_ptr, y_ptr, count, MASKED: tl.constexpr):
    """Twice x; unless MASKED it reads behind x, and forgets what it read there."""
    place = tl.arange(0, 16)
    x = tl.load(x_ptr + place, (place < count) | (not MASKED), other=0.0)
    tl.store(y_ptr + place, 2 * x, place < count)


@triton.jit
def far_kernel(addresses_ptr, y_ptr):
    """Reads a tensor whose address it is given in another one."""
    x_ptr = tl.load(addresses_ptr).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr, 2 * tl.load(x_ptr))


@pytest.mark.parametrize(("count", "masked", "outside"), [(16, False, False), (9, True, False), (9, False, True)])
def test_a_load_from_outside_is_seen_whatever_becomes_of_it(count: int, masked: bool, outside: bool) -> None:
    x, y = torch.ones(count), torch.zeros(16)
    launched: Any = doubling_kernel
    with reads() as seen:
        launched[(1,)](x, y, count, MASKED=masked)
    assert y[:count].eq(2).all()
    assert seen.outside == (
        "a load of doubling_kernel: 7 of 16 elements are outside the memory of its tensors" * outside or None
    )


def test_a_launch_that_is_given_addresses_is_not_checked() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    launched: Any = far_kernel
    with reads() as seen:
        launched[(1,)](torch.tensor([x.data_ptr()]), y)
    assert y == 2 and seen.outside is None


def test_a_kernel_that_reads_outside_fails() -> None:
    def doubled(gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty_like(gate.detach())
        launched: Any = doubling_kernel
        launched[(1,)](gate, y, gate.numel(), MASKED=False)
        return kernels.swiglu(gate, up) + 0 * y.sum()

    trial = Trial(swiglu.spec, doubled, torch.float32, "cpu")
    with pytest.raises(Failure, match="a load of doubling_kernel: 13 of 16 elements"):
        PROPERTIES["guard_reads"].check(trial, swiglu.spec.case(1, 3))


@triton.jit
def functions_kernel(x_ptr, y_ptr, FUNCTION: tl.constexpr):
    """One of the functions that a GPU computes in float32, of one number."""
    x = tl.load(x_ptr)
    if FUNCTION == "exp":
        x = tl.exp(x)
    elif FUNCTION == "exp2":
        x = tl.exp2(x)
    elif FUNCTION == "sqrt":
        x = tl.sqrt(x)
    elif FUNCTION == "rsqrt":
        x = tl.rsqrt(x)
    else:
        x = tl.sqrt_rn(x)
    tl.store(y_ptr, x)


@pytest.mark.parametrize(
    ("function", "x", "wanted"),
    [
        ("exp2", -126.0, 2.0**-126),
        ("exp2", -127.0, 0.0),
        ("exp", -88.0, math.exp(-88.0)),
        ("sqrt", 2.0**-126, 2.0**-63),
        ("sqrt", 2.0**-128, 0.0),
        ("sqrt_rn", 2.0**-128, 2.0**-64),
        ("rsqrt", 2.0**-126, 2.0**63),
        ("rsqrt", 2.0**-128, math.inf),
        ("rsqrt", -(2.0**-128), -math.inf),
        ("exp2", math.nan, math.nan),
    ],
)
def test_functions_have_the_range_of_a_gpu(function: str, x: float, wanted: float) -> None:
    backends.load("fast", "cpu")
    y = torch.zeros(1)
    launched: Any = functions_kernel
    launched[(1,)](torch.tensor([x]), y, FUNCTION=function)
    assert y.item() == pytest.approx(wanted, rel=1e-6, abs=1e-44, nan_ok=True)
