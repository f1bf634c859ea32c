"""The gated delta rule: linear attention by a state that decays and is corrected token by token, within documents.

    S'_t = exp(g_t) S_t-1      u_t = beta_t (v_t - S'_t^T k_t)      S_t = S'_t + k_t u_t^T      o_t = scale S_t^T q_t

S is [D, E] for each head of v, and 0 at the start of each document. In one formula, transposed as in the literature:
S_t = exp(g_t) S_t-1 (I - beta_t k_t k_t^T) + beta_t v_t k_t^T. With dS_t the gradient of S_t, that of o_t included:

    du_t = dS_t^T k_t         dS'_t = dS_t - beta_t k_t du_t^T      dS_t-1 = exp(g_t) dS'_t + scale q_t-1 do_t-1^T
    dq_t = scale S_t do_t     dv_t = beta_t du_t                    dk_t = dS_t u_t - S'_t dv_t
    dbeta_t = du_t . (v_t - S'_t^T k_t)                             dg_t = sum of the elements of dS'_t * S'_t

Heads of q and k are shared in groups: head h of v reads head h // (M / N) of q and k, whose gradients are sums over it.

Source: Yang et al. 2024, arXiv:2412.06464. All arithmetic is float32 for any input dtype (float64 for float64), and
rounded once, at the end.
"""

import torch
from torch import Tensor

from unsloth_ref import document_checks


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Write v at k into the state of each head, which decays by exp(g), and read the state at q; documents apart.

    Documents are independent: the bits of a document's output and gradients do not depend on any other document, even
    if that contains NaN. A NaN within a document may reach all of its rows.

    Args:
        q: [T, N, D], any float dtype.
        k: as q. The state does not grow if beta times the squared length of k is at most 2; models normalise k.
        v: [T, M, E], as q; N divides M.
        g: [T, M], any float dtype: the logarithm of the decay, finite and at most 0.
        beta: [T, M], any float dtype: how much of the old value at k is replaced, 0 to 1 in most models.
        cu_seqlens: [documents + 1], int32: the first token of each document, then T. Documents may be empty.
        scale: factor of the output; 1 / sqrt(D) by default.

    Returns:
        [T, M, E] in q.dtype.

    Raises:
        ValueError: wrong shapes or devices, a scale that is negative or infinite, or cu_seqlens does not rise from 0 to
            T. Compiled code does not check the last; there, tokens outside of all documents are undefined.
        TypeError: q, g or beta does not have a float dtype, k or v differs from q in dtype, or cu_seqlens is not int32.
    """
    document_checks.gated_delta_rule_arguments(q, k, v, g, beta, cu_seqlens, scale)
    if not torch.compiler.is_compiling():
        document_checks.documents_cover(cu_seqlens, len(q), "q")
    (tokens, heads, width), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    q, k = (x.to(wide).repeat_interleave(v.shape[1] // heads, 1)[..., None] for x in (q, k))  # [T, M, D, 1]
    factor = width**-0.5 if scale is None else scale
    values, rate, decay = v.to(wide), beta.to(wide)[..., None], g.to(wide).exp()[..., None, None]
    starts = (torch.arange(tokens, device=q.device) == cu_seqlens[:, None]).any(0)
    state = values.new_zeros(v.shape[1], width, v.shape[2])
    parts = [values[:0] + (q[:0] * k[:0]).sum(2) + rate[:0] + decay[:0, ..., 0]]  # no tokens have gradients too
    for t in range(tokens):
        state = torch.where(starts[t], 0.0, state) * decay[t]
        correction = rate[t] * (values[t] - (state * k[t]).sum(1))
        state = state + k[t] * correction[:, None]
        parts.append(factor * (state * q[t]).sum(1)[None])
    return torch.cat(parts).to(v.dtype)
