"""Kernels declare their integer parameters, and another batch of the same model compiles no other machine code."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conformance.calling import grouped
from conformance.case import Case
from conformance.spec import Spec
from conformance.specs import specs
from tests.operations.calls import CALL_NAMES, CALLS, DEVICE
from unsloth_fast import kernels as fast
from unsloth_fast.kernels import _launch, _replay

STRIDES = ("_batch", "_head", "_token", "_row", "_column", "_stride")  # endings of their names
# What does not differ between the batches of a model.
OF_A_MODEL = {
    "linear_cross_entropy": {"hidden": 64}, "lora_mlp": {"inner": 64}, "mamba2_scan": {"group": 16},
    "moe_mlp": {"biased": 1},
}  # fmt: skip
Launch = tuple[Any, dict[str, Any]]  # a kernel and its arguments by name


def every_kernel() -> set[Any]:
    modules = [module for name, module in sys.modules.items() if name.startswith("unsloth_fast.kernels.")]
    return {value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Kernels are not executed; their launches are collected here."""
    collected: list[Launch] = []

    def run(kernel: Any, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        collected.append((kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | options))

    monkeypatch.setattr(type(next(iter(every_kernel()))), "run", run)
    monkeypatch.setattr(_replay, "_library", lambda: None)  # recorded launches do not come by
    with _launch.launched_by_triton():
        yield collected


def batches(spec: Spec, columns: int) -> Iterator[Case]:
    """Batches of one model whose sizes are multiples of 16: of several rows, lengths, documents and ignored rows."""
    for rows, other in ((33, 5), (1, 1), (2, 8), (3, 2), (16, 1), (32, 8)):
        sizes = {name: other for name in ("length", "documents", "ignored") if name in spec.drawing.sizes}
        sizes |= OF_A_MODEL.get(spec.op, {})
        yield spec.case(rows, columns).resized(**sizes)


def run(spec: Spec, case: Case, options: dict[str, Any]) -> None:
    """The operation forward and backward."""
    inputs = spec.inputs(case, torch.float32, DEVICE)
    leaves = [inputs[name].requires_grad_() for name in spec.grads if name in inputs]
    results = getattr(fast, spec.op)(**grouped(spec.arguments(inputs)), **spec.required(case, torch.float32), **options)
    results = results if isinstance(results, tuple) else (results,)
    if leaves:
        torch.autograd.grad(results, leaves, [torch.ones_like(one) for one in results])


def specialised(kernel: Any, name: str, value: Any) -> object:
    """The part of an argument that machine code depends on; powers of two are alike, for they are few."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, float) or name in kernel.integers.varying:
        return type(value)
    if name not in kernel.arg_names or name.isupper():  # an option of Triton's, or a constexpr
        return "a power of two" if type(value) is int and value & (value - 1) == 0 else value
    return value == 1, name in kernel.integers.loops or value % 16 == 0


@pytest.mark.parametrize("columns", [64, 8256, 16448])  # one tile or segment; several; rows too long for registers
@pytest.mark.parametrize(("spec", "options"), CALLS, ids=CALL_NAMES)
def test_batches_of_a_model_share_their_machine_code(
    spec: Spec, options: dict[str, Any], columns: int, launches: list[Launch]
) -> None:
    compiled: set[object] = set()
    for case in batches(spec, columns):
        launches.clear()
        run(spec, case, options)
        found = {
            (kernel.__name__, *((name, specialised(kernel, name, value)) for name, value in arguments.items()))
            for kernel, arguments in launches
        }
        compiled = compiled or found
        assert found <= compiled, case


def test_every_integer_is_declared_or_a_stride(launches: list[Launch]) -> None:
    for spec, options in CALLS:
        for columns in (64, 16448):
            run(spec, next(batches(spec, columns)), options)
    assert {kernel for kernel, _ in launches} == every_kernel()
    for kernel, arguments in launches:
        declared = {name for names in kernel.integers for name in names}
        integers = {name for name, value in arguments.items() if isinstance(value, int) and not name.isupper()}
        others = integers & set(kernel.arg_names) - declared
        assert all(name.endswith(STRIDES) for name in others), (kernel.__name__, others)


def test_a_declared_name_is_a_parameter() -> None:
    with pytest.raises(TypeError, match=r"^copy_kernel: got row; allowed: names of its parameters$"):

        @_launch.kernel(varying=("row",))
        def copy_kernel(x_ptr, rows):
            pass


def test_operations_without_a_kernel_are_known() -> None:
    """They launch through files that they share; lora_linear and lora_linears only call the library's products."""
    modules = {op: vars(sys.modules[f"unsloth_fast.kernels.{op}"]) for op in specs()}
    without = [op for op, names in modules.items() if "launch" not in names]
    quantised, products = ["fp8_linear", "fp8_quantize"], ["lora_linear", "lora_linears", "lora_mlp", "moe_mlp"]
    assert without == [*quantised, "geglu", "grouped_gemm", *products, "swiglu"]
