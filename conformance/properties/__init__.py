"""The properties that every operation must satisfy, one per file.

The docstring of a file states its property. Its function `check(trial, case)` tests one case, and its last line,
`PROPERTY = Property.of_file(check, ...)`, declares the property; see `conformance.property.Property`.

A property tests behaviour that a user can suffer from, not how an implementation is built: a correct implementation in
plain PyTorch passes all of them.
"""

from conformance.properties import (
    argument_kinds,
    autocast,
    batch_invariance,
    calls_apart,
    changed_inputs,
    checkpoint,
    compiles,
    cuda_graph,
    determinism,
    double_backward,
    error_parity,
    exact_laws,
    extents,
    gradients,
    guard_reads,
    guard_writes,
    honest_results,
    inputs_untouched,
    int64_offsets,
    layouts,
    memory,
    metadata,
    no_grad,
    no_sync,
    one_at_a_time,
    opcheck,
    process_state,
    retained_backward,
    row_independence,
    second_device,
    side_stream,
    signature_parity,
    special_values,
    uninitialised,
    value,
)
from conformance.property import Property

# In the order in which they run: the cheapest and most informative first.
_FILES = (
    metadata,
    value,
    gradients,
    one_at_a_time,
    argument_kinds,
    extents,
    layouts,
    special_values,
    exact_laws,
    signature_parity,
    error_parity,
    inputs_untouched,
    honest_results,
    process_state,
    changed_inputs,
    calls_apart,
    row_independence,
    batch_invariance,
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
    memory,
    second_device,
)

PROPERTIES: dict[str, Property] = {file.PROPERTY.name: file.PROPERTY for file in _FILES}
