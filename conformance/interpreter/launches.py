"""Did Triton's interpreter run a kernel?

The interpreter truncates float32 to bfloat16, so the gates must know which results it computed. `count_launches`
patches `GridExecutor.__call__` of `triton.runtime.interpreter`, which runs a kernel's whole grid, and `Interpreted`
is true if that happened in a block of code. What a module imports makes no difference.
"""

from __future__ import annotations

import importlib
from functools import cache, wraps
from typing import Any, ClassVar


class Interpreted:
    """After a `with` block, true if the interpreter ran a kernel in it.

    Attributes:
        launches: kernels that the interpreter has run in this process.
    """

    launches: ClassVar[int] = 0

    def __init__(self) -> None:
        """Nothing has run yet."""
        self._before = self._after = 0

    def __enter__(self) -> Interpreted:
        """Start counting."""
        self._before = Interpreted.launches
        return self

    def __exit__(self, *error: object) -> None:
        """Stop counting."""
        self._after = Interpreted.launches

    def __bool__(self) -> bool:
        """Whether a kernel ran."""
        return self._after > self._before


@cache
def count_launches() -> None:
    """Count the kernels that the interpreter runs from now on, once per process; imports triton.

    Raises:
        ImportError: triton is not installed.
        AttributeError: this version of Triton runs kernels in another way, which would be taken for no kernel at all.
    """
    executor: Any = importlib.import_module("triton.runtime.interpreter").GridExecutor
    run_grid = executor.__call__

    @wraps(run_grid)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        Interpreted.launches += 1
        return run_grid(self, *args, **kwargs)

    executor.__call__ = counted
