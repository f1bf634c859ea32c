"""What watches a call of a kernel while it runs: its memory, its launches, its arithmetic.

`memory` puts guard bands around tensors and allocations. `variants` sees each launch of a Triton kernel and the
settings that its machine code depends on. `exact` runs kernels in exact arithmetic. `plain` tells which results are
those of PyTorch's own operators. The properties decide what follows from it.
"""
