"""How does a result round numbers that lie half-way between two numbers of 16 bits? A cast takes the even one.

A rounding written by hand often takes the larger of the two. Both are equally near, so that no bound of an error shows
it, and a mean error hardly: few numbers are ties. Where the truth is a tie and plain PyTorch takes the even number, a
right kernel takes it too; or either of the two, if its own float32 roundings have moved the number before. A kernel
that takes the other one by a rule has another rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIES = 16  # distinct ones, at all of which another rule than the right one holds: no chance
SAMPLE = 2**22  # elements that are examined
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32 number that the dtype lacks


def other_rule(y: Tensor, r: Tensor, p: Tensor) -> str:
    """The rule by which a result rounds ties, in words; empty if it is that of a cast, or if ties are too few.

    Args:
        y: the result, [n], in 16 bits.
        r: the truth, [n], float64.
        p: the result of plain PyTorch, [n].
    """
    y, r, p, dtype = y[:SAMPLE].float(), r[:SAMPLE], p[:SAMPLE].float(), y.dtype
    half, limits = 1 << (_DROPPED[dtype] - 1), torch.finfo(dtype)
    bits = r.float().view(torch.int32)
    tie = (r.float() == r) & (r.abs() >= limits.smallest_normal) & (r.abs() < limits.max)
    tie &= (bits & (2 * half - 1)) == half
    tie &= p == r.to(dtype).float()
    y, r, even, below = (tensor[tie] for tensor in (y, r, p, (bits & -2 * half).view(torch.float32)))
    above = ((bits & -2 * half) + 2 * half).view(torch.float32)[tie]
    rules = {
        "away from 0": above,
        "towards 0": below,
        "up": torch.where(r > 0, above, below),
        "down": torch.where(r > 0, below, above),
        "to the odd number": above + below - even,
    }
    for words, number in rules.items():
        if y.equal(number) and r[number != even].unique().numel() >= TIES:
            return words
    return ""
