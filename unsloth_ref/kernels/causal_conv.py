"""Short causal convolution of every channel by itself, within packed documents.

    z_tc = bias_c + sum over j < W of weight_c,W-1-j * x_t-j,c      y = z, or silu(z) = z * sigmoid(z)
    dz = dy, or dy * s (1 + z (1 - s)) with s = sigmoid(z)
    dx_tc = sum over j < W of weight_c,W-1-j * dz_t+j,c
    dweight_c,W-1-j = sum over t of dz_tc * x_t-j,c                 dbias_c = sum over t of dz_tc

x and dz are 0 outside of the document of token t. The last column of the weight is that of the token itself, as in
torch.nn.Conv1d with groups=C and W - 1 zeros in front of the document.

Source: the short convolution of Mamba, Gu and Dao 2023, arXiv:2312.00752. Sums and the activation are float32 for any
input dtype (float64 for float64), and rounded once, at the end.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from unsloth_ref import document_checks


def causal_conv(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """Replace each token by a weighted sum of itself and the W - 1 tokens before it in its document.

    Documents are independent: the bits of a document's output and of its gradient do not depend on any other document,
    even if that contains NaN.

    Args:
        x: [T, C], any float dtype; the documents one after the other.
        weight: [C, W], any float dtype; its last column is for the token itself.
        cu_seqlens: [documents + 1], int32: the first token of each document, then T. Documents may be empty.
        bias: [C], any float dtype.
        activation: "silu" is applied to the sum; None for none.

    Returns:
        [T, C] in x.dtype.

    Raises:
        ValueError: wrong shapes or devices, an unknown activation, or cu_seqlens does not rise from 0 to T. Compiled
            code does not check the last; there, tokens outside of all documents are undefined.
        TypeError: x, weight or bias does not have a float dtype, or cu_seqlens is not int32.
    """
    document_checks.causal_conv_arguments(x, weight, cu_seqlens, bias, activation)
    if not torch.compiler.is_compiling():
        document_checks.documents_cover(cu_seqlens, len(x), "x")
    wide, tokens = torch.promote_types(x.dtype, torch.float32), len(x)
    token = torch.arange(tokens, device=x.device)
    document = document_checks.document_of(cu_seqlens, token)
    place = (token - cu_seqlens[document])[:, None]
    z = torch.zeros_like(x, dtype=wide) if bias is None else bias.to(wide).expand(x.shape)
    for back in range(weight.shape[1]):
        earlier = pad(x.to(wide), (0, 0, back, 0))[:tokens].where(place >= back, 0.0)
        z = z + weight[:, -1 - back].to(wide) * earlier
    return (silu(z) if activation == "silu" else z).to(x.dtype)
