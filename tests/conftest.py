"""Settings of every test run, made before triton is imported, and a fixture for tests that patch TRL."""

import os
from collections.abc import Iterator

import pytest
import torch

from conformance.interpreter import patch_for_speed

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: without a GPU its interpreter runs kernels
    patch_for_speed()
torch.set_num_threads(1)


@pytest.fixture
def unpatched() -> Iterator[None]:
    """Remove `compat.patch_trl` from TRL before and after the test."""
    from unsloth_fast import compat

    compat.unpatch_trl()
    yield
    compat.unpatch_trl()
