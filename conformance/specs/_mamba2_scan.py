"""How far off a result of the scan of Mamba 2 may be.

All results are sums of products of the inputs and of decays between tokens of a document. With D_ij = exp(s_i - s_j),
s the sum of a dt within a document, j <= i, sizes of the terms are those sums with absolute values:

    y_i: sum over j of D_ij dt_j |c_i|.|b_j| |x_j|, and |d x_i|     x_j, b_j, c_i: the same with another one left out
    dt_j: sum over i of Z_ij = D_ij |c_i|.|b_j| |dy_i|.|x_j|, and |a| g_j, with g_l: sum over i >= l > j of dt_j Z_ij
    a: sum over l of dt_l g_l                                       d: sum over i of |dy_i|.|x_i|

A kernel may round the factor of a pair i, j, and also a state S_i = sum over j of D_ij dt_j b_j x_j^T or its gradient,
before it multiplies them. Roundings of factors are independent of each other, as are those of the elements of a state:
the squares of both add up.

In float32 a decay is as exact as the sum that it is the exponential of. A kernel may add up a dt over CHUNK tokens and
take differences: D_ij has 1 + w_i + w_j + |s_i - s_j| errors, w the sum of |a dt| over the last CHUNK tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from conformance.spec import Call
from conformance.specs._documents import kept
from conformance.tolerances.bounds import UNIT_FLOAT32, Terms
from unsloth_ref import document_checks

CHUNK = 256  # tokens over which a kernel may add up decays before it takes the exponential
STATES = 2**27  # elements of the states of all tokens that are computed at a time


@dataclass(frozen=True)
class Sums:
    """The sum of the terms of a result, the sum of squares of what is rounded, and what is added up in float32."""

    size: Tensor
    square: Tensor
    in_float32: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Sums"]) -> "Sums":
        """Of all heads, from some each."""
        return cls(*(torch.cat([getattr(one, field.name) for one in parts]) for field in fields(cls)))

    def transpose(self) -> "Sums":
        """By token first, from heads first."""
        return Sums(*(part.transpose(0, 1) for part in (self.size, self.square, self.in_float32)))

    def of_groups(self, group: int) -> "Sums":
        """The sums over the heads of a group, [M, T, D] to [N, T, D]."""
        return Sums(*(part.unflatten(0, (-1, group)).sum(1) for part in (self.size, self.square, self.in_float32)))

    def terms(self, call: Call, wide: bool) -> Terms:
        """The terms of a result; a wide one has a smaller unit roundoff than what is rounded on the way."""
        factor = call.unit / UNIT_FLOAT32 if wide else 1.0
        return Terms(factor * self.size, root=factor * self.square.sqrt(), in_float32=self.in_float32)


class _Scan:
    """The inputs of some heads, [M, T, ..], D [M, i, j] and its errors, S and |c_i|.|b_j|; NaN counts as 0."""

    def __init__(self, call: Call, heads: slice) -> None:
        inputs = {name: x.nan_to_num(0.0) if x.is_floating_point() else x for name, x in call.inputs.items()}
        group = inputs["x"].shape[1] // inputs["b"].shape[1]
        self.x, self.dt, self.a = inputs["x"].transpose(0, 1)[heads], inputs["dt"].t()[heads], inputs["a"][heads, None]
        self.b, self.c = (inputs[name].repeat_interleave(group, 1).transpose(0, 1)[heads] for name in "bc")
        self.d = inputs["d"].abs()[heads, None, None]
        self.decay, self.errors = _decays(self.a * self.dt, inputs["cu_seqlens"])
        self.weight = self.decay * self.dt[:, None]
        self.state = torch.einsum("mjd,mje,mij->mide", self.b, self.x, self.weight)
        self.scores = self.c.abs() @ self.b.abs().mT

    def sums(self, weight: Tensor, errors: Tensor, rows: Tensor, by_state: Tensor) -> Sums:
        """Of weights [M, T, T] times rows; `by_state` are the squares of what a rounded state is multiplied by."""
        square = weight.square() @ rows.square() + by_state
        return Sums(weight @ rows.abs(), square, (weight * errors) @ rows.abs())

    def skip(self, sums: Sums, rows: Tensor) -> Sums:
        """With d times rows added."""
        skipped = self.d * rows.abs()
        return Sums(sums.size + skipped, sums.square, sums.in_float32 + skipped)

    def output(self) -> Sums:
        """Of y."""
        by_state = torch.einsum("mid,mide->mie", self.c.square(), self.state.square())
        return self.skip(self.sums(self.weight * self.scores, self.errors, self.x, by_state), self.x)

    def gradients(self, dy: Tensor) -> dict[str, Sums]:
        """Of every input, by head, from the gradient of y by head."""
        dstate = torch.einsum("mid,mie,mij->mjde", self.c, dy, self.decay)
        by_x = self.weight * (dy.abs() @ self.x.abs().mT)
        squares, step = dstate.square(), self.dt.square()[..., None]
        of_x = step * torch.einsum("mjd,mjde->mje", self.b.square(), squares)
        of_b = step * torch.einsum("mje,mjde->mjd", self.x.square(), squares)
        of_c = torch.einsum("mie,mide->mid", dy.square(), self.state.square())
        skipped = (dy * self.x).abs().flatten(1)
        return self._of_steps(dy, dstate) | {
            "x": self.skip(self.sums((self.weight * self.scores).mT, self.errors.mT, dy, of_x), dy),
            "b": self.sums(by_x.mT, self.errors.mT, self.c, of_b),
            "c": self.sums(by_x, self.errors, self.b, of_c),
            "d": Sums(skipped.sum(1), skipped.square().sum(1), skipped.sum(1)),
        }

    def _of_steps(self, dy: Tensor, dstate: Tensor) -> dict[str, Sums]:
        """Of dt and a. A rounding of a state reaches all later tokens: those of a add up by their sizes."""
        pairs = self.decay * self.scores * (dy.abs() @ self.x.abs().mT)
        written = torch.einsum("mjd,mje->mjde", self.b, self.x)
        by_dstate = (written * dstate).square().sum((2, 3))
        decayed = self.state - self.dt[..., None, None] * written
        step = self.dt[:, None]
        size, in_float32 = _across(pairs * step), _across(pairs * self.errors * step)
        square = _across((pairs * step).square()) + (decayed * dstate).square().sum((2, 3))
        size_of_dt = Sums(
            pairs.sum(1) + self.a.abs() * size,
            pairs.square().sum(1) + by_dstate + self.a.square() * square,
            (pairs * self.errors).sum(1) + self.a.abs() * in_float32,
        )
        totals = ((self.dt * part).sum(1) for part in (size, square.sqrt(), in_float32))
        size_of_a, root, wide = totals
        return {"dt": size_of_dt, "a": Sums(size_of_a, root.square(), wide)}


def _decays(g: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """D [M, i, j] of logarithms g [M, T], 0 where i does not see j, and how many errors each has in float32."""
    place = torch.arange(g.shape[1], device=g.device)
    document = document_checks.document_of(cu_seqlens, place)
    total = torch.nn.functional.pad(g.cumsum(1), (1, 0))  # before each token
    added = (total[:, 1:] - total[:, torch.maximum(cu_seqlens[document], place + 1 - CHUNK)]).abs()
    between = total[:, 1:, None] - total[:, None, 1:]
    seen = (document[:, None] == document) & (place <= place[:, None])
    decay = torch.where(seen, between.clamp(max=0.0).exp(), 0.0)
    return decay, 1 + added[:, :, None] + added[:, None] + between.abs()


def _across(pairs: Tensor) -> Tensor:
    """For each token l the sum over pairs i >= l > j, [M, T, T] to [M, T]."""
    before = pairs.tril(-1).cumsum(2).roll(1, 2)  # [M, i, l]: the sum over j < l
    before[:, :, :1] = 0
    return before.tril().sum(1)


@kept
def sizes_of(call: Call) -> dict[str, Sums]:
    """The sizes of the output, and of the gradients if there are any; heads by heads, so that states fit in memory."""
    (tokens, heads, columns), (groups, width) = call.inputs["x"].shape, call.inputs["b"].shape[1:]
    some = max(1, STATES // max(1, tokens * columns * width))
    found = [_of_heads(call, slice(first, first + some)) for first in range(0, max(1, heads), some)]
    whole = {name: Sums.joined([one[name] for one in found]) for name in found[0]}
    whole |= {name: whole[name].of_groups(heads // groups) for name in "bc" if name in whole}
    return {name: sums if name in "ad" else sums.transpose() for name, sums in whole.items()}


def _of_heads(call: Call, heads: slice) -> dict[str, Sums]:
    scan = _Scan(call, heads)
    gradients = [dy.nan_to_num(0.0).transpose(0, 1)[heads] for dy in call.grad_outputs or ()]
    return {"y": scan.output()} | (scan.gradients(*gradients) if gradients else {})
