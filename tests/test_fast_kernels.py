"""What the conformance suite leaves to the Triton kernels' own tests: the edges of launch choices, and refusals."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from math import log2

import pytest
import torch
from torch import Tensor

from unsloth_fast import kernels as fast
from unsloth_ref import kernels as reference

UNIT = 2.0**-24  # the relative error of one float32 rounding
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int) -> Tensor:
    """Standard normal float32 values, the same on every call with this shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def swiglu(x: Tensor) -> Tensor:
    """Of the rows and of twice the rows."""
    return fast.swiglu(x, 2 * x)


def rms_norm(x: Tensor) -> Tensor:
    """With a weight that differs from column to column."""
    return fast.rms_norm(x, torch.arange(1.0, x.shape[-1] + 1, device=DEVICE))


def cross_entropy(x: Tensor) -> Tensor:
    """Of each row, with every option that changes the kernel."""
    labels = torch.full(x.shape[:1], x.shape[1] // 2, device=DEVICE)
    return fast.cross_entropy(x, labels, softcap=5.0, label_smoothing=0.1, z_loss=0.01, reduction="none")


OPERATIONS = [rms_norm, swiglu, cross_entropy]


@pytest.mark.parametrize("columns", [3, 96, 5000])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_row_has_the_same_bits_alone_and_among_others(operation: Callable[[Tensor], Tensor], columns: int) -> None:
    """The number of rows chooses neither tiles nor the order of a sum along a row."""
    x = random(33, columns)
    together = operation(x)
    for row in (0, 20, 32):
        assert torch.equal(operation(x[row : row + 1])[0], together[row])


def assert_within(ours: Tensor, exact: Tensor, roundings: float, terms: Tensor) -> None:
    """Each entry is off by no more than this many roundings of the terms that make it up."""
    assert ((ours.double() - exact).abs() <= roundings * UNIT * terms + torch.finfo(torch.float32).tiny).all()


def with_gradients(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The result, and the gradient of each input for the gradient dy of the result."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    return (result.detach(), *torch.autograd.grad(result, leaves, dy))


# One row; a tile of several rows and one more; more tiles than programs; the widest whole rows, and one column more.
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2048), (2049, 512), (2, 16384), (3, 16385)])
def test_rms_norm_at_the_edges_of_its_tiles(rows: int, columns: int) -> None:
    """y and both gradients against float64; a blocked sum of n terms costs about log2(n) roundings."""
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


@pytest.mark.parametrize("columns", [1, 7, 9, 8191, 8192, 8193])
@pytest.mark.parametrize("where", ["first", "last"])
def test_cross_entropy_at_the_edges_of_its_tiles(columns: int, where: str) -> None:
    """Losses and gradients against float64, the label in the first or the last column."""
    logits, dloss = 4 * random(2, columns), random(2)
    labels = torch.full((2,), 0 if where == "first" else columns - 1, device=DEVICE)
    loss, dlogits = with_gradients(lambda x: fast.cross_entropy(x, labels, reduction="none"), dloss, logits)
    z = logits.double()
    exact = with_gradients(lambda x: reference.cross_entropy(x, labels, reduction="none"), dloss.double(), z)

    lse = torch.logsumexp(z, -1, keepdim=True)
    onehot = torch.nn.functional.one_hot(labels, columns)
    roundings = log2(columns) + 8
    assert_within(loss, exact[0], roundings, lse[:, 0].abs() + z.gather(1, labels[:, None])[:, 0].abs())
    size = torch.exp(z - lse) * (1 + z.abs() + lse.abs()) + onehot
    assert_within(dlogits, exact[1], roundings, size * dloss.double().abs()[:, None])


@pytest.mark.parametrize(("rows", "columns"), [(1, 4097), (65, 63), (2, 4097)])
def test_swiglu_at_the_edges_of_its_tiles(rows: int, columns: int) -> None:
    """As one long row, and by the strides of two halves of one tensor: the same bits."""
    halves = random(rows, 2 * columns)
    gate, up = halves.chunk(2, -1)
    dy = random(rows, columns)
    by_strides = with_gradients(fast.swiglu, dy.t().contiguous().t(), *halves.chunk(2, -1))
    as_one_row = with_gradients(fast.swiglu, dy, gate.contiguous(), up.contiguous())
    assert all(map(torch.equal, by_strides, as_one_row))


def test_a_label_outside_the_vocabulary_gives_nan_where_it_is_not_read() -> None:
    """As on CUDA: the row's loss and gradient are NaN, the other rows are untouched."""
    module = import_module("unsloth_fast.kernels.cross_entropy")
    logits, options = random(4, 5), (-100, 1.0, 0.0, 0.0, 0.0)
    labels = torch.tensor([1, 5, -100, -3], device=DEVICE)
    losses, lse = module.forward_op(logits, labels, *options)
    dlogits = module.backward_op(torch.zeros_like(losses), logits, labels, lse, *options)
    assert losses.isnan().tolist() == [False, True, False, True]
    assert dlogits.isnan().all(-1).tolist() == [False, True, False, True]
    assert not dlogits[[0, 2]].any()


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_norm_weight_costs_no_sum(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second kernel of the backward, which adds up dweight, runs only for a weight that is trained."""
    module = import_module("unsloth_fast.kernels.rms_norm")
    launched, launch = [], module.launch
    monkeypatch.setattr(
        module, "launch", lambda kernel, *rest, **flags: launched.append(kernel) or launch(kernel, *rest, **flags)
    )
    x, weight = random(3, 8).requires_grad_(), random(8).requires_grad_(trained)
    fast.rms_norm(x, weight).sum().backward()
    assert (module.column_sum_kernel in launched) is trained
    assert (weight.grad is not None) is trained


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gradient_penalty_raises(operation: Callable[[Tensor], Tensor]) -> None:
    """Also where only saved tensors lead back to x, grad_output being constant, and where x alone is asked for."""
    x = random(2, 8).requires_grad_()
    (dx,) = torch.autograd.grad(operation(x).sum(), x, create_graph=True)
    penalised = x.sum() + dx.square().sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(penalised, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        penalised.backward()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_float64_is_left_to_the_reference(operation: Callable[[Tensor], Tensor]) -> None:
    """The message says who computes in float64."""
    with pytest.raises(TypeError, match=r"torch\.float64.*the reference backend computes in float64"):
        operation(random(2, 8).double())


def test_a_cpu_without_the_interpreter_is_refused() -> None:
    """One sentence with the way out, not a failure inside Triton."""
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


def test_labels_of_32_bits_give_the_bits_of_64() -> None:
    logits, labels = random(6, 70), torch.tensor([0, 69, -100, 3, 5, 7], device=DEVICE)
    for reduction in ("mean", "none"):
        wide = fast.cross_entropy(logits, labels, reduction=reduction)
        assert wide.equal(fast.cross_entropy(logits, labels.int(), reduction=reduction))
