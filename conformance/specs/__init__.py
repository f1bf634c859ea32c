"""The specs of the project's operations: one file per operation, each with a module-level `spec`."""

import sys
from collections.abc import Mapping
from functools import cache

import unsloth_ref.kernels
from conformance.declarations import load
from conformance.spec import Spec


@cache
def specs() -> Mapping[str, Spec]:
    """The spec of every operation, by name.

    Raises:
        SpecError: an operation has no spec, a spec has no operation, or its name differs from that of its file.
    """
    return load(sys.modules[__name__], "spec", Spec, unsloth_ref.kernels)
