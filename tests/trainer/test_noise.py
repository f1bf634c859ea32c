"""NEFTune: the noise of a document is scaled by its own length, however documents are batched."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from tests import tiny
from tests.trainer.runs import BATCHINGS, arguments
from unsloth_fast import UnslothTrainer
from unsloth_fast.hooks.noise import EmbeddingNoise, document_lengths, noise_of_documents

pytestmark = pytest.mark.filterwarnings("ignore")

ALPHA, WIDTH = 5.0, 32


def noise_of(trainer: UnslothTrainer) -> list[tuple[Tensor, Tensor, bool]]:
    """The noise of each batch that is trained on or evaluated, its positions, and whether the model is in training."""
    model: Any = getattr(trainer.model, "base_model", trainer.model)
    inner = getattr(model, "model", model)
    inner = getattr(inner, "model", inner)
    embedding, seen, tokens = inner.get_input_embeddings(), [], []
    embedding.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))

    def first_layer(_: Any, inputs: Any, keywords: Any) -> None:
        noise = inputs[0].detach() - embedding.weight[tokens[-1]].detach()
        seen.append((noise, keywords["position_ids"], embedding.training))

    inner.layers[0].register_forward_pre_hook(first_layer, with_kwargs=True)
    return seen


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("batching", ["padding-free", "packed"])
def test_the_noise_of_a_document_depends_on_its_own_length(tmp_path: Path, batching: str, lora: bool) -> None:
    """Documents of 4 and 30 tokens share a row. An evaluation has no noise, and none is left after training."""
    documents = [list(range(3, 3 + length)) for length in (4, 30)] * 4
    options = {"max_length": 34, "per_device_train_batch_size": 2, "max_steps": 1} | BATCHINGS[batching]
    trainer = UnslothTrainer(
        model=tiny.model(),
        args=arguments(tmp_path, neftune_noise_alpha=ALPHA, **options, gradient_checkpointing=lora),
        train_dataset=Dataset.from_dict({"input_ids": documents}),
        eval_dataset=Dataset.from_dict({"input_ids": documents}),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj"]) if lora else None,
    )
    seen = noise_of(trainer)
    trainer.train()
    trainer.evaluate()
    # The first step checks the head on a few tokens, in evaluation mode.
    noise, positions, _ = next(batch for batch in seen if batch[2])
    starts = [*torch.flatten(positions == 0).nonzero()[:, 0].tolist(), noise.shape[1]]
    lengths = [end - start for start, end in pairwise(starts)]
    assert len(lengths) > 1 and set(lengths) <= {4, 30}
    for start, length in zip(starts, lengths, strict=False):
        limit = ALPHA / math.sqrt(length * WIDTH)
        assert 0.9 * limit < noise[0, start : start + length].abs().max() <= 1.001 * limit
        assert noise[0, start : start + length].mean().abs() < 0.2 * limit
    assert all(not noise.any() for noise, _, training in seen if not training) and not seen[-1][2]
    assert trainer.args.neftune_noise_alpha == ALPHA
    embedding, tokens = trainer.model.train().get_input_embeddings(), torch.tensor([[3, 4]])
    assert torch.equal(embedding(tokens), embedding.weight[tokens])


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [
        (None, [[4] * 4, [4] * 4]),
        ([[0, 1, 0, 1], [0, 1, 2, 3]], [[2] * 4, [4] * 4]),
        ([[0, 0, 1, 2], [0, 0, 0, 0]], [[1, 3, 3, 3], [1] * 4]),
        ([[0, 1, 2, 0]], [[4] * 4, [4] * 4]),  # of another batch
    ],
)
def test_the_length_of_the_document_of_each_token(positions: Any, lengths: list[list[int]]) -> None:
    positions = None if positions is None else torch.tensor(positions)
    assert document_lengths(positions, torch.zeros(2, 4, WIDTH)).tolist() == lengths


@pytest.mark.parametrize("alpha", [None, 0.0, ALPHA])
@pytest.mark.parametrize("padding_free", [False, True])
def test_the_noise_is_taken_from_the_trainer_where_documents_are_concatenated(
    padding_free: bool, alpha: float | None
) -> None:
    """Padded rows keep transformers' noise."""
    trainer = SimpleNamespace(padding_free=padding_free, neftune_noise_alpha=alpha)
    noise = noise_of_documents(trainer)
    assert (noise.alpha, trainer.neftune_noise_alpha) == ((alpha, None) if padding_free else (None, alpha))


def test_no_noise_adds_no_hook() -> None:
    embedding = torch.nn.Embedding(2, 2)
    with EmbeddingNoise(None).added_to(SimpleNamespace(get_input_embeddings=lambda: embedding)):
        assert not embedding._forward_hooks


def test_the_noise_is_removed_after_an_error() -> None:
    model = tiny.model(dtype=torch.bfloat16)
    noise = EmbeddingNoise(ALPHA)
    with pytest.raises(RuntimeError), noise.added_to(model):
        embedded = model.get_input_embeddings()(torch.tensor([[3, 4]]))
        assert embedded.dtype == torch.bfloat16
        raise RuntimeError
    tokens = torch.tensor([[3, 4]])
    assert torch.equal(model.get_input_embeddings()(tokens), model.get_input_embeddings().weight[tokens])
