"""The reference fused_swiglu against values worked by hand, its formulas in plain Python, and transformers."""

from math import exp, inf, log, nan
from typing import Any

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from transformers import GptOssConfig, Phi3Config
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from unsloth_ref.kernels import fused_swiglu, swiglu

# Float64, element by element: twenty roundings of 1.1e-16 of terms below 400 sum to less than 1e-12.
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
GPT_OSS: dict[str, Any] = {"interleaved": True, "alpha": 1.702, "limit": 7.0, "offset": 1.0}


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers that depend on the seed alone and require a gradient."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype).requires_grad_()


def test_values_worked_by_hand() -> None:
    """The sigmoid of 2 ln 3 / 2 is 3/4; a gate of 9 is clamped to 2, an up of -9 to -2."""
    pairs = torch.tensor([log(3) / 2, 2.0, 9.0, 1.0, log(3) / 2, -9.0], dtype=torch.float64, requires_grad=True)
    y = fused_swiglu(pairs, interleaved=True, alpha=2.0, limit=2.0, offset=1.0)
    (dpairs,) = grad(y.sum(), pairs)
    at_limit = 2 / (1 + exp(-4))
    a, slope = log(3) / 2 * 3 / 4, 3 / 4 * (1 + log(3) / 4)
    torch.testing.assert_close(y.tolist(), [3 * a, 2 * at_limit, -a], **FLOAT64)
    # Up is at its limit in the first pair, where its gradient passes; the clamped factors get none.
    torch.testing.assert_close(dpairs.tolist(), [3 * slope, a, 0.0, at_limit, -slope, 0.0], **FLOAT64)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 10), (0, 4), (3, 0)])
def test_halves_are_gate_and_up(shape: tuple[int, ...]) -> None:
    """Without options the operation is swiglu of the halves, in value and gradient, to the bit."""
    gate_up, dy = randn(*shape), randn(*shape[:-1], shape[-1] // 2, seed=1)
    ours, theirs = fused_swiglu(gate_up), swiglu(*gate_up.chunk(2, -1))
    assert torch.equal(ours, theirs)
    assert torch.equal(*(grad(y, gate_up, dy)[0] for y in (ours, theirs)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("alpha", "limit", "offset"), [(1.0, None, 0.0), (1.702, 7.0, 1.0), (0.5, 1.0, -0.5)])
def test_formulas_of_the_docstring(interleaved: bool, alpha: float, limit: float | None, offset: float) -> None:
    """Forward and backward agree element by element."""
    gate_up, dy = randn(5, 14, scale=4.0), randn(5, 7, seed=1).detach()
    y = fused_swiglu(gate_up, interleaved=interleaved, alpha=alpha, limit=limit, offset=offset)
    (found,) = grad(y, gate_up, dy)
    bound = inf if limit is None else limit
    for row in range(5):
        for column in range(7):
            places = (2 * column, 2 * column + 1) if interleaved else (column, 7 + column)
            gate, up = (float(gate_up.detach()[row, place]) for place in places)
            g, u = min(gate, bound), max(-bound, min(up, bound))
            s, back = 1 / (1 + exp(-alpha * g)), float(dy[row, column])
            dgate = back * (u + offset) * s * (1 + alpha * g * (1 - s)) * (gate <= bound)
            expected = (g * s * (u + offset), dgate, back * g * s * (abs(up) <= bound))
            seen = (y[row, column], *(found[row, place] for place in places))
            torch.testing.assert_close([float(one) for one in seen], list(expected), **FLOAT64)


@pytest.mark.parametrize("options", [{}, GPT_OSS | {"limit": 0.7}])
def test_gradients_are_the_derivatives(options: dict[str, Any]) -> None:
    """First and second derivatives agree with finite differences."""
    assert gradcheck(lambda gate_up: fused_swiglu(gate_up, **options), (randn(3, 8),))
    assert gradgradcheck(lambda gate_up: fused_swiglu(gate_up, **options), (randn(3, 8),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_transformers(dtype: torch.dtype) -> None:
    """Value and gradients are those of Phi3MLP before its down projection, and of GptOssExperts' activation."""
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 65, "num_attention_heads": 2}
    gate_up, dy = randn(4, 130, dtype=dtype, scale=3.0), randn(4, 65, dtype=dtype, seed=1)
    mlp = Phi3MLP(Phi3Config(**sizes, pad_token_id=0))
    mlp.gate_up_proj, mlp.down_proj = torch.nn.Identity(), torch.nn.Identity()  # type: ignore[assignment]
    experts = GptOssExperts(GptOssConfig(**sizes, num_local_experts=1))
    for theirs, ours in (
        (mlp(gate_up), fused_swiglu(gate_up)),
        (experts._apply_gate(gate_up), fused_swiglu(gate_up, **GPT_OSS)),
    ):
        assert torch.equal(ours, theirs)
        assert torch.equal(*(grad(y, gate_up, dy)[0] for y in (ours, theirs)))


def test_a_compiled_call_takes_another_offset() -> None:
    """Dynamo makes a symbol of an option that changes."""
    torch.compiler.reset()
    compiled, gate_up = torch.compile(fused_swiglu, fullgraph=True, backend="eager"), randn(3, 8)
    for offset in (0.0, 1.0, -0.5):
        torch.testing.assert_close(compiled(gate_up, offset=offset), fused_swiglu(gate_up, offset=offset), **FLOAT64)
    with pytest.raises(ValueError, match=r"offset: got nan; allowed: a finite number"):
        fused_swiglu(gate_up, offset=nan)
