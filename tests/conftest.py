"""What every test run needs before anything else is imported, and a fixture for tests that patch TRL."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: without a GPU the kernels run interpreted
torch.set_num_threads(1)


@pytest.fixture
def unpatched() -> Iterator[None]:
    """TRL as it is, before and after."""
    from unsloth_fast import compat

    compat.unpatch_trl()
    yield
    compat.unpatch_trl()
