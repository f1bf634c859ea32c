"""Inputs of packed_attention, and the properties that both backends are tested for."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from tests.operations import leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: list[dict[str, Any]] = [{}, {"window": 3}, {"softcap": 2.0, "scale": 0.7}, {"window": 2, "softcap": 1.5}]
Function = Callable[..., Tensor]
randn = partial(leaves.randn, device=DEVICE)


def inputs_of(
    tokens: int, heads: int, kv_heads: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    q, k, v = (randn(tokens, n, width, seed=seed + i, dtype=dtype) for i, n in enumerate((heads, kv_heads, kv_heads)))
    return q, k, v


def bounds_of(*lengths: int) -> tuple[Tensor, int]:
    """cu_seqlens and max_seqlen of documents of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE), max(lengths, default=0)


def check_that_documents_are_independent(packed_attention: Function, options: dict[str, Any]) -> None:
    """The gradient of one document's loss is exactly 0 in others; its bits do not depend on them, NaN included."""
    tensors, (cu_seqlens, longest) = inputs_of(140, 2, 1, 16, dtype=torch.float32), bounds_of(35, 70, 35)
    mine = slice(35, 105)

    def run(scale: float) -> list[Tensor]:
        changed = [x.detach() * scale for x in tensors]
        for new, old in zip(changed, tensors, strict=True):
            new[mine] = old.detach()[mine]
        leaves = [x.requires_grad_() for x in changed]
        out = packed_attention(*leaves, cu_seqlens, longest, **options)[mine]
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


def _reordered(x: Tensor, lengths: list[int], order: list[int]) -> Tensor:
    """The documents in another order."""
    parts = x.split(lengths)
    return torch.cat([parts[index] for index in order])


def check_that_the_order_of_documents_does_not_matter(packed_attention: Function) -> None:
    """Each document has the same bits at any position, next to any other document; its gradients too."""
    lengths, order = [5, 0, 66, 1, 30], [2, 4, 1, 0, 3]
    tensors = inputs_of(sum(lengths), 2, 2, 8, dtype=torch.float32)
    do = randn(*tensors[0].shape, seed=9, dtype=torch.float32).detach()

    def run(arrange: Callable[[Tensor], Tensor], lengths: list[int]) -> list[Tensor]:
        leaves = [arrange(x.detach()).requires_grad_() for x in tensors]
        out = packed_attention(*leaves, *bounds_of(*lengths))
        return [out.detach(), *grad(out, leaves, arrange(do))]

    found = run(lambda x: x.clone(), lengths)
    moved = run(lambda x: _reordered(x, lengths, order), [lengths[index] for index in order])
    for one, other in zip(found, moved, strict=True):
        assert torch.equal(_reordered(one, lengths, order), other)


def check_that_grouped_heads_are_repeated_heads(packed_attention: Function) -> None:
    """The output has the same bits; a gradient of k or v is the sum over the heads of its group."""
    q, k, v = inputs_of(40, 6, 2, 16, dtype=torch.float32)
    repeated = [x.detach().repeat_interleave(3, 1).requires_grad_() for x in (k, v)]
    grouped = packed_attention(q, k, v, *bounds_of(15, 25))
    expected = packed_attention(q, *repeated, *bounds_of(15, 25))
    assert torch.equal(grouped, expected)
    of_q, *of_group = grad(grouped.square().sum(), (q, k, v))
    also_of_q, *of_each = grad(expected.square().sum(), (q, *repeated))
    assert torch.equal(of_q, also_of_q)
    for one, each in zip(of_group, of_each, strict=True):
        # Sums of 3 * 40 terms in another order.
        torch.testing.assert_close(one, each.unflatten(1, (2, 3)).sum(2), rtol=1e-5, atol=1e-5)


def check_the_longest_and_the_shortest_window(packed_attention: Function) -> None:
    """A window of the longest document gives the bits of no window; a window of one token gives v."""
    q, k, v = inputs_of(75, 2, 1, 16, dtype=torch.float32)
    cu_seqlens, longest = bounds_of(66, 9)
    without, with_window = (packed_attention(q, k, v, cu_seqlens, longest, window=w) for w in (None, longest))
    assert torch.equal(without, with_window)
    single = packed_attention(q, k, v, cu_seqlens, longest, window=1)
    assert torch.equal(single, v.expand(-1, 2, -1))


def check_thousands_of_documents(packed_attention: Function) -> None:
    """A document of one token gives its v, and a long one the bits that it has alone."""
    lengths = [1] * 400 + [70] + [0] * 1200 + [1] * 3
    q, k, v = inputs_of(sum(lengths), 1, 1, 16, dtype=torch.float32)
    out = packed_attention(q, k, v, *bounds_of(*lengths))
    short = torch.ones(len(q), dtype=torch.bool, device=DEVICE)
    short[400:470] = False
    assert torch.equal(out[short], v[short])
    alone = packed_attention(q[400:470], k[400:470], v[400:470], *bounds_of(70))
    assert torch.equal(out[400:470], alone)


PROPERTIES: dict[str, Callable[[Function], None]] = {
    **{f"independent documents {o}": partial(check_that_documents_are_independent, options=o) for o in OPTIONS},
    "order of documents": check_that_the_order_of_documents_does_not_matter,
    "grouped heads": check_that_grouped_heads_are_repeated_heads,
    "windows": check_the_longest_and_the_shortest_window,
    "thousands of documents": check_thousands_of_documents,
}
