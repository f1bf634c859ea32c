"""The laws. One file a law: a docstring that says it, and `check(trial, case)`, which raises Failure where it fails.

A check returns the share of the error budget it used, or None where that has no meaning. Beside it a file may define
`SHARE`, the part of the profile's examples worth spending on it; `cases(spec, profile)`, a fixed list in place of drawn
cases; `CUDA_ONLY = True`; and `LARGE = True` where a case takes gigabytes: such checks run one at a time. A law is
about what a user can suffer from, never about how an implementation is built: plain PyTorch that is right passes them
all.
"""

from types import ModuleType

from conformance.properties import (
    argument_kinds,
    autocast,
    calls_apart,
    checkpoint,
    compiles,
    cuda_graph,
    determinism,
    double_backward,
    error_parity,
    extents,
    gradients,
    guard_reads,
    guard_writes,
    inputs_untouched,
    int64_offsets,
    layouts,
    metadata,
    no_grad,
    no_sync,
    one_at_a_time,
    opcheck,
    retained_backward,
    row_independence,
    side_stream,
    signature_parity,
    special_values,
    uninitialised,
    value,
)

# In the order in which they run: what is cheap and says most comes first.
_MODULES = (
    metadata,
    value,
    gradients,
    one_at_a_time,
    argument_kinds,
    extents,
    layouts,
    special_values,
    signature_parity,
    error_parity,
    inputs_untouched,
    calls_apart,
    row_independence,
    guard_writes,
    guard_reads,
    uninitialised,
    int64_offsets,
    determinism,
    retained_backward,
    double_backward,
    no_grad,
    autocast,
    checkpoint,
    opcheck,
    compiles,
    side_stream,
    cuda_graph,
    no_sync,
)

PROPERTIES: dict[str, ModuleType] = {module.__name__.rsplit(".", 1)[-1]: module for module in _MODULES}
