"""One tensor as several arguments of an operation: its values, and the sum of its gradients."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.operations.calls import DEVICE
from unsloth_fast import kernels as fast
from unsloth_ref import kernels as reference

LABELS = torch.tensor([1, 3, -100, 0, 6, 2, 5], device=DEVICE)
BOUNDS = torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=DEVICE)
ANGLES = (torch.arange(5)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)).to(DEVICE)
COS, SIN = ANGLES.cos()[None], ANGLES.sin()[None]
WEIGHT = torch.linspace(0.5, 2, 8, device=DEVICE)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotated(x: Tensor) -> Tensor:
    return x * COS.double() + torch.cat([-x[..., 4:], x[..., :4]], -1) * SIN.double()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in ((0, 3), (3, 7))]
    return torch.cat([F.scaled_dot_product_attention(*each, is_causal=True).transpose(0, 1) for each in heads])


class Case(NamedTuple):
    """An operation of `count` tensors of one shape, and what it computes."""

    count: int
    shape: tuple[int, ...]
    call: Callable[..., Tensor]
    formula: Callable[..., Tensor]


CASES = {
    "swiglu": Case(2, (6, 33), lambda k, *x: k.swiglu(*x), lambda a, b: F.silu(a) * b),
    "geglu": Case(2, (6, 33), lambda k, *x: k.geglu(*x), lambda a, b: F.gelu(a) * b),
    "rms_norm": Case(2, (8,), lambda k, *x: k.rms_norm(*x), norm),
    "layer_norm": Case(3, (8,), lambda k, *x: k.layer_norm(*x), lambda x, w, b: F.layer_norm(x, (8,), w, b)),
    "layer_norm of another": Case(
        2, (8,), lambda k, *x: k.layer_norm(WEIGHT, *x), lambda *x: F.layer_norm(WEIGHT.double(), (8,), *x)
    ),
    "add_rms_norm": Case(
        2,
        (6, 8),
        lambda k, *x: torch.cat(k.add_rms_norm(*x, WEIGHT)),
        lambda a, b: torch.cat([norm(a + b, WEIGHT.double()), a + b]),
    ),
    "the sum of add_rms_norm": Case(2, (6, 8), lambda k, *x: k.add_rms_norm(*x, WEIGHT)[1], torch.add),
    "rope": Case(
        2,
        (1, 2, 5, 8),
        lambda k, *x: torch.cat(k.rope(*x, COS, SIN)),
        lambda *x: torch.cat([rotated(each) for each in x]),
    ),
    "packed_attention": Case(3, (7, 2, 8), lambda k, *x: k.packed_attention(*x, BOUNDS, 4), attention),
    "lora_linear": Case(
        4,
        (8, 8),
        lambda k, *x: k.lora_linear(*x, 0.5, WEIGHT),
        lambda x, w, a, b: x @ w.T + WEIGHT.double() + 0.5 * (x @ a.T) @ b.T,
    ),
    "lora_linears": Case(
        4,
        (8, 8),
        lambda k, x, w, a, b: torch.cat(k.lora_linears(x, [w, w], [a, w], [b, a], [0.5, 2.0])),
        lambda x, w, a, b: torch.cat([x @ w.T + 0.5 * (x @ a.T) @ b.T, x @ w.T + 2 * (x @ w.T) @ a.T]),
    ),
    "linear_cross_entropy": Case(
        2,
        (7, 8),
        lambda k, *x: k.linear_cross_entropy(*x, LABELS),
        lambda x, w: F.cross_entropy(x @ w.T, LABELS),
    ),
    "linear_cross_entropy of rows": Case(
        2,
        (7, 8),
        lambda k, *x: k.linear_cross_entropy(*x, LABELS, reduction="none"),
        lambda x, w: F.cross_entropy(x @ w.T, LABELS, reduction="none"),
    ),
}


def check(case: Case, run: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """Compare the result and the gradients of the distinct tensors among these with the formula's in float64."""
    exact = {id(one): one.detach().double().requires_grad_() for one in tensors}
    expected = case.formula(*[exact[id(one)] for one in tensors])
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    wanted = torch.autograd.grad(expected, list(exact.values()), dy.double())
    found = run(*tensors)
    leaves = list({id(one): one for one in tensors}.values())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    for gradient, other in zip(torch.autograd.grad(found, leaves, dy), wanted, strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("backend", [fast, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_one_tensor_as_several_arguments(name: str, backend: ModuleType, mode: str) -> None:
    """This holds also in one graph, and among repeated calls with the same signature and distinct tensors."""
    case = CASES[name]

    def call(*tensors: Tensor) -> Tensor:
        return case.call(backend, *tensors)

    torch._dynamo.reset()
    run: Any = call if mode == "eager" else torch.compile(call, fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(case.shape, generator=generator).to(DEVICE).requires_grad_() for _ in range(case.count)]
    once, twice = [leaves[0]] * case.count, [leaves[0], *leaves[:-1]]
    for tensors in (once, leaves, once, leaves, twice) if mode == "eager" else (once, leaves):
        check(case, run, tensors)


@pytest.mark.parametrize("name", CASES)
def test_one_tensor_that_needs_no_gradient(name: str) -> None:
    """The tensor stands for several arguments of one graph."""
    case = CASES[name]
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch._dynamo.reset()
    run = torch.compile(lambda x: case.call(fast, *[x] * case.count), fullgraph=True, backend="aot_eager")
    exact = case.formula(*[x.double()] * case.count)
    torch.testing.assert_close(run(x).double(), exact, rtol=1e-4, atol=1e-5)
