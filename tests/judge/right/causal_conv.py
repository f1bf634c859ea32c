"""Right short convolutions."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from conformance.peers import operation
from tests.judge.contract import Function
from unsloth_ref import checks, document_checks
from unsloth_ref import kernels as reference


def _causal_conv(convolve: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    """Complete a convolution of documents with weight [C, W] to the contract, in float32."""

    @operation
    def causal_conv(
        x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None = None, *, activation: str | None = None
    ) -> Tensor:
        document_checks.causal_conv_arguments(x, weight, cu_seqlens, bias, activation)
        if torch.compiler.is_compiling() or not x.numel():
            return reference.causal_conv(x, weight, cu_seqlens, bias, activation=activation)
        if checks.values_are_checked(cu_seqlens):
            document_checks.documents_cover(cu_seqlens, len(x), "x")
        with torch.autocast(x.device.type, enabled=False):
            z = convolve(x.float(), weight.float(), cu_seqlens)
            z = z if bias is None else z + bias.float()
            return (F.silu(z) if activation else z).to(x.dtype)

    return causal_conv


def _of_each(convolve: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """A convolution of one sequence, for one document after the other."""

    def apart(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
        bounds = pairwise(cu_seqlens.tolist())
        return torch.cat([convolve(x[i:j], weight) for i, j in bounds if i < j])

    return apart


@_causal_conv
@_of_each
def of_torch(x: Tensor, weight: Tensor) -> Tensor:
    """torch's own convolution."""
    padded = F.pad(x.t(), (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight[:, None], groups=len(weight)).t()


@_causal_conv
def by_windows(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A product with the last W tokens of each token, 0 before its document."""
    token, width = torch.arange(len(x), device=x.device), weight.shape[1]
    place = token - cu_seqlens[document_checks.document_of(cu_seqlens, token)]
    seen = place[:, None] >= torch.arange(width - 1, -1, -1, device=x.device)
    windows = F.pad(x, (0, 0, width - 1, 0)).unfold(0, width, 1)
    return (windows.where(seen[:, None], 0.0) * weight).sum(-1)


@_causal_conv
@_of_each
def by_a_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix of all pairs of tokens per channel, for the short documents of a CPU."""
    token = torch.arange(len(x), device=x.device)
    back = token[:, None] - token
    seen = (back >= 0) & (back < weight.shape[1])
    taps = weight[:, (weight.shape[1] - 1 - back).clamp(0, weight.shape[1] - 1)] * seen
    return torch.einsum("cts,sc->tc", taps, x)


def in_float64(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """More exact than required."""
    if not x.is_floating_point():
        raise TypeError("x: got integers")
    return reference.causal_conv(x.double(), weight, cu_seqlens, bias, activation=activation).to(x.dtype)


TABLE = {
    "of_torch": of_torch,
    "by_windows": by_windows,
    "by_a_matrix": by_a_matrix,
    "in_float64": in_float64,
    "in_other_tiles": (
        ("Tile(8, width,", "Tile(4, width,"),
        ("return Tile(2, *", "return Tile(8, *"),
        ("RUNS = 2**18", "RUNS = 8"),
    ),
}
