"""The properties that every operation must satisfy, one per file.

The docstring of a file states its property. Its function `check(trial, case)` raises Failure if the property does not
hold; it returns the fraction of the error budget that was used, or None if the property has no budget. A file may also
define:

    SHARE                   fraction of the profile's examples to spend on this property; 1 by default
    cases(spec, profile)    a fixed list of cases, used instead of drawn ones
    CUDA_ONLY = True        skip the property on a CPU
    LARGE = True            a case takes gigabytes: the runner never runs two such tasks at the same time

A property tests behaviour that a user can suffer from, not how an implementation is built: a correct implementation in
plain PyTorch passes all of them.
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

# In the order in which they run: the cheapest and most informative first.
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
