"""mamba-ssm, the package of Mamba 2, whose scan is Triton kernels."""

import torch
from torch import Tensor

from conformance.peers import import_kernels, operation

(_scan,) = import_kernels("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined")


@operation
def mamba2_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor) -> Tensor:
    """As Mamba2, in chunks of 256 tokens, which may have the ends of several documents."""
    token = torch.arange(len(x), device=x.device, dtype=torch.int32)
    document = torch.bucketize(token, cu_seqlens[1:], out_int32=True, right=True)
    return _scan(x[None], dt[None], a, b[None], c[None], 256, D=d, seq_idx=document[None])[0]
