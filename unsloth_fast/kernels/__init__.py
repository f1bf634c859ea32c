"""The operations of `unsloth_ref.kernels` as Triton kernels: the same names, parameters and meaning, for CUDA.

With TRITON_INTERPRET=1 set before triton is imported they run, slowly, on a CPU.
"""

from unsloth_fast.kernels.add_rms_norm import add_rms_norm
from unsloth_fast.kernels.cross_entropy import cross_entropy
from unsloth_fast.kernels.geglu import geglu
from unsloth_fast.kernels.grouped_gemm import grouped_gemm
from unsloth_fast.kernels.layer_norm import layer_norm
from unsloth_fast.kernels.linear_cross_entropy import linear_cross_entropy
from unsloth_fast.kernels.lora_linear import lora_linear
from unsloth_fast.kernels.moe_mlp import moe_mlp
from unsloth_fast.kernels.packed_attention import packed_attention
from unsloth_fast.kernels.rms_norm import rms_norm
from unsloth_fast.kernels.rope import rope
from unsloth_fast.kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "cross_entropy",
    "geglu",
    "grouped_gemm",
    "layer_norm",
    "linear_cross_entropy",
    "lora_linear",
    "moe_mlp",
    "packed_attention",
    "rms_norm",
    "rope",
    "swiglu",
]
