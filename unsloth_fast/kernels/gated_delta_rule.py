"""The gated delta rule: linear attention by a state that decays and is corrected token by token, within documents.

    S'_t = exp(g_t) S_t-1      u_t = beta_t (v_t - S'_t^T k_t)      S_t = S'_t + k_t u_t^T      o_t = scale S_t^T q_t

Documents are cut into chunks of C tokens. Within a chunk let S be the state at its start, c_i the sum of g up to token
i, and Q, K, V, U, O and B matrices with a row per token, as are rows of other factors. Unrolling the recurrence gives

    A_ij = beta_i exp(c_i - c_j) k_i . k_j for j < i        (I + A) U = B        B = beta (V - exp(c) K S)
    P_ij = exp(c_i - c_j) q_i . k_j for j <= i              O = scale (exp(c) Q S + P U)
    the next state: exp(c_C) S + (exp(c_C - c) K)^T U

and, with dS the gradient of the next state and dO that of O times the scale, its derivatives:

    dU = P^T dO + exp(c_C - c) K dS        dB = (I + A)^-T dU        dV = beta dB
    the gradient of S: exp(c_C) dS + (exp(c) Q)^T dO - (exp(c) K)^T dV
    dP = dO U^T for j <= i                 dA = -dB U^T for j < i
    dQ = exp(c) dO S^T + (dP exp(c_i - c_j)) K
    dK = exp(c_C - c) U dS^T - exp(c) dV S^T + (dP exp(c_i - c_j))^T Q + (D + D^T) K, D_ij = dA_ij beta_i exp(c_i - c_j)
    dbeta = rows' sums of dB (V - exp(c) K S) and of dA A / beta
    dg_l = the sum of each gradient times its factor over all decays across l: exp(c_i - c_j) for j < l <= i, exp(c_i)
           for i >= l, exp(c_C - c_j) for j < l, and exp(c_C)

I + A is inverted by substitution in blocks, never by powers of A, which grow if keys are similar.

A pass first computes (I + A)^-1 and P of all chunks at once, then goes through each document, chunk by chunk, for each
head and some columns of v at once. The backward pass does so twice, forward for the states and U, and from the last
chunk to the first for dS and dB; then, for all chunks at once, it computes dg and dbeta with dP and dA, and from these
dq and dk. That recomputes the states instead of keeping them: one more forward pass. All sums are in a fixed order.

Saved: the inputs. Of bfloat16 tensors, the factors of each product are rounded to bfloat16, as are states, U, dS and
dB that one kernel keeps for another; tensor cores multiply them. Everything else, and all of it for other dtypes, is
float32, in which the inverse always is. On an H200 with Triton 3.6, tiles of 64 tokens in one pipeline stage gave NaN,
and products of numbers split into two of bfloat16 read outside of memory: neither is used. Tiles of 32 tokens are two
warps high. With 4 warps Triton would give each row to two of them, unless a matrix is wider than high.
Scratch of the forward pass: 8TMC bytes; of the backward pass, with b bytes per element of what is kept, also 2bTMDE / C
for the states and dS, and 2bTME for U and dB. Bytes moved at least, with b bytes per element: (2ND + 2ME)Tb forward,
(4ND + 3ME)Tb backward.
Multiplications per token and head of v: 3DE + 2CD + 2CE forward, 11DE + 7CD + 5CE backward.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._gated_delta_rule import (
    gated_delta_rule_backward_kernel,
    gated_delta_rule_dg_kernel,
    gated_delta_rule_dqdk_kernel,
    gated_delta_rule_forward_kernel,
    gated_delta_rule_solve_kernel,
)
from unsloth_fast.kernels._launch import (
    cdiv,
    check_runnable,
    launch,
    next_power_of_2,
    register,
    rows_in_one_piece,
    strides_of,
)
from unsloth_fast.kernels._replay import call
from unsloth_ref import checks, document_checks


def tile_of(q: Tensor, v: Tensor) -> dict[str, int]:
    """Tokens per chunk, columns of q and of v per program, and the rest of a launch, from widths, not from lengths."""
    width, columns = (max(16, next_power_of_2(tensor.shape[2])) for tensor in (q, v))
    narrow = q.dtype == torch.bfloat16
    tile = {"ROWS": 32, "WIDTH": width, "COLUMNS": min(64 if narrow else 32, columns), "NARROW": narrow}
    return tile | ({"num_warps": 4, "num_stages": 2} if narrow else {"num_warps": 8, "num_stages": 1})


class _Chunks:
    """The arguments that kernels of one call share, and what all of its chunks need first."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor) -> None:
        self.q, self.k, self.v = rows_in_one_piece(q, k, v)
        self.g, self.beta, self.bounds = g, beta, cu_seqlens.contiguous()
        (tokens, kv_heads, width), (heads, columns) = q.shape, v.shape[1:]
        self.tile, documents = tile_of(q, v), len(cu_seqlens) - 1
        self.scratch = torch.bfloat16 if self.tile["NARROW"] else torch.float32
        self.few_warps = self.tile | {"num_warps": 2 if self.tile["NARROW"] else 8}
        self.heads, self.kv_heads, self.documents = heads, kv_heads, documents
        self.chunks = tokens // self.tile["ROWS"] + documents
        slices = cdiv(columns, self.tile["COLUMNS"])
        self.sizes = tokens, heads, heads // kv_heads, width, columns
        self.slices, self.programs = slices, documents * heads * slices
        rows = self.tile["ROWS"]
        options = {name: value for name, value in self.few_warps.items() if name != "COLUMNS"}
        self.solved = q.new_empty((self.chunks, heads, 2, rows, rows), dtype=torch.float32)
        launch(
            gated_delta_rule_solve_kernel, self.chunks * heads, q,
            self.q, self.k, g, beta, self.bounds, self.solved, tokens, documents, heads, heads // kv_heads, width,
            *strides_of(self.q, self.k, g, beta), **options,
        )  # fmt: skip

    def states(self) -> Tensor:
        """Memory for a state per chunk and head."""
        _, heads, _, width, columns = self.sizes
        return self.q.new_empty((self.chunks, heads, width, columns), dtype=self.scratch)

    def forward(self, scale: float, out: Tensor, states: Tensor, u: Tensor, *, keep: bool) -> None:
        """Compute the output, or keep the states and U."""
        launch(
            gated_delta_rule_forward_kernel, self.programs, self.q,
            self.q, self.k, self.v, self.g, self.beta, self.bounds, self.solved, out, states, u,
            *self.sizes, self.slices, *strides_of(self.q, self.k, self.v, self.g, self.beta), scale,
            STATES=keep, **self.tile,
        )  # fmt: skip


def gated_delta_rule_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    """Compute the output, new and contiguous."""
    out = gated_delta_rule_forward_outputs(q, k, v)
    if len(q) and len(cu_seqlens) > 1:
        _Chunks(q, k, v, g, beta, cu_seqlens).forward(scale, out, out, out, keep=False)
    return out


def gated_delta_rule_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv, dg and dbeta, new and contiguous."""
    dq, dk, dv, dg, dbeta = gradients = gated_delta_rule_backward_outputs(do, q, k, v, g, beta)
    if len(q) == 0 or len(cu_seqlens) == 1:
        return gradients
    (do,) = rows_in_one_piece(do)
    c = _Chunks(q, k, v, g, beta, cu_seqlens)
    u, db = (v.new_empty(v.shape, dtype=c.scratch) for _ in range(2))
    states, dstates = c.states(), c.states()
    c.forward(scale, u, states, u, keep=True)
    launch(
        gated_delta_rule_backward_kernel, c.programs, q,
        do, c.q, c.k, g, beta, c.bounds, c.solved, dstates, db, dv,
        *c.sizes, c.slices, *strides_of(do, c.q, c.k, g, beta), scale, **c.tile,
    )  # fmt: skip
    launch(
        gated_delta_rule_dg_kernel, c.chunks * c.heads, q,
        do, c.q, c.k, c.v, g, beta, c.bounds, states, dstates, u, db, c.solved, dg, dbeta,
        len(q), c.documents, *c.sizes[1:], *strides_of(do, c.q, c.k, c.v, g, beta), scale,
        **c.few_warps | {"COLUMNS": 16},
    )  # fmt: skip
    launch(
        gated_delta_rule_dqdk_kernel, c.chunks * c.kv_heads, q,
        do, c.q, c.k, g, beta, c.bounds, states, dstates, u, db, c.solved, dq, dk,
        len(q), c.documents, *c.sizes[1:], *strides_of(do, c.q, c.k, g, beta), scale,
        **c.tile | {"COLUMNS": min(32, c.tile["COLUMNS"])},
    )  # fmt: skip
    return gradients


def gated_delta_rule_forward_outputs(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    """Allocate out."""
    return v.new_empty(v.shape)


def gated_delta_rule_backward_outputs(
    do: Tensor, *inputs: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate dq, dk, dv, dg and dbeta."""
    q, k, v, g, beta = (one.new_empty(one.shape) for one in inputs[:5] if isinstance(one, Tensor))
    return q, k, v, g, beta


INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor cu_seqlens, float scale"
forward_op = register(
    f"gated_delta_rule_forward({INPUTS}) -> Tensor", gated_delta_rule_forward, gated_delta_rule_forward_outputs
)
backward_op = register(
    f"gated_delta_rule_backward(Tensor do, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    gated_delta_rule_backward,
    gated_delta_rule_backward_outputs,
)


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, scale: float | None
    ) -> Tensor:
        ctx.scale = q.shape[2] ** -0.5 if scale is None else scale
        ctx.save_for_backward(q, k, v, g, beta, cu_seqlens)
        return forward_op(q, k, v, g, beta, cu_seqlens, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, do: Tensor, *saved: Tensor) -> Gradients:
        return *backward_op(do, *saved, ctx.scale), None, None


def check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, scale: float | None) -> None:
    """Raise for arguments that gated_delta_rule does not allow."""
    document_checks.gated_delta_rule_arguments(q, k, v, g, beta, cu_seqlens, scale)
    if checks.values_are_checked(cu_seqlens):
        document_checks.documents_cover(cu_seqlens, len(q), "q")
    for name, tensor in (("q", q), ("g", g), ("beta", beta)):
        check_runnable(name, tensor)


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
        q: [T, N, D], float16, bfloat16 or float32. Views whose last stride is 1 are not copied; others are.
        k: as q. The state does not grow if beta times the squared length of k is at most 2; models normalise k.
        v: [T, M, E], as q; N divides M.
        g: [T, M], float16, bfloat16 or float32: the logarithm of the decay, finite and at most 0. It is added up over
            chunks of 32 tokens in float32.
        beta: [T, M], float16, bfloat16 or float32: how much of the old value at k is replaced, 0 to 1 in most models.
        cu_seqlens: [documents + 1], int32: the first token of each document, then T. Documents may be empty.
        scale: factor of the output; 1 / sqrt(D) by default.

    Returns:
        [T, M, E] in q.dtype, contiguous.

    Raises:
        ValueError: wrong shapes or devices, a scale that is negative or infinite, or, on a CPU, cu_seqlens does not
            rise from 0 to T. On CUDA and in compiled code, tokens outside of all documents are undefined instead, and
            nothing outside the tensors is touched; UNSLOTH_DEBUG=1 makes CUDA raise too.
        TypeError: q, g or beta does not have a float dtype or is float64, k or v differs from q in dtype, or cu_seqlens
            is not int32.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: Yang et al. 2024, arXiv:2412.06464; chunks, Yang et al. 2024, arXiv:2406.06484.
    """
    return call(_GatedDeltaRule, check, q, k, v, g, beta, cu_seqlens, scale)
