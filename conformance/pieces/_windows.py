"""Microbatches of a small language model in float64, for the pieces of the training loop."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from conformance.piece import PieceCase
from conformance.pieces._shared import UNIT, batches, labels
from unsloth_ref import kernels, training

VOCAB, WIDTH = 7, 3


@dataclass(frozen=True)
class StepsCase(PieceCase):
    """Microbatches, the lengths of the rows of each, and how many of them make a step."""

    microbatches: tuple[tuple[int, ...], ...]
    accumulation: int = 1
    seed: int = 0


def draw(elements: int) -> st.SearchStrategy[StepsCase]:
    """Up to five microbatches, some of them without any target."""
    return st.builds(
        StepsCase,
        microbatches=st.lists(batches(3, 9), min_size=1, max_size=5).map(tuple),
        accumulation=st.integers(1, 4),
        seed=st.integers(0, 3),
    )


class Bigram(nn.Module):
    """Foretells the next token from the last one alone: an embedding and a head."""

    def __init__(self, device: str) -> None:
        """Weights from a fixed seed."""
        super().__init__()
        generator = Generator().manual_seed(5)
        weights = torch.randn(2, VOCAB, WIDTH, generator=generator, dtype=torch.float64).to(device)
        self.embedding, self.head = (nn.Parameter(weight.clone()) for weight in weights)

    def loss_of(self, microbatch: dict[str, Any], count: Tensor) -> Tensor:
        """The summed loss over the count, as `accumulate` wants it."""
        logits = self.embedding[microbatch["input_ids"]] @ self.head.T
        return training.next_token_loss(
            logits, microbatch["labels"], cross_entropy=kernels.cross_entropy, num_items=count
        )


def windows(case: StepsCase, device: str) -> list[dict[str, Tensor]]:
    """The microbatches; labels are ignored here and there, tokens never."""
    found = []
    for index, rows in enumerate(case.microbatches):
        own = labels(rows, VOCAB, case.seed + index, device)
        if (case.seed + index) % 4 == 3:
            own[:] = -100
        found.append({"input_ids": own.clamp(min=0), "labels": own})
    return found


def joined(window: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The window as one batch, rows padded with ignored labels."""
    width = max(part["labels"].shape[1] for part in window)

    def wide(name: str, filling: int) -> Tensor:
        return torch.cat(
            [nn.functional.pad(part[name], (0, width - part[name].shape[1]), value=filling) for part in window]
        )

    return {"input_ids": wide("input_ids", 0), "labels": wide("labels", -100)}


def allowed(case: StepsCase, weights: float = 1.0) -> float:
    """What rounding may change in a mean loss or its gradient: each is a few sums over tokens, vocabulary and width.

    Weights bounds the size of the weights, and so that of a logit by WIDTH times its square.
    """
    tokens = sum(len(rows) * max(rows) for rows in case.microbatches)
    size = (1 + WIDTH * weights**2 + math.log(VOCAB)) * (1 + weights)
    return 8 * (tokens + VOCAB + WIDTH) * UNIT * size
