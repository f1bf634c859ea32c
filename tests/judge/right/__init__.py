"""Right implementations that differ in order, tiles, precision or method: a fair judge passes them all.

Each is a backend, such as `tests.judge.right.rms_norm_of_torch`. One file per operation has a TABLE of them: functions
in PyTorch, and edits of the project's own kernels that keep them right.
"""

from importlib import import_module
from types import ModuleType, SimpleNamespace

from tests.judge.contract import as_backend
from tests.judge.sources import changed
from unsloth_ref import kernels as reference

RIGHT = {
    f"{op}_{name}": (op, variant)
    for op in reference.__all__
    for name, variant in import_module(f"{__name__}.{op}").TABLE.items()
}
# Right on a CPU; on a GPU the judge has something to say against them.
OF_A_CPU = {
    # Their control flow depends on labels or lengths, or they check these as the reference: they wait for the device.
    "causal_conv_by_a_matrix",
    "causal_conv_in_float64",
    "causal_conv_of_torch",
    "gated_delta_rule_in_float64",
    "grouped_gemm_in_float64",
    "linear_cross_entropy_of_the_rows_that_count",
    "mamba2_scan_by_pairs",
    "mamba2_scan_in_float64",
    "mamba2_scan_in_rounded_chunks",
    "moe_mlp_in_float64",
    *(name for name, (op, variant) in RIGHT.items() if op == "packed_attention" and callable(variant)),
    # Autocast computes powers in float32 on CUDA.
    "relu_squared_of_transformers",
    # Triton converts no float64 to and from float8, so that Inductor cannot compile them.
    "fp8_dequantize_in_float64",
    "fp8_linear_in_float64",
    "fp8_quantize_in_float64",
}


def __getattr__(name: str) -> ModuleType | SimpleNamespace:
    if name not in RIGHT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op, variant = RIGHT[name]
    backend = globals()[name] = as_backend(op, variant) if callable(variant) else changed(op, name, variant)
    return backend
