"""NEFTune: noise on the embeddings in training, scaled by the length of each document (arXiv 2310.05914).

transformers scales by the length of the row. That is the document with its padding; where documents are concatenated
it is the whole batch, and eight documents would get a third of their noise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unsloth_fast.models.head import without_adapter


class EmbeddingNoise:
    """Uniform noise up to `alpha / sqrt(length of the document * width)` on the output of a model's embedding.

    Attributes:
        positions: the position_ids [B, S] of the next batch, which restart with each document; None for one document
            per row.

    Args:
        alpha: `neftune_noise_alpha` of the arguments; None for no noise.
    """

    def __init__(self, alpha: float | None) -> None:
        self.alpha = alpha
        self.positions: Tensor | None = None

    @contextmanager
    def added_to(self, model: nn.Module) -> Iterator[None]:
        """Add noise to the embeddings of a model while it trains; evaluations have none."""
        if self.alpha is None:
            yield
            return
        handle = without_adapter(model).get_input_embeddings().register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()
            self.positions = None

    def _add(self, embedding: nn.Module, _: object, output: Tensor) -> Tensor:
        if not embedding.training or self.alpha is None:
            return output
        lengths: Tensor = document_lengths(self.positions, output).to(output.device)
        limits = self.alpha / (lengths * output.shape[-1]).float().sqrt()
        noise = torch.rand(output.shape, dtype=torch.float32, device=output.device) * 2 - 1
        return output + (noise * limits[..., None]).to(output.dtype)


def noise_of_documents(trainer: Any) -> EmbeddingNoise:
    """The noise that is scaled by documents: the trainer's, which then adds none itself, where they are concatenated.

    Args:
        trainer: an `UnslothTrainer`; its `neftune_noise_alpha` becomes None if the noise is added here.
    """
    if not trainer.padding_free:
        return EmbeddingNoise(None)
    alpha, trainer.neftune_noise_alpha = trainer.neftune_noise_alpha, None
    return EmbeddingNoise(alpha)


def document_lengths(positions: Tensor | None, embeddings: Tensor) -> Tensor:
    """The length of the document of each token, [B, S] int64, without waiting for the device.

    Args:
        positions: [B, S], which restart at 0 with each document; None for one document per row.
        embeddings: [B, S, H].
    """
    rows, length = embeddings.shape[:2]
    if positions is None or positions.shape != (rows, length):
        return torch.full((rows, length), length, device=embeddings.device)
    documents = (positions == 0).flatten().cumsum(0)  # the first row may go on with an earlier document: number 0
    sizes = torch.zeros(documents.numel() + 1, dtype=torch.int64, device=positions.device)
    sizes.scatter_add_(0, documents, torch.ones_like(documents))
    return sizes[documents].view(rows, length)
