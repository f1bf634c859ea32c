"""Packed attention against its formulas, PyTorch, transformers and the laws that documents keep; both backends."""

from collections.abc import Callable
from importlib import import_module
from itertools import accumulate
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

from unsloth_fast import kernels as fast
from unsloth_ref import kernels as reference
from unsloth_ref.kernels import packed_attention

# Float64: sums of some hundred terms of order 1; a single step in float32 would be off by 1e-8.
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
LAWS = settings(max_examples=40, deadline=None, derandomize=True, database=None)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = pytest.mark.parametrize("backend", [reference, fast], ids=["reference", "fast"])
OPTIONS: list[dict[str, Any]] = [{}, {"window": 3}, {"softcap": 2.0, "scale": 0.7}, {"window": 2, "softcap": 1.5}]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers from a seed of their own, ready for gradients."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def inputs(tokens: int, heads: int, kv_heads: int, width: int, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    seed = how.pop("seed", 0)
    return tuple(randn(tokens, n, width, seed=seed + i, **how) for i, n in enumerate((heads, kv_heads, kv_heads)))  # type: ignore[return-value]


def bounds(*lengths: int) -> tuple[Tensor, int]:
    """cu_seqlens and max_seqlen of documents of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE), max(lengths, default=0)


def formulas(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, lengths: list[int], **options: Any
) -> list[np.ndarray]:
    """o, dq, dk and dv query by query, as the module's docstring writes them."""
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
                p = np.exp(z) / np.exp(z).sum()
                o[i, h] = p @ v[seen, g]
                dv[seen, g] += p[:, None] * do[i, h]
                dp = v[seen, g] @ do[i, h]
                ds = p * (dp - p @ dp) * slope
                dq[i, h] = scale * ds @ k[seen, g]
                dk[seen, g] += scale * ds[:, None] * q[i, h]
        begin += length
    return [o, dq, dk, dv]


@LAWS
@given(
    lengths=st.lists(st.integers(0, 5), max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    width=st.integers(1, 5),
    options=st.sampled_from(OPTIONS),
    spare=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_formulas_of_the_docstring(
    lengths: list[int], kv_heads: int, group: int, width: int, options: dict[str, Any], spare: int, seed: int
) -> None:
    """Output and gradients, for documents of any lengths, none and empty ones too."""
    tensors = inputs(sum(lengths), kv_heads * group, kv_heads, width, seed=seed)
    do = randn(*tensors[0].shape, seed=seed + 3).detach()
    cu_seqlens, longest = bounds(*lengths)
    out = packed_attention(*tensors, cu_seqlens, longest + spare, **options)
    found = [out, *grad(out, tensors, do)]
    expected = formulas(*(x.detach().cpu().numpy() for x in (*tensors, do)), lengths, **options)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach().cpu().numpy(), right, **FLOAT64)


def test_values_worked_by_hand() -> None:
    """Equal scores give the mean of what is seen; a score that is larger by log 3 weighs three times as much."""
    q = torch.ones(4, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.0, np.log(3.0), 0.0, 0.0], dtype=torch.float64).view(4, 1, 1)
    v = torch.tensor([4.0, 8.0, 1.0, 5.0], dtype=torch.float64).view(4, 1, 1)
    cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
    assert packed_attention(q, k, v, cu_seqlens, 2).flatten().tolist() == pytest.approx([4, 7, 1, 3])
    assert packed_attention(q, k, v, cu_seqlens, 2, window=1).flatten().tolist() == pytest.approx([4, 8, 1, 5])


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_the_derivatives(options: dict[str, Any]) -> None:
    """First and second derivatives against finite differences."""
    cu_seqlens, longest = bounds(2, 0, 3)

    def out(*tensors: Tensor) -> Tensor:
        return packed_attention(*tensors, cu_seqlens, longest, **options)

    assert gradcheck(out, inputs(5, 2, 1, 2))
    assert gradgradcheck(out, inputs(5, 2, 1, 2))


def test_more_queries_than_are_scored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of 4 queries as in one."""
    tensors, (cu_seqlens, longest) = inputs(15, 2, 1, 3), bounds(6, 9)
    whole = packed_attention(*tensors, cu_seqlens, longest, window=7)
    monkeypatch.setattr(import_module("unsloth_ref.kernels.packed_attention"), "QUERIES", 4)
    torch.testing.assert_close(packed_attention(*tensors, cu_seqlens, longest, window=7), whole, **FLOAT64)


@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_code_reads_no_lengths(options: dict[str, Any]) -> None:
    """One mask for all documents gives what a document at a time gives."""
    tensors, (cu_seqlens, longest) = inputs(9, 2, 1, 3), bounds(4, 0, 5)
    compiled = torch.compile(packed_attention, fullgraph=True, backend="eager")
    found, expected = (f(*tensors, cu_seqlens, longest, **options) for f in (compiled, packed_attention))
    torch.testing.assert_close(found, expected, **FLOAT64)
    for one, other in zip(*(grad(out.square().sum(), tensors) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, **FLOAT64)


@pytest.mark.parametrize("group", [1, 4])
def test_one_document_is_causal_attention(group: int) -> None:
    """PyTorch's own, with its grouped heads."""
    tensors, (cu_seqlens, longest) = inputs(12, 2 * group, 2, 8), bounds(12)
    ours = packed_attention(*tensors, cu_seqlens, longest)
    theirs = scaled_dot_product_attention(*(x.transpose(0, 1) for x in tensors), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs.transpose(0, 1), **FLOAT64)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_agrees_with_transformers(softcap: float | None) -> None:
    """Gemma 2's eager attention, a sliding window in its mask, a document a sequence."""
    length, window = 7, 3
    q, k, v = (x.detach() for x in inputs(2 * length, 4, 2, 8))
    place = torch.arange(length, device=DEVICE)
    hidden = (place > place[:, None]) | (place <= place[:, None] - window)
    mask = torch.zeros(1, 1, length, length, dtype=q.dtype, device=DEVICE).masked_fill(hidden, -torch.inf)
    heads = (x.unflatten(0, (2, length)).transpose(1, 2) for x in (q, k, v))
    module: Any = SimpleNamespace(num_key_value_groups=2, head_dim=8, training=False)
    theirs, _ = eager_attention_forward(module, *heads, mask, scaling=0.3, softcap=softcap)
    ours = packed_attention(q, k, v, *bounds(length, length), scale=0.3, window=window, softcap=softcap or 0.0)
    # transformers takes the softmax in float32.
    torch.testing.assert_close(ours, theirs.flatten(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
@BACKENDS
def test_no_gradient_crosses_documents_and_no_bit_moves(backend: Any, options: dict[str, Any]) -> None:
    """The middle document's loss: exactly 0 elsewhere; its bits stay when the others change, to NaN even."""
    tensors, (cu_seqlens, longest) = inputs(140, 2, 1, 16, dtype=torch.float32), bounds(35, 70, 35)
    mine = slice(35, 105)

    def run(scale: float) -> list[Tensor]:
        changed = [x.detach() * scale for x in tensors]
        for new, old in zip(changed, tensors, strict=True):
            new[mine] = old.detach()[mine]
        leaves = [x.requires_grad_() for x in changed]
        out = backend.packed_attention(*leaves, cu_seqlens, longest, **options)[mine]
        return [out.detach(), *grad(out.square().sum(), leaves)]

    first = run(1.0)
    for gradient in first[1:]:
        assert not gradient[:35].any()
        assert not gradient[105:].any()
        assert gradient[mine].any()
    for scale in (-3.0, float("nan")):
        for one, other in zip(first, run(scale), strict=True):
            one, other = (x if len(x) == 70 else x[mine] for x in (one, other))
            assert torch.equal(one, other)


def by_documents(x: Tensor, lengths: list[int], order: list[int]) -> Tensor:
    """The documents in another order."""
    parts = x.split(lengths)
    return torch.cat([parts[index] for index in order])


@BACKENDS
def test_documents_in_another_order_keep_their_bits(backend: Any) -> None:
    """Where a document lies, and beside which, changes nothing; in the gradients too."""
    lengths, order = [5, 0, 66, 1, 30], [2, 4, 1, 0, 3]
    tensors = inputs(sum(lengths), 2, 2, 8, dtype=torch.float32)
    do = randn(*tensors[0].shape, seed=9, dtype=torch.float32).detach()

    def run(place: Callable[[Tensor], Tensor], lengths: list[int]) -> list[Tensor]:
        leaves = [place(x.detach()).requires_grad_() for x in tensors]
        out = backend.packed_attention(*leaves, *bounds(*lengths))
        return [out.detach(), *grad(out, leaves, place(do))]

    plain = run(lambda x: x.clone(), lengths)
    moved = run(lambda x: by_documents(x, lengths, order), [lengths[index] for index in order])
    for one, other in zip(plain, moved, strict=True):
        assert torch.equal(by_documents(one, lengths, order), other)


@BACKENDS
def test_grouped_heads_are_repeated_heads(backend: Any) -> None:
    """The output bit for bit; a gradient of k or v is the sum over the heads of its group."""
    q, k, v = inputs(40, 6, 2, 16, dtype=torch.float32)
    repeated = [x.detach().repeat_interleave(3, 1).requires_grad_() for x in (k, v)]
    grouped = backend.packed_attention(q, k, v, *bounds(15, 25))
    plain = backend.packed_attention(q, *repeated, *bounds(15, 25))
    assert torch.equal(grouped, plain)
    of_q, *of_group = grad(grouped.square().sum(), (q, k, v))
    also_of_q, *of_each = grad(plain.square().sum(), (q, *repeated))
    assert torch.equal(of_q, also_of_q)
    for one, each in zip(of_group, of_each, strict=True):
        # Sums of 3 * 40 terms in another order.
        torch.testing.assert_close(one, each.unflatten(1, (2, 3)).sum(2), rtol=1e-5, atol=1e-5)


@BACKENDS
def test_a_window_as_long_as_the_longest_document_is_none(backend: Any) -> None:
    """Bit for bit; and a window of one token hands out v."""
    q, k, v = inputs(75, 2, 1, 16, dtype=torch.float32)
    cu_seqlens, longest = bounds(66, 9)
    plain, wide = (backend.packed_attention(q, k, v, cu_seqlens, longest, window=w) for w in (None, longest))
    assert torch.equal(plain, wide)
    single = backend.packed_attention(q, k, v, cu_seqlens, longest, window=1)
    assert torch.equal(single, v.expand(-1, 2, -1))


@pytest.mark.parametrize("window", [1, 4, 63, 64, 65, 100])
def test_windows_beside_the_edges_of_tiles(window: int) -> None:
    """The fast kernels against the reference in float64: 150 keys are three tiles of them."""
    tensors = inputs(160, 1, 1, 16, dtype=torch.float32)
    do, (cu_seqlens, longest) = randn(160, 1, 16, seed=4).detach(), bounds(10, 150)
    out = fast.packed_attention(*tensors, cu_seqlens, longest, window=window)
    found = [out, *grad(out, tensors, do.float())]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = reference.packed_attention(*wide, cu_seqlens, longest, window=window)
    for ours, right in zip(found, [exact, *grad(exact, wide, do.float().double())], strict=True):
        # The product of 16 and the sum of up to 100 terms of order 1: some tens of roundings of 6e-8.
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
def test_offsets_past_32_bits(place: int) -> None:
    """Two tokens 2^31 elements apart, in float16: four gigabytes of addresses, two rows of memory."""
    tensors = [x.detach() for x in inputs(2, 1, 1, 16, dtype=torch.float16)]
    far = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE).as_strided((2, 1, 16), (2**31, 16, 1))
    spread = [far.copy_(x) if index == place else x for index, x in enumerate(tensors)]
    results = []
    for given_tensors in (tensors, spread):
        leaves = [x.requires_grad_() for x in (y.detach() for y in given_tensors)]
        out = fast.packed_attention(*leaves, *bounds(2))
        results.append([out, *grad(out.square().sum(), leaves)])
    assert all(map(torch.equal, *results))


@BACKENDS
def test_thousands_of_documents_beside_a_long_one(backend: Any) -> None:
    """A document of one token hands out its v, wherever it lies."""
    lengths = [1] * 400 + [70] + [0] * 1200 + [1] * 3
    q, k, v = inputs(sum(lengths), 1, 1, 16, dtype=torch.float32)
    out = backend.packed_attention(q, k, v, *bounds(*lengths))
    short = torch.ones(len(q), dtype=torch.bool, device=DEVICE)
    short[400:470] = False
    assert torch.equal(out[short], v[short])
    alone = backend.packed_attention(q[400:470], k[400:470], v[400:470], *bounds(70))
    assert torch.equal(out[400:470], alone)
