"""The reference qk_norm_rope against its two parts, values worked by hand, and transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from tests.operations.leaves import randn
from unsloth_ref.kernels import qk_norm_rope

FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def inputs(dtype: torch.dtype, width: int = 8) -> list[Tensor]:
    """q, k and both weights."""
    shapes = (2, 3, 5, width), (2, 1, 5, width), (width,), (width,)
    return [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def angles(dtype: torch.dtype, width: int = 8) -> tuple[Tensor, Tensor]:
    """cos and sin of a row per token."""
    half = randn(1, 5, width // 2, seed=9).detach()
    both = torch.cat([half, half], -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def test_values_worked_by_hand() -> None:
    """The mean square of 1, 7 and twice 5 is 25; a quarter turn exchanges the first two; the others are not turned."""
    q = torch.tensor([[[[1.0, 7.0, 5.0, 5.0]]]], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    cos, sin = torch.zeros(1, 1, 2, dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.float64)
    turned_q, turned_k = qk_norm_rope(q, -q, weight, weight, cos, sin, eps=0.0, offset=1.0)
    torch.testing.assert_close(turned_q.flatten().tolist(), [-4.2, 0.4, 4.0, 5.0], **FLOAT64)
    torch.testing.assert_close(turned_k, -turned_q, **FLOAT64)


def test_positions_choose_rows_of_a_table() -> None:
    """The result is as if cos and sin had these rows."""
    cos, sin = angles(torch.float64)
    positions = torch.tensor([[4, 0, 2, 2, 1]])
    by_table = qk_norm_rope(*inputs(torch.float64), cos[0], sin[0], positions)
    by_rows = qk_norm_rope(*inputs(torch.float64), cos[:, positions[0]], sin[:, positions[0]])
    assert all(map(torch.equal, by_table, by_rows))


@pytest.mark.parametrize("options", [{}, {"eps": 0.5, "offset": 1.0, "casting": "gemma"}])
def test_gradients_are_the_derivatives(options: dict[str, Any]) -> None:
    """They agree with finite differences."""
    cos, sin = angles(torch.float64, 4)
    assert gradcheck(lambda *leaves: qk_norm_rope(*leaves, cos, sin, **options), inputs(torch.float64, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", [Qwen3RMSNorm, Gemma3RMSNorm])
def test_same_bits_as_transformers(module: type[torch.nn.Module], dtype: torch.dtype) -> None:
    """Heads and gradients of q and k have the bits of the attentions' code; sums for the weights round otherwise."""
    gemma = module is Gemma3RMSNorm
    q, k, *weights = inputs(dtype)
    cos, sin = angles(dtype)
    norms = [module(8, eps=1e-6).to(dtype) for _ in range(2)]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight = torch.nn.Parameter(weight.detach())
    theirs = apply_rotary_pos_emb(norms[0](q), norms[1](k), cos, sin)
    ours = qk_norm_rope(q, k, *weights, cos, sin, offset=float(gemma), casting="gemma" if gemma else "llama")
    assert all(map(torch.equal, ours, theirs))
    dys = [randn(*out.shape, dtype=dtype, seed=7).detach() for out in ours]
    for one, other in zip(*(grad(outs, (q, k), dys) for outs in (ours, theirs)), strict=True):
        assert torch.equal(one, other)
