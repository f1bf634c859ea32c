"""Rotary position embedding of queries and keys: pairs of columns of a head, of both halves or neighbours, are rotated.

    y1 = x1 * cos1 - x2 * sin1      y2 = x2 * cos2 + x1 * sin2
    dx1 = dy1 * cos1 + dy2 * sin2   dx2 = dy2 * cos2 - dy1 * sin1

x1 and x2 are the halves of the first D' columns of a head; interleaved, they are its even and its odd columns. cos1,
cos2, sin1 and sin2 are the halves of cos and sin. The two halves are usually equal: the backward pass is then the
rotation by the opposite angle. Columns from D' on are copied.

Source: Su et al. 2021, arXiv:2104.09864. Rounding, as in transformers' apply_rotary_pos_emb: each product and then the
sum are rounded to the wider dtype of x and cos.
"""

from torch import Tensor

from unsloth_ref import checks


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their positions.

    Args:
        q: [B, N, S, D], any float dtype.
        k: [B, K, S, D], as q; K need not divide N. Either may be 0.
        cos: [B or 1, S, D'], or with positions a table [P, D']; in q's dtype or float32. With float32 the products and
            their sum are rounded to float32. D' is even and at most D. A constant: it gets no gradient.
        sin: as cos.
        positions: [B or 1, S], int32 or int64: the row of the table for each token.
        interleaved: False pairs column i with column D'/2 + i, True column 2i with column 2i + 1. In both, column i of
            cos and sin is for the first column of pair i, column D'/2 + i for the second.

    Returns:
        q and k rotated, each in its own shape and dtype.

    Raises:
        ValueError: wrong shapes or devices; cos or sin requires a gradient; on a CPU, a position outside the table. On
            CUDA and in compiled code the rotated columns of such a token are NaN instead; UNSLOTH_DEBUG=1 makes CUDA
            raise too.
        TypeError: q does not have a float dtype, k differs from it in dtype, cos or sin is neither in q's dtype nor
            float32, or positions are not int32 or int64.
    """
    checks.rope_arguments(q, k, cos, sin, positions)
    if positions is not None:
        if checks.values_are_checked(positions):
            checks.positions_in_table(positions, len(cos))
        outside = (positions < 0) | (positions >= len(cos))
        rows = positions.long().masked_fill(outside, 0)
        cos, sin = (table[rows].masked_fill(outside[..., None], float("nan")) for table in (cos, sin))
    return _rotated(q, cos[:, None], sin[:, None], interleaved), _rotated(k, cos[:, None], sin[:, None], interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    half = width // 2
    of_first = slice(0, width, 2) if interleaved else slice(half)
    of_second = slice(1, width, 2) if interleaved else slice(half, width)
    first, second = x[..., of_first], x[..., of_second]
    y = x.clone()
    y[..., of_first] = first * cos[..., :half] - second * sin[..., :half]
    y[..., of_second] = second * cos[..., half:] + first * sin[..., half:]
    return y
