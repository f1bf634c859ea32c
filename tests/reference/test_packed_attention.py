"""The reference packed_attention against values worked by hand, its formulas, PyTorch and transformers."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as attention_with_sinks

from tests.operations.packed_attention import (
    DEVICE,
    OPTIONS,
    PROPERTIES,
    bounds_of,
    inputs_of,
    randn,
)
from unsloth_ref.kernels import packed_attention

# Float64: sums of some hundred terms of order 1; a single step in float32 would have an error of 1e-8.
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def formulas(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, lengths: list[int], **options: Any
) -> list[np.ndarray]:
    """o, dq, dk, dv and dsinks, query by query, by the formulas of the module's docstring."""
    sinks, dsinks = options.get("sinks", np.full(q.shape[1], -np.inf)), np.zeros(q.shape[1])
    scale, cap = options.get("scale") or q.shape[2] ** -0.5, options.get("softcap", 0.0)
    group = q.shape[1] // k.shape[1]
    o, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    begin = 0
    for length in lengths:
        for i in range(begin, begin + length):
            seen = slice(max(begin, i + 1 - (options.get("window") or length)), i + 1)
            for h in range(q.shape[1]):
                g = h // group
                z = scale * k[seen, g] @ q[i, h]
                slope = np.ones_like(z)
                if cap:
                    z = cap * np.tanh(z / cap)
                    slope = 1 - (z / cap) ** 2
                total = np.exp(sinks[h]) + np.exp(z).sum()
                p = np.exp(z) / total
                o[i, h] = p @ v[seen, g]
                dv[seen, g] += p[:, None] * do[i, h]
                dp = v[seen, g] @ do[i, h]
                ds = p * (dp - p @ dp) * slope
                dsinks[h] -= np.exp(sinks[h]) / total * p @ dp
                dq[i, h] = scale * ds @ k[seen, g]
                dk[seen, g] += scale * ds[:, None] * q[i, h]
        begin += length
    return [o, dq, dk, dv, dsinks]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(0, 5), max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    width=st.integers(1, 5),
    options=st.sampled_from(OPTIONS),
    with_sinks=st.booleans(),
    spare=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_formulas_of_the_docstring(
    lengths: list[int],
    kv_heads: int,
    group: int,
    width: int,
    options: dict[str, Any],
    with_sinks: bool,
    spare: int,
    seed: int,
) -> None:
    """Output and gradients agree for documents of any lengths, for empty documents and for none."""
    tensors = inputs_of(sum(lengths), kv_heads * group, kv_heads, width, seed=seed)
    do = randn(*tensors[0].shape, seed=seed + 3).detach()
    cu_seqlens, longest = bounds_of(*lengths)
    sinks = {"sinks": randn(kv_heads * group, seed=seed + 4)} if with_sinks else {}
    out = packed_attention(*tensors, cu_seqlens, longest + spare, **options, **sinks)
    found = [out, *grad(out, (*tensors, *sinks.values()), do)]
    as_numpy = {name: sink.detach().cpu().numpy() for name, sink in sinks.items()}
    expected = formulas(*(x.detach().cpu().numpy() for x in (*tensors, do)), lengths, **options, **as_numpy)
    for ours, right in zip(found, expected[: len(found)], strict=True):
        torch.testing.assert_close(ours.detach().cpu().numpy(), right, **FLOAT64)


def test_values_worked_by_hand() -> None:
    """Equal scores give the mean of the seen values; a score larger by log 3 has three times the weight."""
    q = torch.ones(4, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.0, np.log(3.0), 0.0, 0.0], dtype=torch.float64).view(4, 1, 1)
    v = torch.tensor([4.0, 8.0, 1.0, 5.0], dtype=torch.float64).view(4, 1, 1)
    cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
    assert packed_attention(q, k, v, cu_seqlens, 2).flatten().tolist() == pytest.approx([4, 7, 1, 3])
    assert packed_attention(q, k, v, cu_seqlens, 2, window=1).flatten().tolist() == pytest.approx([4, 8, 1, 5])


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_the_derivatives(options: dict[str, Any]) -> None:
    """First and second derivatives agree with finite differences."""
    cu_seqlens, longest = bounds_of(2, 0, 3)

    def out(sinks: Tensor, *tensors: Tensor) -> Tensor:
        return packed_attention(*tensors, cu_seqlens, longest, **options, sinks=sinks)

    assert gradcheck(out, (randn(2, seed=7), *inputs_of(5, 2, 1, 2)))
    assert gradgradcheck(out, (randn(2, seed=7), *inputs_of(5, 2, 1, 2)))


def test_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 queries give the result of a single block."""
    tensors, (cu_seqlens, longest) = inputs_of(15, 2, 1, 3), bounds_of(6, 9)
    whole = packed_attention(*tensors, cu_seqlens, longest, window=7)
    monkeypatch.setattr(import_module("unsloth_ref.kernels.packed_attention"), "QUERIES", 4)
    torch.testing.assert_close(packed_attention(*tensors, cu_seqlens, longest, window=7), whole, **FLOAT64)


@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_code_reads_no_lengths(options: dict[str, Any]) -> None:
    """One mask for all documents gives the result of one document at a time."""
    tensors, (cu_seqlens, longest) = inputs_of(9, 2, 1, 3), bounds_of(4, 0, 5)
    compiled = torch.compile(packed_attention, fullgraph=True, backend="eager")
    found, expected = (f(*tensors, cu_seqlens, longest, **options) for f in (compiled, packed_attention))
    torch.testing.assert_close(found, expected, **FLOAT64)
    for one, other in zip(*(grad(out.square().sum(), tensors) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, **FLOAT64)


@pytest.mark.parametrize("group", [1, 4])
def test_one_document_is_causal_attention(group: int) -> None:
    """It is PyTorch's own, with its grouped heads."""
    tensors, (cu_seqlens, longest) = inputs_of(12, 2 * group, 2, 8), bounds_of(12)
    ours = packed_attention(*tensors, cu_seqlens, longest)
    theirs = scaled_dot_product_attention(*(x.transpose(0, 1) for x in tensors), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs.transpose(0, 1), **FLOAT64)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_agrees_with_transformers(softcap: float | None) -> None:
    """The result is that of Gemma 2's eager attention with a window in its mask, one document per sequence."""
    length, window = 7, 3
    q, k, v = (x.detach() for x in inputs_of(2 * length, 4, 2, 8))
    place = torch.arange(length, device=DEVICE)
    hidden = (place > place[:, None]) | (place <= place[:, None] - window)
    mask = torch.zeros(1, 1, length, length, dtype=q.dtype, device=DEVICE).masked_fill(hidden, -torch.inf)
    heads = (x.unflatten(0, (2, length)).transpose(1, 2) for x in (q, k, v))
    module: Any = SimpleNamespace(num_key_value_groups=2, head_dim=8, training=False)
    theirs, _ = eager_attention_forward(module, *heads, mask, scaling=0.3, softcap=softcap)
    ours = packed_attention(q, k, v, *bounds_of(length, length), scale=0.3, window=window, softcap=softcap or 0.0)
    # transformers computes the softmax in float32.
    torch.testing.assert_close(ours, theirs.flatten(0, 1), rtol=1e-6, atol=1e-6)


def test_sinks_agree_with_transformers() -> None:
    """gpt-oss's eager attention adds a column to the scores and drops it after the softmax."""
    q, k, v = inputs_of(7, 4, 2, 8)
    sinks = randn(4, seed=9)
    hidden = torch.ones(7, 7, dtype=torch.bool, device=DEVICE).triu(1)
    mask = torch.zeros(1, 1, 7, 7, dtype=q.dtype, device=DEVICE).masked_fill(hidden, -torch.inf)
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    module: Any = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    theirs, _ = attention_with_sinks(module, *heads, mask, scaling=8**-0.5)
    ours = packed_attention(q, k, v, *bounds_of(7), sinks=sinks)
    torch.testing.assert_close(ours, theirs[0], **FLOAT64)


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_of_both_backends(name: str) -> None:
    PROPERTIES[name](packed_attention)
