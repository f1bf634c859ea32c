"""The operations. `__all__` lists them: each has a twin in `unsloth_fast.kernels` and a spec in `conformance.specs`.

Dimension letters of all docstrings, here and in `unsloth_fast`:

    B batch    S sequence    T tokens    ... any leading dimensions
    H hidden    F feed-forward    V vocabulary    I inputs and O outputs of a linear layer    R LoRA rank
    N heads of queries    K heads of keys and values    D columns of a head    P positions of a table
    M heads and E columns of a head of values, where N and D are those of keys (delta rule, scan)
    E experts or groups of rows    k experts per token    C channels    W width of a convolution
"""

from unsloth_ref.kernels.add_rms_norm import add_rms_norm
from unsloth_ref.kernels.causal_conv import causal_conv
from unsloth_ref.kernels.cross_entropy import cross_entropy
from unsloth_ref.kernels.fp8_dequantize import fp8_dequantize
from unsloth_ref.kernels.fp8_linear import fp8_linear
from unsloth_ref.kernels.fp8_quantize import fp8_quantize
from unsloth_ref.kernels.fused_swiglu import fused_swiglu
from unsloth_ref.kernels.gated_delta_rule import gated_delta_rule
from unsloth_ref.kernels.gated_rms_norm import gated_rms_norm
from unsloth_ref.kernels.geglu import geglu
from unsloth_ref.kernels.grouped_gemm import grouped_gemm
from unsloth_ref.kernels.layer_norm import layer_norm
from unsloth_ref.kernels.linear_cross_entropy import linear_cross_entropy
from unsloth_ref.kernels.lora_linear import lora_linear
from unsloth_ref.kernels.lora_linears import lora_linears
from unsloth_ref.kernels.lora_mlp import lora_mlp
from unsloth_ref.kernels.mamba2_scan import mamba2_scan
from unsloth_ref.kernels.moe_mlp import moe_mlp
from unsloth_ref.kernels.nf4_dequantize import nf4_dequantize
from unsloth_ref.kernels.packed_attention import packed_attention
from unsloth_ref.kernels.qk_norm_rope import qk_norm_rope
from unsloth_ref.kernels.relu_squared import relu_squared
from unsloth_ref.kernels.rms_norm import rms_norm
from unsloth_ref.kernels.rope import rope
from unsloth_ref.kernels.swiglu import swiglu

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
