"""What may other people's code raise when it is only tried, such as a module's forward on random tensors?"""

import sys
from subprocess import SubprocessError

FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def in_words(failure: BaseException) -> str:
    """The type of a failure and the first line of its message."""
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"


def failures_of_kernels() -> tuple[type[Exception], ...]:
    """What a kernel may raise that is compiled or launched: the same, what its tools raise, and Triton's own errors."""
    found = (*FAILURES, ImportError, MemoryError, OSError, SubprocessError, Warning)
    triton = sys.modules.get("triton.errors")  # whose errors have no base but Exception
    return found if triton is None else (*found, triton.TritonError)
