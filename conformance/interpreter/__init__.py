"""Triton's interpreter, which runs kernels on a CPU: faster, seen, and with what kernels need of a GPU.

    launches.py   did it run a kernel in a block of code? It truncates to bfloat16, and the gates must know
    reads.py      does a kernel load from memory that is not its own?
    speed.py      the same results in a fifth of the time
    operators.py  one part of it: operators whose operands' types are known
    gpu.py        the results that a kernel has on a GPU, where the interpreter's differ or there are none
    tuning.py     `triton.autotune`, and questions about the GPU, without one

`conformance.backends.load` applies all of them on a CPU, for the whole process, to other people's kernels too.
"""

from conformance.interpreter.gpu import compute_as_a_gpu
from conformance.interpreter.launches import Interpreted, count_launches
from conformance.interpreter.reads import reads
from conformance.interpreter.speed import patch_for_speed
from conformance.interpreter.tuning import tune_without_a_gpu

__all__ = ["Interpreted", "compute_as_a_gpu", "count_launches", "patch_for_speed", "reads", "tune_without_a_gpu"]
