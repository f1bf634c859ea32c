"""Settings of every test run, made before triton is imported; the order of files; TRL and the logger restored.

What is imported and collected stays until the end: the garbage collector need not search it.
"""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from conformance.interpreter import patch_for_speed

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: without a GPU its interpreter runs kernels
    patch_for_speed()
torch.set_num_threads(1)
if find_spec("bitsandbytes"):
    # Where a CPU multiplies bfloat16, bitsandbytes repacks weights in evaluation, and does not train them afterwards.
    import_module("bitsandbytes.nn.modules").has_avx512bf16 = lambda: False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that at the end no process works on one while the others wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """A full collection, which accelerate asks for at each training, takes 0.4 s with all modules and tests, else 0."""
    gc.freeze()


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Remove `compat.patch_trl` from TRL before and after each test: importing and loading a model apply it."""
    _unpatch()
    yield
    _unpatch()


@pytest.fixture(autouse=True, scope="module")
def same_level() -> Iterator[None]:
    """The command line sets the level of the package's logger."""
    logger = logging.getLogger("unsloth_fast")
    level = logger.level
    yield
    logger.setLevel(level)


def _unpatch() -> None:
    if compat := sys.modules.get("unsloth_fast.compat"):  # not imported by tests that do not need TRL
        compat.unpatch_trl()
