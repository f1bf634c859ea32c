"""The reference rope against values worked by hand, its formulas, complex numbers and transformers."""

from math import pi, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.operations.leaves import randn
from unsloth_ref.kernels import rope

# Float64: three roundings of 1.1e-16 of products below 50 sum to less than 2e-14; a step in float32 does not.
FLOAT64: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-13}


def table(rows: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """cos and sin of position times 10000^(-2i / width), each twice, [rows, width]."""
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * 10000.0 ** (
        -2 * torch.arange(width // 2, dtype=torch.float64) / width
    )
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def test_values_worked_by_hand() -> None:
    """A rotation by 90 degrees maps (3, 4) to (-4, 3); one by 60 degrees maps (2, 0) to (1, sqrt 3)."""
    q = torch.tensor([3.0, 4.0], dtype=torch.float64).view(1, 1, 1, 2)
    k = torch.tensor([2.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    for angle, turned_q, turned_k in (
        (pi / 2, [-4.0, 3.0], [0.0, 2.0]),
        (pi / 3, [1.5 - 2 * sqrt(3), 2 + 1.5 * sqrt(3)], [1.0, sqrt(3)]),
    ):
        cos, sin = (f(torch.full((1, 1, 2), angle, dtype=torch.float64)) for f in (torch.cos, torch.sin))
        found = rope(q, k, cos, sin)
        torch.testing.assert_close(found[0].flatten().tolist(), turned_q, **FLOAT64)
        torch.testing.assert_close(found[1].flatten().tolist(), turned_k, **FLOAT64)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    length=st.integers(0, 4),
    half=st.integers(1, 5),
    rest=st.integers(0, 3),
    shared=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_formulas_of_the_docstring(
    batch: int, heads: int, kv_heads: int, length: int, half: int, rest: int, shared: bool, seed: int
) -> None:
    """Forward and backward agree half by half, also if the halves of cos and sin differ, and for empty tensors."""
    q, k = (randn(batch, h, length, 2 * half + rest, seed=seed + i) for i, h in enumerate((heads, kv_heads)))
    cos, sin = (randn(1 if shared else batch, length, 2 * half, seed=seed + i).detach() for i in (2, 3))
    outputs = rope(q, k, cos, sin)
    grad_outputs = [randn(*x.shape, seed=seed + 4).detach() for x in outputs]
    grads = grad(outputs, (q, k), grad_outputs)

    c1, c2, s1, s2 = (half_of[:, None] for t in (cos, sin) for half_of in (t[..., :half], t[..., half:]))
    for x, y, dy, dx in zip((q, k), outputs, grad_outputs, grads, strict=True):
        x1, x2, passing = x.split([half, half, rest], -1)
        dy1, dy2, dpassing = dy.split([half, half, rest], -1)
        torch.testing.assert_close(y, torch.cat([x1 * c1 - x2 * s1, x2 * c2 + x1 * s2, passing], -1), **FLOAT64)
        torch.testing.assert_close(dx, torch.cat([dy1 * c1 + dy2 * s2, dy2 * c2 - dy1 * s1, dpassing], -1), **FLOAT64)


def test_interleaved_pairs_are_complex_numbers_in_memory() -> None:
    """x_2i + i x_2i+1 is multiplied by exp(i angle); the gradient is the rotation back; other columns are copied."""
    cos, sin = table(5, 6)
    q, k = randn(2, 3, 5, 8), randn(2, 1, 5, 8, seed=1)
    turned, _ = rope(q, k, cos[None], sin[None], interleaved=True)
    angles = torch.complex(cos[:, :3], sin[:, :3])
    pairs = torch.view_as_complex(q[..., :6].unflatten(-1, (3, 2)))
    torch.testing.assert_close(turned[..., :6], torch.view_as_real(pairs * angles).flatten(-2), **FLOAT64)
    assert torch.equal(turned[..., 6:], q[..., 6:])
    dq = randn(2, 3, 5, 8, seed=2).detach()
    (found,) = grad(turned, q, dq)
    torch.testing.assert_close(found, rope(dq, k, cos[None], -sin[None], interleaved=True)[0], **FLOAT64)


def test_interleaved_angles_that_differ_within_a_pair() -> None:
    """The first half of cos and sin belongs to the even columns, the second to the odd ones."""
    q, cos, sin = (randn(1, 1, 1, 4, seed=seed).detach() for seed in range(3))
    turned, _ = rope(q, q, cos[0], sin[0], interleaved=True)
    (x, c, s) = (tensor.flatten().tolist() for tensor in (q, cos, sin))
    expected = [
        x[0] * c[0] - x[1] * s[0],
        x[1] * c[2] + x[0] * s[2],
        x[2] * c[1] - x[3] * s[1],
        x[3] * c[3] + x[2] * s[3],
    ]
    assert turned.flatten().tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("positions", [None, torch.tensor([[3, 0, 2]])])
def test_gradients_are_the_derivatives(positions: Tensor | None) -> None:
    """First and second derivatives agree with finite differences."""
    cos, sin = randn(4, 4).detach(), randn(4, 4, seed=1).detach()
    if positions is None:
        cos, sin = cos[None, :3], sin[None, :3]
    inputs = randn(2, 3, 3, 5, seed=2), randn(2, 1, 3, 5, seed=3)
    assert gradcheck(lambda q, k: rope(q, k, cos, sin, positions), inputs)
    assert gradgradcheck(lambda q, k: rope(q, k, cos, sin, positions), inputs)


def test_both_halves_are_one_complex_number() -> None:
    """x1 + i x2 times exp(i angle) keeps lengths; position 0 changes nothing; products depend on distances alone."""
    cos, sin = table(9, 8)
    q, k = randn(1, 2, 9, 8).detach(), randn(1, 2, 9, 8, seed=1).detach()
    turned_q, turned_k = rope(q, k, cos[None], sin[None])
    as_complex = torch.complex(*q.chunk(2, -1)) * torch.complex(cos[:, :4], sin[:, :4])
    torch.testing.assert_close(turned_q, torch.cat([as_complex.real, as_complex.imag], -1), **FLOAT64)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1), **FLOAT64)
    assert torch.equal(turned_q[:, :, 0], q[:, :, 0])
    one_q, one_k = q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k)
    same_q, same_k = rope(one_q, one_k, cos[None], sin[None])
    products = same_q @ same_k.mT
    for distance in range(9):
        along = products.diagonal(-distance, -2, -1)
        torch.testing.assert_close(along, along[..., :1].expand_as(along), rtol=1e-12, atol=1e-12)
    back_q, back_k = rope(turned_q, turned_k, cos[None], -sin[None])
    torch.testing.assert_close((back_q, back_k), (q, k), **FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_positions_choose_rows_of_the_table(dtype: torch.dtype) -> None:
    """Bits are the same as with the row of each token, for int32 and int64 positions, shared by sequences or not."""
    cos, sin = table(11, 6, dtype)
    q, k = randn(2, 3, 4, 8, dtype=dtype).detach(), randn(2, 1, 4, 8, dtype=dtype, seed=1).detach()
    positions = torch.tensor([[0, 1, 0, 10], [7, 7, 2, 3]])
    expected = rope(q, k, cos[positions], sin[positions])
    for width in (torch.int64, torch.int32):
        assert all(map(torch.equal, rope(q, k, cos, sin, positions.to(width)), expected))
    shared = rope(q, k, cos, sin, positions[:1])
    assert all(map(torch.equal, shared, rope(q, k, cos[positions[:1]], sin[positions[:1]])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_transformers(dtype: torch.dtype) -> None:
    """Value and gradients are those of apply_rotary_pos_emb with LlamaRotaryEmbedding's cos and sin."""
    config = LlamaConfig(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=16)
    q = randn(2, 3, 7, 16, dtype=dtype)
    k, dq, dk = (randn(2, heads, 7, 16, dtype=dtype, seed=heads) for heads in (1, 3, 1))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [5, 6, 7, 8, 9, 10, 11]])
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    ours, theirs = rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
    assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, grad(ours, (q, k), (dq, dk)), grad(theirs, (q, k), (dq, dk))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_in_float32_round_once(dtype: torch.dtype) -> None:
    """The result is that of float32, rounded."""
    cos, sin = (t[None] for t in table(5, 8, torch.float32))
    q, k = randn(2, 3, 5, 8, dtype=dtype).detach(), randn(2, 1, 5, 8, dtype=dtype, seed=1).detach()
    narrow, wide = rope(q, k, cos, sin), rope(q.float(), k.float(), cos, sin)
    assert all(
        one.dtype == dtype and torch.equal(one, other.to(dtype)) for one, other in zip(narrow, wide, strict=True)
    )


def test_an_unchecked_position_outside_the_table_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotated columns of its own token are NaN."""
    monkeypatch.setattr("unsloth_ref.checks.values_are_checked", lambda positions: False)
    cos, sin = table(4, 2)
    q = randn(1, 2, 3, 3).detach()
    turned, _ = rope(q, q, cos, sin, torch.tensor([[1, 4, -1]]))
    assert turned[..., :2].isnan().all(-1).tolist() == [[[False, True, True]] * 2]
    assert torch.equal(turned[..., 2], q[..., 2])
