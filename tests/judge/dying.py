"""Backends that kill their process, or leave it without the GPU."""

import os
from typing import NoReturn
from unittest.mock import patch

from torch import Tensor

from tests.judge.contract import as_backend

ILLEGAL = "CUDA error: an illegal memory access was encountered"


def _abort(gate: Tensor, up: Tensor) -> NoReturn:
    os.abort()


def _lose_the_context(gate: Tensor, up: Tensor) -> NoReturn:
    """Raise as a kernel that reads an illegal address does; whatever CUDA does afterwards raises as well."""
    patch("torch.cuda.is_initialized", lambda: True).start()
    patch("torch.cuda.empty_cache", side_effect=RuntimeError(ILLEGAL)).start()
    raise RuntimeError(ILLEGAL)


aborting = as_backend("swiglu", _abort)
losing_the_context = as_backend("swiglu", _lose_the_context)
