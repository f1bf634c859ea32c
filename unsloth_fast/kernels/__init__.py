"""The operations of `unsloth_ref.kernels` as Triton kernels: the same names, parameters and meaning, for CUDA.

With TRITON_INTERPRET=1 set before triton is imported they run, slowly, on a CPU.
"""

from unsloth_fast.kernels.add_rms_norm import add_rms_norm
from unsloth_fast.kernels.causal_conv import causal_conv
from unsloth_fast.kernels.cross_entropy import cross_entropy
from unsloth_fast.kernels.fp8_dequantize import fp8_dequantize
from unsloth_fast.kernels.fp8_linear import fp8_linear
from unsloth_fast.kernels.fp8_quantize import fp8_quantize
from unsloth_fast.kernels.fused_swiglu import fused_swiglu
from unsloth_fast.kernels.gated_delta_rule import gated_delta_rule
from unsloth_fast.kernels.gated_rms_norm import gated_rms_norm
from unsloth_fast.kernels.geglu import geglu
from unsloth_fast.kernels.grouped_gemm import grouped_gemm
from unsloth_fast.kernels.layer_norm import layer_norm
from unsloth_fast.kernels.linear_cross_entropy import linear_cross_entropy
from unsloth_fast.kernels.lora_linear import lora_linear
from unsloth_fast.kernels.lora_linears import lora_linears
from unsloth_fast.kernels.lora_mlp import lora_mlp
from unsloth_fast.kernels.mamba2_scan import mamba2_scan
from unsloth_fast.kernels.moe_mlp import moe_mlp
from unsloth_fast.kernels.nf4_dequantize import nf4_dequantize
from unsloth_fast.kernels.packed_attention import packed_attention
from unsloth_fast.kernels.qk_norm_rope import qk_norm_rope
from unsloth_fast.kernels.relu_squared import relu_squared
from unsloth_fast.kernels.rms_norm import rms_norm
from unsloth_fast.kernels.rope import rope
from unsloth_fast.kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "causal_conv",
    "cross_entropy",
    "fp8_dequantize",
    "fp8_linear",
    "fp8_quantize",
    "fused_swiglu",
    "gated_delta_rule",
    "gated_rms_norm",
    "geglu",
    "grouped_gemm",
    "layer_norm",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linears",
    "lora_mlp",
    "mamba2_scan",
    "moe_mlp",
    "nf4_dequantize",
    "packed_attention",
    "qk_norm_rope",
    "relu_squared",
    "rms_norm",
    "rope",
    "swiglu",
]
