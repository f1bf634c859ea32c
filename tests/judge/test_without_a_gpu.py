"""On a CPU a kernel computes what it would on a GPU, and what it asks of Triton and of a GPU has an answer."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.libdevice import tanh as tanh_by_name
from triton.runtime.errors import InterpreterError

from conformance import backends
from conformance.case import DTYPES
from conformance.interpreter.gpu import LIBDEVICE
from conformance.operations import Source, specs
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.reporting.report import failures
from conformance.running.search import Result, search
from conformance.trial import Trial

if torch.cuda.is_available():  # before the next line, which concerns every later test of the process
    pytest.skip("the interpreter is selected for the whole process", allow_module_level=True)
backends.load("fast", "cpu")

FOR_A_GPU = "raised AssertionError: x must be on a GPU"
FORWARD_ALONE = "output result has no graph, although x require gradients"
OWN = Source("module:function", "x=randn(2)")
TWO: tl.constexpr = tl.constexpr(2)


@triton.jit
def scalar_kernel(x, y, factor, FACTOR_FIRST: tl.constexpr):
    i = tl.arange(0, 4)
    value = tl.load(x + i)
    tl.store(y + i, factor * value if FACTOR_FIRST else value * factor.to(tl.float32))


@triton.jit
def constexpr_kernel(x, y):
    i = tl.arange(0, 4)
    value = tl.load(x + i)
    tl.store(y + i, tl.where(value < TWO, TWO * value - TWO, TWO / value))


@triton.jit
def sixteen_bits_kernel(x, other, y, NAME: tl.constexpr):
    i = tl.arange(0, 8)
    one, two = tl.load(x + i), tl.load(other + i)
    if NAME == "product":
        result = one * two
    elif NAME == "sum":
        result = one + two - 1.5
    elif NAME == "quotient":
        result = one / two
    elif NAME == "negative":
        result = -one
    elif NAME == "larger":
        result = tl.maximum(one, two)
    elif NAME == "less":
        result = tl.where(one < two, one, two * 2)
    elif NAME == "clamped":
        result = tl.clamp(one, -1.0, 1.0)
    elif NAME == "fused":
        result = tl.fma(one, two, one)
    elif NAME == "total":
        result = tl.sum(one, 0) + tl.zeros([8], tl.bfloat16)
    elif NAME == "running":
        result = tl.cumsum(one, 0)
    elif NAME == "place":
        result = (tl.argmax(one, 0) + i * 0).to(tl.bfloat16)
    elif NAME == "of integers":
        result = (i * 3 - 7).to(tl.bfloat16)
    elif NAME == "to integers":
        result = one.to(tl.int32).to(tl.float32).to(tl.bfloat16)
    else:
        result = one.to(tl.float64).to(tl.bfloat16)
    tl.store(y + i, result)


@triton.jit
def square_kernel(x, y):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    matrix = tl.load(x + i)
    tl.store(y + i, tl.dot(matrix, matrix))


@triton.jit
def library_kernel(x, y, NAME: tl.constexpr):
    i = tl.arange(0, 4)
    value = tl.load(x + i)
    if NAME == "by name":
        result = tanh_by_name(value)
    elif NAME == "round":
        result = libdevice.round(value)
    elif NAME == "pow":
        result = libdevice.pow(value, 2.0)
    elif NAME == "isnan":
        nan: Any = libdevice.isnan(value)
        result = nan.to(tl.float32)
    elif NAME == "fast":
        result = libdevice.fast_expf(value)
    elif NAME == "erf":
        result = libdevice.erf(value)
    else:
        result = libdevice.j0(value)
    tl.store(y + i, result)


@triton.autotune(configs=[triton.Config({"BLOCK": size}) for size in (16, 32, 64)], key=["n"])
@triton.jit
def doubled_kernel(x, sizes, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(x + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)
    tl.atomic_add(sizes + BLOCK, 1)


@triton.autotune(configs=[triton.Config({"BLOCK": size}) for size in (16, 32)], key=["n"], restore_value=["x"])
@triton.jit
def restored_kernel(x, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(x + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def launched(kernel: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    y = torch.zeros(x.shape, dtype=options.pop("dtype", x.dtype))
    kernel[(1,)](x, y, *arguments, **options)
    return y


@pytest.mark.parametrize("first", [True, False])
def test_a_float_argument_is_a_float32_scalar(first: bool) -> None:
    """It rounds to float32, it has `.to`, and a product with float16 is float32."""
    x = torch.tensor([1.0, 2.0, 3.0, 1 / 3]).half()
    y = launched(scalar_kernel, x, 0.1, FACTOR_FIRST=first, dtype=torch.float32)
    assert y.equal(x.float() * torch.tensor(0.1))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("product", lambda x, y: x * y),
        ("sum", lambda x, y: x + y - 1.5),
        ("quotient", lambda x, y: x / y),
        ("negative", lambda x, y: -x),
        ("larger", torch.maximum),
        ("less", lambda x, y: torch.where(x < y, x, y * 2)),
        ("clamped", lambda x, y: x.clamp(-1, 1)),
        ("fused", lambda x, y: (x.float() * y.float() + x.float()).bfloat16()),
        ("total", lambda x, y: x.float().sum().bfloat16().expand(8)),
        ("running", lambda x, y: x.float().cumsum(0).bfloat16()),
        ("place", lambda x, y: x.argmax().bfloat16().expand(8)),
        ("of integers", lambda x, y: torch.arange(8).mul(3).sub(7).bfloat16()),
        ("to integers", lambda x, y: x.int().bfloat16()),
        ("there and back", lambda x, y: x),
    ],
)
def test_arithmetic_in_bfloat16_rounds_as_torch_does(name: str, wanted: Any) -> None:
    """Of numbers, not of their bits; a quotient, or a running sum, may be float32, which the interpreter truncates."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, generator=generator).mul(3).bfloat16() for _ in range(2))
    found = torch.zeros_like(x)
    launch: Any = sixteen_bits_kernel
    launch[(1,)](x, y, found, NAME=name)
    if name in ("quotient", "running"):
        torch.testing.assert_close(found, wanted(x, y), rtol=2.0**-7, atol=0)
    else:
        assert found.equal(wanted(x, y))


def test_a_product_of_matrices_in_bfloat16() -> None:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.zeros(16, 16)
    launch: Any = square_kernel
    launch[(1,)](x, y)
    torch.testing.assert_close(y, x.float() @ x.float(), rtol=1e-5, atol=1e-5)


def test_a_global_constant_stands_left_of_a_tensor() -> None:
    x = torch.tensor([1.0, 4.0, -3.0, 2.0])
    assert launched(constexpr_kernel, x).tolist() == [0.0, 0.5, -8.0, 1.0]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("by name", torch.tanh),
        ("round", lambda x: torch.tensor([1.0, -2.0, 3.0, torch.nan])),
        ("pow", torch.square),
        ("isnan", lambda x: torch.isnan(x).float()),
        ("fast", torch.exp),
        ("erf", torch.erf),
    ],
)
def test_functions_of_libdevice(name: str, wanted: Any) -> None:
    x = torch.tensor([0.5, -1.5, 2.5, torch.nan])
    torch.testing.assert_close(launched(library_kernel, x, NAME=name), wanted(x), rtol=3e-7, atol=0, equal_nan=True)


def test_a_function_that_nothing_computes_is_named() -> None:
    with pytest.raises(InterpreterError, match=r"libdevice: __nv_j0f is not computed in the interpreter"):
        launched(library_kernel, torch.ones(4), NAME="j0")


# Each function at 0.7, at (0.7, -1.3) or at (0.7, -1.3, 2.5), by another library than the one that computes it.
VALUES = {
    **{name: getattr(math, name)(0.7) for name in (
        "acos", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "erfc", "exp", "exp2", "expm1", "fabs",
        "floor", "isinf", "isnan", "lgamma", "log", "log10", "log1p", "log2", "sin", "sinh", "sqrt", "tan", "tanh",
        "trunc",
    )},
    **{f"fast_{name}": getattr(math, name)(0.7) for name in ("exp", "log", "log2", "log10", "sin", "cos", "tan")},
    "acosh": math.nan, "abs": 0.7, "llabs": 0.7, "rint": 1.0, "nearbyint": 1.0, "round": 1.0,
    "finite": 1.0, "isfinite": 1.0, "signbit": 0.0, "exp10": 10**0.7, "fast_exp10": 10**0.7, "saturate": 0.7,
    "rsqrt": 0.7**-0.5, "frsqrt_rn": 0.7**-0.5, "normcdf": (1 + math.erf(0.7 / 2**0.5)) / 2,
    "erfinv": statistics.NormalDist().inv_cdf(1.7 / 2) / 2**0.5,
    "float2int_rn": 1.0, "float2int_rz": 0.0, "int2float_rn": 0.7,
    "atan2": math.atan2(0.7, -1.3), "copysign": -0.7, "fmod": math.fmod(0.7, -1.3), "hypot": math.hypot(0.7, -1.3),
    "pow": 0.7**-1.3, "powi": 0.7**-1.3, "fast_pow": 0.7**-1.3, "ldexp": 0.7 * 2**-1.3, "fdim": 2.0,
    "fast_fdivide": 0.7 / -1.3, "fma": 0.7 * -1.3 + 2.5, "fma_rn": 0.7 * -1.3 + 2.5,
    **{f"{of}{name}_rn": value for of in "fd" for name, value in (
        ("add", -0.6), ("sub", 2.0), ("mul", -0.91), ("div", 0.7 / -1.3), ("sqrt", 0.7**0.5), ("rcp", 1 / 0.7),
    )},
}  # fmt: skip
BINARY = {"atan2", "copysign", "fmod", "hypot", "pow", "powi", "fast_pow", "ldexp", "fdim", "fast_fdivide"}
BINARY |= {f"{of}{name}_rn" for of in "fd" for name in ("add", "sub", "mul", "div")}


def test_each_function_computes_what_its_name_says() -> None:
    assert VALUES.keys() == LIBDEVICE.keys()
    for name, function in LIBDEVICE.items():
        count = 3 if name in ("fma", "fma_rn") else 2 if name in BINARY else 1
        arguments = torch.tensor([0.7, -1.3, 2.5], dtype=torch.float64)[:count].unbind()
        assert function(*arguments).item() == pytest.approx(VALUES[name], rel=1e-12, nan_ok=True), name


def test_the_functions_are_those_of_libdevice() -> None:
    """Every name of the table is a symbol of CUDA's library, so that none is misspelt."""
    source = Path(libdevice.__file__).with_name("cuda").joinpath("libdevice.py").read_text()
    missing = [name for name in LIBDEVICE if not any(f'"__nv_{name}{end}"' in source for end in ("", "f", "d"))]
    assert not missing


def test_tuning_runs_two_configurations_and_chooses_always_the_same() -> None:
    """Over several keys each configuration runs, and a kernel in place shows that it ran three times."""
    seen = set()
    for n in range(1, 9):
        chosen = []
        for _ in range(2):
            doubled_kernel.cache.clear()
            x, sizes = torch.ones(n), torch.zeros(65, dtype=torch.int32)
            doubled_kernel[(1,)](x, sizes, n)
            assert x.tolist() == [8.0] * n
            assert sizes.sum() == 3
            chosen.append(sizes.argmax().item())
        assert chosen[0] == chosen[1]
        seen |= {*sizes.nonzero().flatten().tolist()}
        doubled_kernel[(1,)](x, sizes, n)
        assert sizes.sum() == 4
    assert seen == {16, 32, 64}


def test_what_a_kernel_restores_is_restored() -> None:
    x = torch.ones(3)
    restored_kernel[(1,)](x, 3)
    assert x.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("kernel", "verdict"),
    [("right", "pass"), ("wrong_in_a_configuration", "fail"), ("scaled_again_by_tuning", "fail")],
)
def test_tuned_kernels_of_a_stranger(kernel: str, verdict: str) -> None:
    source = Source("tests.judge.strangers.tuned:scaled_tanh", "x=randn(4,70) factor=0.7", grads=())
    ((op, spec),) = specs(source).items()
    function = backends.load(f"tests.judge.strangers.tuned:{kernel}", "cpu", source).functions[op]
    found = [
        search(Trial(spec, function, DTYPES[dtype], "cpu"), PROPERTIES[name], PROFILES["dev"], dtype)
        for name in ("value", "determinism", "extents")
        for dtype in ("float32", "float16")
    ]
    assert (verdict == "fail") == any(one.verdict == "fail" for one in found), [one.message for one in found]


def test_questions_about_the_gpu_have_answers() -> None:
    """As kernels and tutorials ask them, when they are imported and before they are launched."""
    active: Any = triton.runtime.driver.active
    assert active.get_active_torch_device() == torch.device("cpu")
    assert (active.get_current_target().backend, active.get_current_target().arch) == ("cuda", 80)
    assert active.utils.get_device_properties(active.get_current_device())["multiprocessor_count"] == 4


@pytest.mark.parametrize(
    ("message", "device", "source", "hint"),
    [
        (FOR_A_GPU, "cpu", Source(), "--device cuda judges it on a GPU"),
        (FOR_A_GPU, "cuda", Source(), None),
        (FORWARD_ALONE, "cpu", OWN, "--grads none"),
        (FORWARD_ALONE, "cpu", Source(), None),
    ],
)
def test_a_failure_says_what_helps(message: str, device: str, source: Source, hint: str | None) -> None:
    shown = failures([Result("f", "value", "float32", "fail", message=message)], "m:k", device, source)
    assert ("  hint: " in shown) == (hint is not None)
    assert hint is None or hint in shown
