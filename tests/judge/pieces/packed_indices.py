"""Wrong and right implementations of packed_indices."""

from dataclasses import replace

import torch
from torch import Tensor

from tests.judge.pieces import Collected
from unsloth_ref import batch_checks, training
from unsloth_ref.types import PackingPlan

collected = Collected()


@collected.passes("packed_indices")
def span_by_span(plan: PackingPlan, offsets: Tensor) -> Tensor:
    """Concatenates one range per span."""
    batch_checks.plan_fits(plan, offsets)
    spans = zip((offsets.long()[plan.documents] + plan.starts).tolist(), plan.lengths.tolist(), strict=True)
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(s, s + n) for s, n in spans)])


@collected.fails("packed_indices", "rows_of_documents")
def starts_forgotten(plan: PackingPlan, offsets: Tensor) -> Tensor:
    """Every span begins at the first token of its document."""
    return training.packed_indices(replace(plan, starts=torch.zeros_like(plan.starts)), offsets)


@collected.fails("packed_indices", "rows_of_documents")
def in_the_order_of_the_data(plan: PackingPlan, offsets: Tensor) -> Tensor:
    """The right tokens at the wrong positions."""
    return training.packed_indices(plan, offsets).sort().values


@collected.fails("packed_indices", "error_parity")
def reads_beyond_the_document(plan: PackingPlan, offsets: Tensor) -> Tensor:
    """If a document is shorter than in the plan, the tokens of the next document are used."""
    spans = zip((offsets.flatten()[plan.documents] + plan.starts).tolist(), plan.lengths.tolist(), strict=True)
    return torch.tensor([first + token for first, length in spans for token in range(length)], dtype=torch.int64)


@collected.fails("packed_indices", "equal")
def in_32_bits(plan: PackingPlan, offsets: Tensor) -> Tensor:
    """Offsets beyond 2^31 wrap around."""
    batch_checks.plan_fits(plan, offsets)
    return training.packed_indices(plan, offsets.int())
