"""The scan of Mamba 2: a state per head that decays by one number per token, within documents.

    S_t = exp(a dt_t) S_t-1 + dt_t b_t x_t^T        y_t = S_t^T c_t + d x_t

S is [D, E] for each head of x, and 0 at the start of each document. With dS_t the gradient of S_t, through y_t too:

    dS_t-1 = exp(a dt_t) dS_t + c_t-1 dy_t-1^T          dg_t = exp(a dt_t) times the sum of the elements of dS_t * S_t-1
    dx_t = dt_t dS_t^T b_t + d dy_t     ddt_t = b_t . dS_t x_t + a dg_t     da = sum over t of dt_t dg_t
    db_t = dt_t dS_t x_t                dc_t = S_t dy_t                     dd = sum over t of dy_t . x_t

Heads of b and c are shared in groups: head h of x reads head h // (M / N) of b and c, whose gradients are sums over it.

Source: Dao and Gu 2024, arXiv:2405.21060. All arithmetic is float32 for any input dtype (float64 for float64), and
rounded once, at the end.
"""

import torch
from torch import Tensor

from unsloth_ref import document_checks


def mamba2_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Add dt b x^T to the state of each head, which decays by exp(a dt), and read the state at c; documents apart.

    Documents are independent: the bits of a document's output and gradients do not depend on any other document, even
    if that contains NaN. A NaN within a document may reach all of its rows, and the gradients of a and d.

    Args:
        x: [T, M, E], any float dtype.
        dt: [T, M], any float dtype: the length of a step, finite and at least 0; models apply softplus before.
        a: [M], any float dtype: the rate of the decay, finite and at most 0; models compute -exp of a logarithm.
        b: [T, N, D], as x; N divides M.
        c: as b.
        d: [M], any float dtype: how much of x is added to the output.
        cu_seqlens: [documents + 1], int32: the first token of each document, then T. Documents may be empty.

    Returns:
        [T, M, E] in x.dtype.

    Raises:
        ValueError: wrong shapes or devices, or cu_seqlens does not rise from 0 to T. Compiled code does not check the
            last; there, tokens outside of all documents are undefined.
        TypeError: x, dt, a or d does not have a float dtype, b or c differs from x in dtype, or cu_seqlens is not
            int32.
    """
    document_checks.mamba2_scan_arguments(x, dt, a, b, c, d, cu_seqlens)
    if not torch.compiler.is_compiling():
        document_checks.documents_cover(cu_seqlens, len(x), "x")
    (tokens, heads, columns), wide = x.shape, torch.promote_types(x.dtype, torch.float32)
    group = heads // b.shape[1]
    read, write = (rows.to(wide).repeat_interleave(group, 1)[..., None] for rows in (c, b))  # [T, M, D, 1]
    values, step = x.to(wide), dt.to(wide)[..., None]
    decay = (step * a.to(wide)[:, None]).exp()[..., None]
    starts = (torch.arange(tokens, device=x.device) == cu_seqlens[:, None]).any(0)
    state = values.new_zeros(heads, b.shape[2], columns)
    parts = [values[:0] + (read[:0] * write[:0]).sum(2) + step[:0] + decay[:0, ..., 0]]  # no tokens have gradients too
    for t in range(tokens):
        state = torch.where(starts[t], 0.0, state) * decay[t] + write[t] * (step[t] * values[t])[:, None]
        parts.append((state * read[t]).sum(1)[None])
    return (torch.cat(parts) + d.to(wide)[:, None] * values).to(x.dtype)
