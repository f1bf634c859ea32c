"""Tests of the Triton kernels beyond the conformance suite: edges of tiles, and calls that they refuse."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from math import log2
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.spec import Spec
from tests.kernels.tensors import NO_OPTIONS, assert_within, random, with_gradients
from tests.operations.calls import CALL_NAMES, CALLS, DEVICE, DIFFERENTIABLE, call_of
from unsloth_fast import kernels as fast
from unsloth_ref import kernels as reference


def swiglu(x: Tensor) -> Tensor:
    """The operation with twice the rows as up."""
    return fast.swiglu(x, 2 * x)


def rms_norm(x: Tensor) -> Tensor:
    """The operation with a different weight in each column."""
    return fast.rms_norm(x, torch.arange(1.0, x.shape[-1] + 1, device=DEVICE))


def add_rms_norm(x: Tensor) -> Tensor:
    """The sum of both outputs, with twice the rows as residual."""
    return sum(fast.add_rms_norm(x, 2 * x, torch.arange(1.0, x.shape[-1] + 1, device=DEVICE)), torch.zeros_like(x))


def layer_norm(x: Tensor) -> Tensor:
    """The operation with a different weight and bias in each column."""
    columns = torch.arange(1.0, x.shape[-1] + 1, device=DEVICE)
    return fast.layer_norm(x, columns, -columns)


def cross_entropy(x: Tensor) -> Tensor:
    """The loss of each row, with every option that changes the kernel."""
    labels = torch.full(x.shape[:1], x.shape[1] // 2, device=DEVICE)
    return fast.cross_entropy(x, labels, softcap=5.0, label_smoothing=0.1, z_loss=0.01, reduction="none")


OPERATIONS = [rms_norm, add_rms_norm, layer_norm, swiglu, cross_entropy]


@pytest.mark.parametrize("columns", [3, 96, 5000])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_row_has_the_same_bits_alone_and_among_others(operation: Callable[[Tensor], Tensor], columns: int) -> None:
    """Neither tiles nor the order of a sum along a row depend on the number of rows."""
    x = random(33, columns)
    together = operation(x)
    for row in (0, 20, 32):
        assert torch.equal(operation(x[row : row + 1])[0], together[row])


# One row; one row more than a tile has; more tiles than programs; the widest whole rows, and one column more.
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2048), (2049, 512), (2, 16384), (3, 16385)])
def test_rms_norm_at_the_edges_of_its_tiles(rows: int, columns: int) -> None:
    """y and both gradients agree with float64; a blocked sum of n terms costs about log2(n) roundings."""
    x, weight, dy = random(rows, columns), random(columns), random(rows, columns + 1)[:, 1:]
    y, dx, dweight = with_gradients(fast.rms_norm, dy, x, weight)
    doubles = [tensor.double() for tensor in (dy, x, weight)]
    exact_y, exact_dx, exact_dweight = with_gradients(reference.rms_norm, *doubles)

    rstd = torch.rsqrt(doubles[1].square().mean(-1, keepdim=True) + 1e-6)
    normed, g = (doubles[1] * rstd).abs(), (doubles[0] * doubles[2]).abs()
    along, down = log2(columns) + 8, log2(rows) + log2(columns) + 8
    assert_within(y, exact_y, along, exact_y.abs())
    assert_within(dx, exact_dx, 2 * along, rstd * (g + normed * (g * normed).mean(-1, keepdim=True)))
    assert_within(dweight, exact_dweight, down, (doubles[0].abs() * normed).sum(0))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2049, 512), (2, 8193), (2, 16384), (3, 16385)])
def test_layer_norm_at_the_edges_of_its_tiles(rows: int, columns: int) -> None:
    """y and all gradients agree with float64 around 100, where a difference of squares would cancel."""
    x, weight, bias, dy = (
        100 + random(rows, columns),
        random(columns),
        random(columns),
        random(rows, columns + 1)[:, 1:],
    )
    found = with_gradients(fast.layer_norm, dy, x, weight, bias)
    dy, x, weight, bias = (tensor.double() for tensor in (dy, x, weight, bias))
    exact = with_gradients(reference.layer_norm, dy, x, weight, bias)

    rstd = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)
    normed, g = rstd * (x.abs() + x.abs().mean(-1, keepdim=True)), (dy * weight).abs()
    along, down = log2(columns) + 8, log2(rows) + log2(columns) + 8
    assert_within(found[0], exact[0], along, normed * weight.abs() + bias.abs())
    dx_terms = rstd * (g + g.mean(-1, keepdim=True) + normed * (g * normed).mean(-1, keepdim=True))
    assert_within(found[1], exact[1], 2 * along, dx_terms)
    assert_within(found[2], exact[2], down, (dy.abs() * normed).sum(0))
    assert_within(found[3], exact[3], down, dy.abs().sum(0))


@pytest.mark.parametrize("columns", [96, 16385])
@pytest.mark.parametrize("used", ["normed", "sum"])
def test_an_unused_output_costs_no_gradient(used: str, columns: int) -> None:
    """The gradients have the same bits as with a gradient of zeros for the unused output."""
    leaves = [random(3, columns), random(3, columns) + 1, random(columns)]
    results = []
    for dropped in (None, torch.zeros(3, columns, device=DEVICE)):
        x, residual, weight = (leaf.clone().requires_grad_() for leaf in leaves)
        normed, total = fast.add_rms_norm(x, residual, weight)
        pairs = {"normed": (normed, random(3, columns)), "sum": (total, random(3, columns))}
        if dropped is not None:
            other = {"normed": "sum", "sum": "normed"}[used]
            pairs[other] = pairs[other][0], dropped
        outputs, gradients = zip(*(pairs.values() if dropped is not None else [pairs[used]]), strict=True)
        results.append(torch.autograd.grad(outputs, (x, residual, weight), gradients, allow_unused=True))
    alone, beside_zeros = results
    assert torch.equal(alone[0], beside_zeros[0])
    assert torch.equal(alone[1], beside_zeros[1])
    if used == "sum":
        assert alone[2] is None
        assert not beside_zeros[2].any()
    else:
        assert torch.equal(alone[2], beside_zeros[2])


@pytest.mark.parametrize("frozen", ["x", "residual", "both", "weight"])
def test_the_sum_requires_a_gradient_if_one_of_its_terms_does(frozen: str) -> None:
    """As in the reference, the sum requires none if only the weight does."""
    x, residual = (random(2, 8).requires_grad_(frozen not in (name, "both")) for name in ("x", "residual"))
    weight = random(8).requires_grad_(frozen != "weight")
    ours, theirs = (kernels.add_rms_norm(x, residual, weight) for kernels in (fast, reference))
    assert [output.requires_grad for output in ours] == [output.requires_grad for output in theirs]


@pytest.mark.parametrize(("rows", "columns"), [(1, 4097), (65, 63), (2, 4097)])
def test_swiglu_at_the_edges_of_its_tiles(rows: int, columns: int) -> None:
    """One long row, and two halves of one tensor that are read by their strides, give the same bits."""
    halves = random(rows, 2 * columns)
    gate, up = halves.chunk(2, -1)
    dy = random(rows, columns)
    by_strides = with_gradients(fast.swiglu, dy.t().contiguous().t(), *halves.chunk(2, -1))
    as_one_row = with_gradients(fast.swiglu, dy, gate.contiguous(), up.contiguous())
    assert all(map(torch.equal, by_strides, as_one_row))


@pytest.mark.parametrize("operation", ["swiglu", "geglu", "geglu tanh"])
def test_gated_activations_are_exact_far_into_the_tail(operation: str) -> None:
    """The error is relative to the value, even where (1 + erf) / 2 is 0 in float32; the exponent x^2 / 2 is rounded."""
    gate = torch.linspace(-12, 12, 4001).to(DEVICE)
    x, up = gate.double(), torch.ones_like(gate)
    if operation == "geglu":
        exact, exponent, found = x * torch.special.erfc(-x / 2**0.5) / 2, x.square() / 2, fast.geglu(gate, up)
    elif operation == "swiglu":
        exact, exponent, found = x * torch.sigmoid(x), x.abs(), fast.swiglu(gate, up)
    else:
        gate = gate / 3  # the exponent grows with the cube
        x, up = gate.double(), torch.ones_like(gate)
        twice = 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
        exact, exponent, found = x * torch.sigmoid(twice), twice.abs(), fast.geglu(gate, up, approximate="tanh")
    assert_within(found, exact, 12, exact.abs() * (1 + exponent))


@pytest.mark.parametrize("transposed", [False, True])
def test_rope_has_the_memory_layout_of_its_queries(transposed: bool) -> None:
    """So heads and tokens can be transposed back without a copy; this holds for gradients too."""
    q, k, cos, sin = random(2, 3, 5, 8), random(2, 1, 5, 8), random(1, 5, 8), random(1, 5, 8)
    if transposed:
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    q, k = q.requires_grad_(), k.requires_grad_()
    outputs = fast.rope(q, k, cos, sin)
    grads = torch.autograd.grad(outputs, (q, k), [torch.ones(o.shape, device=DEVICE) for o in outputs])
    for tensor in (*outputs, *grads):
        assert (tensor.transpose(1, 2) if transposed else tensor).is_contiguous()


def test_rope_has_a_second_derivative_through_its_gradients() -> None:
    """It is linear: the gradient of its gradient is a rotation."""
    q, k, cos, sin = random(1, 2, 3, 8).requires_grad_(), random(1, 1, 3, 8), random(1, 3, 8), random(1, 3, 8) + 1
    dq = random(1, 2, 3, 8).requires_grad_()
    found = []
    for rope in (fast.rope, reference.rope):
        turned, _ = rope(q, k, cos, sin)
        (gradient,) = torch.autograd.grad(turned, q, dq, create_graph=True)
        found += torch.autograd.grad(gradient.square().sum(), dq)
    torch.testing.assert_close(*found)


def test_an_unchecked_label_outside_the_vocabulary_gives_nan() -> None:
    """As on CUDA, the row's loss and gradient are NaN; other rows are not affected."""
    module = import_module("unsloth_fast.kernels.cross_entropy")
    logits, options = random(4, 5), NO_OPTIONS
    labels = torch.tensor([1, 5, options.ignore_index, -3], device=DEVICE)
    losses, lse = module.forward_op(logits, labels, *options)
    dlogits = module.backward_op(torch.zeros_like(losses), logits, labels, lse, *options)
    assert losses.isnan().tolist() == [False, True, False, True]
    assert dlogits.isnan().all(-1).tolist() == [False, True, False, True]
    assert not dlogits[[0, 2]].any()


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_norm_weight_costs_no_sum(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second kernel of the backward pass, which sums up dweight, runs only if the weight is trained."""
    module = import_module("unsloth_fast.kernels.rms_norm")
    launched, launch = [], module.launch
    monkeypatch.setattr(
        module, "launch", lambda kernel, *rest, **flags: launched.append(kernel) or launch(kernel, *rest, **flags)
    )
    x, weight = random(3, 8).requires_grad_(), random(8).requires_grad_(trained)
    fast.rms_norm(x, weight).sum().backward()
    assert (module.column_sum_kernel in launched) is trained
    assert (weight.grad is not None) is trained


@pytest.mark.parametrize(("spec", "options"), DIFFERENTIABLE)
def test_a_gradient_penalty_raises_or_is_right(spec: Spec, options: dict[str, Any]) -> None:
    """A constant grad_output, with which only saved tensors lead back to x, and a gradient of x alone raise too.

    Linear operations have a gradient with a derivative, which is 0 for x.
    """
    call, inputs = call_of(spec, 2, 8, options)
    x, *others = (one.detach().requires_grad_() for one in inputs)
    (dx,) = torch.autograd.grad(sum(one.sum() for one in call(fast, x, *others)), x, create_graph=True)
    penalised = x.sum() + dx.square().sum()
    if spec.op in ("rope", "fp8_linear"):
        assert torch.equal(torch.autograd.grad(penalised, x)[0], torch.ones_like(x))
        return
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(penalised, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        penalised.backward()


@pytest.mark.parametrize(("spec", "options"), CALLS, ids=CALL_NAMES)
def test_float64_is_left_to_the_reference(spec: Spec, options: dict[str, Any]) -> None:
    """The message names the backend that computes in float64."""
    call, inputs = call_of(spec, 2, 8, options, torch.float64)
    with pytest.raises(TypeError, match=r"torch\.float64.*the reference backend computes in float64"):
        call(fast, *inputs)


def test_a_cpu_without_the_interpreter_is_refused() -> None:
    """A message names the solution; the failure is not one inside Triton."""
    code = "import torch; from unsloth_fast import kernels; kernels.swiglu(torch.ones(2), torch.ones(2))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: gate: got device cpu; allowed: a CUDA device" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


@pytest.mark.parametrize("casting", ["llama", "gemma"])
def test_a_weight_may_be_wider_than_x(casting: str) -> None:
    x, weight = random(5, 70).half(), random(70)
    found = fast.rms_norm(x, weight, casting=casting)
    assert found.dtype == torch.float16
    # Rounding the weight to x's dtype first would be off by another unit roundoff of float16.
    exact = reference.rms_norm(x.double(), weight.double(), casting=casting)
    roundings = 2 if casting == "llama" else 1
    assert ((found.double() - exact).abs() <= roundings * 1.001 * 2.0**-11 * exact.abs() + 2.0**-24).all()


def test_int32_labels_give_the_bits_of_int64_labels() -> None:
    logits, labels = random(6, 70), torch.tensor([0, 69, -100, 3, 5, 7], device=DEVICE)
    for reduction in ("mean", "none"):
        wide = fast.cross_entropy(logits, labels, reduction=reduction)
        assert wide.equal(fast.cross_entropy(logits, labels.int(), reduction=reduction))
