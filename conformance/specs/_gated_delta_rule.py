"""How far off a result of the gated delta rule may be.

A bound term by term would be useless: |I - beta k k^T| makes a state of |values| grow without end. But I - beta k k^T
itself lengthens no vector if beta |k|^2 <= 2, nor does a decay. So errors are followed by their lengths, for each
column of a state, a recurrence of its own: a rounding at one token reaches later ones at most at its own length.

With s the column before token t, s' = exp(g) s, p = k . s', r = v - p, u = beta r, one unit of relative error makes

    e' = exp(g) e + W |s'|         of s', with W = 1 + the sum of |g| over CHUNK tokens: a kernel may add decays up
    |k| e' + |k| |s'| = e_p        of p
    beta (e_p + |v| + |p|) = e_u   of u; what part of it is due to e' only shortens e' and so does not count in
    e' + |k| beta (|k| |s'| + |v| + |p|) + |s| + |k u|     of the next s

and the gradient of s, from the last token to the first, makes errors of the same kind. A result that adds up products
of a state and other numbers over columns has the sum of their errors. Lengths bound errors in each direction; the root
mean square in one direction is 1 / sqrt(D) of it, and errors of different tokens and columns add as squares.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.spec import Call
from conformance.specs._documents import kept
from conformance.tolerances.bounds import UNIT_FLOAT32, Terms

CHUNK = 64  # tokens over which a kernel may add up decays before it takes the exponential


@dataclass(frozen=True)
class Sizes:
    """For each result the sum of its errors in units of one rounding, and the root of the sum of their squares."""

    size: dict[str, Tensor]
    root: dict[str, Tensor]

    def terms(self, name: str, call: Call, wide: bool) -> Terms:
        """The terms of a result; a wide one has a smaller unit roundoff than what is rounded on the way."""
        factor = call.unit / UNIT_FLOAT32 if wide else 1.0
        size = self.size[name]
        return Terms(factor * size, root=factor * self.root[name], in_float32=size)


class _Error:
    """Errors of numbers: bounds that add, and mean squares that add."""

    def __init__(self, size: Tensor, square: Tensor) -> None:
        self.size, self.square = size, square

    def __add__(self, other: "_Error") -> "_Error":
        return _Error(self.size + other.size, self.square + other.square)

    def times(self, factor: Tensor) -> "_Error":
        return _Error(self.size * factor.abs(), self.square * factor.square())

    def summed(self, dim: int) -> "_Error":
        return _Error(self.size.sum(dim), self.square.sum(dim))


def _rounded(length: Tensor, roundings: Tensor | float = 1.0) -> _Error:
    """Roundings of a number or a vector of this length."""
    length = length.abs()
    return _Error(length * roundings, length.square())


class _Token:
    """What one token sees: the numbers of the recurrence and their errors; heads [M], states [M, D, E]."""

    def __init__(self, call: Call, t: int, state: Tensor, error: _Error, roundings: Tensor) -> None:
        group = call.inputs["v"].shape[1] // call.inputs["q"].shape[1]
        self.q, self.k = (call.inputs[name][t].repeat_interleave(group, 0) for name in ("q", "k"))
        self.v, self.beta = call.inputs["v"][t], call.inputs["beta"][t][:, None]
        self.decay, self.roundings = call.inputs["g"][t].exp()[:, None], roundings[t][:, None]
        self.decayed = state * self.decay[..., None]
        self.length = self.decayed.norm(dim=1)
        self.error = error.times(self.decay) + _rounded(self.length, self.roundings)
        self.lk, self.lq = self.k.norm(dim=1)[:, None], self.q.norm(dim=1)[:, None]
        self.r = self.v - torch.einsum("mde,md->me", self.decayed, self.k)
        self.u = self.beta * self.r
        p = _rounded(self.lk * self.length) + _rounded(self.v) + _rounded(self.r)
        self.r_error = self.error.times(self.lk) + p
        self.u_error = self.r_error.times(self.beta)
        self.state = self.decayed + self.k[:, :, None] * self.u[:, None]
        growth = (1 - self.beta * self.lk.square()).abs().clamp(min=1.0)
        added = p.times(self.lk * self.beta) + _rounded(self.lk * self.u)
        self.after = self.error.times(growth) + added


def _no_error(like: Tensor) -> _Error:
    return _Error(torch.zeros_like(like), torch.zeros_like(like))


@kept
def sizes_of(call: Call) -> Sizes:
    """The errors of the output, and of the gradients if there are any."""
    inputs = call.inputs
    (tokens, _, width), (heads, columns) = inputs["q"].shape, inputs["v"].shape[1:]
    scale = call.options.get("scale")
    scale = width**-0.5 if scale is None else scale
    starts = set(inputs["cu_seqlens"].tolist())
    roundings = _decays_added(inputs["g"], starts)
    size, root = {"out": torch.zeros_like(inputs["v"])}, {"out": torch.zeros_like(inputs["v"])}
    state = inputs["v"].new_zeros(heads, width, columns)
    nothing = _no_error(state[:, 0])
    error, seen = nothing, []
    for t in range(tokens):
        if t in starts:
            state, error = torch.zeros_like(state), nothing
        token = _Token(call, t, state, error, roundings)
        state, error = token.state, token.after
        seen.append(token)
        found = (error + _rounded(state.norm(dim=1))).times(scale * token.lq)
        size["out"][t], root["out"][t] = found.size, found.square.sqrt() / width**0.5
    if call.grad_outputs:
        for name in ("q", "k", "v", "g", "beta"):
            size[name], root[name] = torch.zeros_like(inputs[name]), torch.zeros_like(inputs[name])
        _backward(seen, call.grad_outputs[0] * scale, starts, {name: (size[name], root[name]) for name in size})
    return Sizes(size, root)


def _decays_added(g: Tensor, starts: set[int]) -> Tensor:
    """One rounding, and those of a sum of logarithms over CHUNK tokens."""
    sums, running = torch.zeros_like(g), []
    for t in range(len(g)):
        running = [] if t in starts else running[-CHUNK + 1 :]
        running.append(g[t].abs())
        sums[t] = torch.stack(running).sum(0)
    return 1 + sums


def _backward(seen: list[_Token], do: Tensor, starts: set[int], into: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Follow the gradient of the state, the last token first, and fill in the errors of the gradients."""
    if not seen:
        return
    dstate, error = torch.zeros_like(seen[0].state), _no_error(do[0])
    for t in reversed(range(len(seen))):
        token = seen[t]
        if t + 1 in starts:
            dstate, error = torch.zeros_like(dstate), _no_error(do[0])
        dstate = dstate + token.q[:, :, None] * do[t][:, None]
        error = error + _rounded(token.lq * do[t])
        length = dstate.norm(dim=1)
        du = torch.einsum("mde,md->me", dstate, token.k)
        du_error = error.times(token.lk) + _rounded(token.lk * length)
        dv, dv_error = token.beta * du, du_error.times(token.beta)
        before = dstate - token.k[:, :, None] * dv[:, None]
        growth = (1 - token.beta * token.lk.square()).abs().clamp(min=1.0)
        before_error = error.times(growth) + _rounded(token.lk.square() * token.beta * length)
        before_length = before.norm(dim=1)
        state_length, state_error = token.state.norm(dim=1), token.after
        found = {
            "q": (state_error + _rounded(state_length)).times(do[t]).summed(-1),
            "k": (
                error.times(token.u) + token.u_error.times(length) + _rounded(token.u * length)
                + token.error.times(dv) + dv_error.times(token.length) + _rounded(dv * token.length)
            ).summed(-1),
            "v": dv_error + _rounded(dv),
            "beta": (du_error.times(token.r) + token.r_error.times(du) + _rounded(du * token.r)).summed(-1),
            "g": (
                before_error.times(token.length) + token.error.times(before_length)
                + _rounded(before_length * token.length, token.roundings)
            ).summed(-1),
        }  # fmt: skip
        width = len(token.q[0])
        for name, one in found.items():
            size, square = one.size, one.square / width
            if name in ("q", "k"):
                heads = into[name][0].shape[1]
                size, square = (x.view(heads, -1).sum(1)[:, None] for x in (size, square))
            into[name][0][t], into[name][1][t] = size, square.sqrt()
        dstate, error = before * token.decay[..., None], before_error.times(token.decay)
        error = error + _rounded(dstate.norm(dim=1), token.roundings)
