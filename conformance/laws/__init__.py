"""The laws that every model with operations placed under it must satisfy, one per file.

The docstring of a file states its law. Its function `check(trial)` tests one model, and its last line,
`LAW = ModelLaw(*of_file(check))`, declares the law; see `conformance.laws._law.ModelLaw`.

A law tests what a user can suffer from. Most compare with one truth, the untouched model in float64 on each document
alone, so that padding, packing, accumulation and checkpointing are all compared with the same numbers.
"""

from conformance.laws import (
    accumulated,
    adapter_saved,
    adapters,
    apart,
    checkpointed,
    embeddings,
    generated,
    gradients,
    layers,
    padding_free,
    reference,
    saved,
)
from conformance.laws._law import ModelLaw

# In the order in which they run: the most informative first.
_FILES = (
    layers,
    gradients,
    reference,
    accumulated,
    padding_free,
    apart,
    checkpointed,
    adapters,
    embeddings,
    saved,
    adapter_saved,
    generated,
)

LAWS: dict[str, ModelLaw] = {file.LAW.name: file.LAW for file in _FILES}
