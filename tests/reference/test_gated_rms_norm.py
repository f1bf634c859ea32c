"""The reference gated_rms_norm against values worked by hand, its formulas in numpy, and transformers."""

from inspect import signature
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from tests.operations.leaves import randn
from unsloth_ref.kernels import gated_rms_norm

# Float64 on rows of up to 12: fewer than 50 roundings of 1.1e-16 of numbers below 50 sum to less than 4e-13.
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
# transformers 5.17 has no groups there.
GROUPS: dict[str, int] = {"group_size": 8} if "group_size" in signature(MambaRMSNormGated).parameters else {}


def test_values_worked_by_hand() -> None:
    """The mean square of 1 and 7 is 25; SiLU of ln 3 is 3/4 ln 3, and that of 0 is 0."""
    x, weight = torch.tensor([[1.0, 7.0]], dtype=torch.float64), torch.tensor([2.0, 10.0], dtype=torch.float64)
    gate = torch.full_like(x, log(3))
    a = 3 / 4 * log(3)
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, 0.0).tolist(), [[0.4 * a, 14 * a]], **FLOAT64)
    # The activation is the same for both columns: the norm cancels it.
    y = gated_rms_norm(x, gate, weight, 0.0, norm_before_gate=False)
    torch.testing.assert_close(y.tolist(), [[0.4, 14.0]], **FLOAT64)
    # Each column is a group: a number divided by its size.
    y = gated_rms_norm(x, -gate, weight, 0.0, group_size=1, norm_before_gate=False)
    torch.testing.assert_close(y.tolist(), [[-2.0, -10.0]], **FLOAT64)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("shape", "size"), [((3, 12), 4), ((2, 2, 6), None), ((5,), 1), ((0, 6), 3)])
def test_formulas_of_the_docstring(shape: tuple[int, ...], size: int | None, before: bool) -> None:
    """Forward and backward agree with numpy for any shape; in float64 both castings are the same."""
    x, gate, weight = randn(*shape), randn(*shape, seed=1), randn(shape[-1], seed=2)
    dy = randn(*shape, seed=3).detach()
    y = gated_rms_norm(x, gate, weight, 0.01, group_size=size, norm_before_gate=before, casting="gemma")
    dx, dgate, dweight = grad(y, (x, gate, weight), dy)

    columns = size or shape[-1]
    xs, gs, ws, back = (t.detach().numpy() for t in (x, gate, weight, dy))
    s = 1 / (1 + np.exp(-gs))
    a, slope = gs * s, s * (1 + gs * (1 - s))

    def mean(values: Any) -> Any:
        means = values.reshape(*shape[:-1], shape[-1] // columns, columns).mean(-1)
        return means.repeat(columns, axis=-1)

    v = xs if before else xs * a
    r = 1 / np.sqrt(mean(v**2) + 0.01)
    n = v * r
    g = back * ws * (a if before else 1)
    dv = r * (g - n * mean(g * n))
    rows = back * n * (a if before else 1)
    torch.testing.assert_close(y.detach().numpy(), ws * n * (a if before else 1), **FLOAT64)
    torch.testing.assert_close(dx.numpy(), dv if before else dv * a, **FLOAT64)
    torch.testing.assert_close(dgate.numpy(), back * ws * n * slope if before else dv * xs * slope, **FLOAT64)
    torch.testing.assert_close(dweight.numpy(), rows.reshape(-1, shape[-1]).sum(0), **FLOAT64)


@pytest.mark.parametrize("before", [True, False])
def test_gradients_are_the_derivatives(before: bool) -> None:
    """First and second derivatives agree with finite differences."""
    inputs = randn(2, 6), randn(2, 6, seed=1), randn(6, seed=2)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return gated_rms_norm(*tensors, 0.1, group_size=3, norm_before_gate=before)

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


MODULES = [
    (Qwen3NextRMSNormGated(24, eps=1e-5), {}),
    (MambaRMSNormGated(24, eps=1e-5, **GROUPS), {"norm_before_gate": False, **GROUPS}),
    (GraniteMoeHybridRMSNormGated(24, eps=1e-5, **(GROUPS and {"group_size": 24})), {"norm_before_gate": False}),
    (FalconH1RMSNormGated(24, eps=1e-5, n_groups=3), {"group_size": 8, "casting": "gemma"}),
    (
        FalconH1RMSNormGated(24, eps=1e-5, n_groups=2, norm_before_gate=False),
        {"group_size": 12, "norm_before_gate": False, "casting": "gemma"},
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("module", "options"), MODULES, ids=lambda one: type(one).__name__)
def test_same_bits_as_transformers(module: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Value and gradients of x and gate are equal; the weight's sums round once here, and each term in transformers."""
    module.weight = torch.nn.Parameter(randn(24, dtype=dtype, seed=1))
    x, gate, dy = (randn(4, 9, 24, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    theirs, ours = module(x, gate), gated_rms_norm(x, gate, module.weight, 1e-5, **options)
    assert torch.equal(ours, theirs)
    for one, other in zip(*(grad(y, (x, gate), dy) for y in (ours, theirs)), strict=True):
        assert torch.equal(one, other)


def test_a_weight_in_float32_is_not_rounded() -> None:
    """Qwen3-Next's product with it is float32 until the gate is multiplied."""
    module = Qwen3NextRMSNormGated(24)
    module.weight = torch.nn.Parameter(randn(24, dtype=torch.float32, seed=1))
    x, gate = (randn(9, 24, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    assert torch.equal(gated_rms_norm(x, gate, module.weight), module(x, gate))
