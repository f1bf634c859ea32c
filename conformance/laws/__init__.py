"""The laws that every model with operations placed under it must satisfy, one per file.

The docstring of a file states its law. Its function `check(trial)` tests one model, and its last line,
`LAW = Law(*of_file(check))`, declares the law; see `conformance.laws._law.Law`.

A law tests what a user can suffer from. Most compare with one truth, the untouched model in float64 on each document
alone, so that padding, packing, accumulation and checkpointing are all compared with the same numbers.
"""

from conformance.laws import (
    accumulated,
    adapter_saved,
    adapters,
    apart,
    checkpointed,
    dora,
    dropout,
    embeddings,
    ends,
    evaluated,
    generated,
    gradients,
    layers,
    left_padded,
    padding_free,
    quantized,
    reference,
    saved,
    switched,
)
from conformance.laws._law import Law

# In the order in which they run: the most informative first.
_FILES = (
    layers,
    gradients,
    reference,
    evaluated,
    accumulated,
    left_padded,
    padding_free,
    apart,
    checkpointed,
    adapters,
    embeddings,
    ends,
    dora,
    switched,
    quantized,
    dropout,
    saved,
    adapter_saved,
    generated,
)

LAWS: dict[str, Law] = {file.LAW.name: file.LAW for file in _FILES}
