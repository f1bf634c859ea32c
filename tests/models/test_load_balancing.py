"""The load-balancing loss beside the backend's loss: that of the untouched model, with its gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from tests import tiny
from tests.models import zoo
from unsloth_fast import backends
from unsloth_fast.models import place
from unsloth_fast.models.head import add_loss
from unsloth_fast.models.load_balancing import load_balancing_loss
from unsloth_fast.training.collate import collate

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHT = 100.0  # so that a gradient that is left out shows
LENGTHS = (9, 14, 5)


def batches() -> dict[str, dict[str, Any]]:
    """The same documents in padded rows, and packed in one."""
    drawn = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, len(tiny.WORDS), (length,), generator=drawn) for length in LENGTHS]
    ids = pad_sequence(documents, batch_first=True)
    mask = (ids > 0).long()
    padded = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {"padded": padded, "packed": collate([{"input_ids": document} for document in documents]).as_dict()}


@pytest.mark.parametrize("name", zoo.BALANCED)
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("whole", [True, False])
def test_it_is_that_of_the_untouched_model(name: str, form: str, whole: bool) -> None:
    """Which gets padded rows with a mask; with and without whole logits. And so is the loss of the tokens."""
    plain = zoo.model(name).train()
    model = copy.deepcopy(plain)
    plain.config.output_router_logits, plain.router_aux_loss_coef = True, WEIGHT
    expected = plain(**batches()["padded"], use_cache=False)
    expected.loss.backward()
    backend = backends.resolve("reference")
    place(model, backend)
    add_loss(model, backend)
    options = {"use_cache": False, "backend_loss": True, "with_load_balancing": True, "with_outputs": whole}
    loss, outputs, scores, load_balancing = model(**batches()[form], **options)
    (loss + WEIGHT * load_balancing).backward()
    assert (outputs is not None) == whole and scores is None
    torch.testing.assert_close(load_balancing, expected.aux_loss)
    torch.testing.assert_close(loss + WEIGHT * load_balancing, expected.loss)
    for (parameter, value), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (value.grad is None) == (reference.grad is None), parameter
        if value.grad is not None:
            torch.testing.assert_close(value.grad, reference.grad, rtol=1e-3, atol=1e-5)
    assert model.model.layers[0].mlp.gate.weight.grad.any() if name == "qwen3_moe" else True


def counting(gate_logits: Any, num_experts: int, top_k: int = 2, attention_mask: Tensor | None = None) -> Any:
    """The function of a transformers release that counts by bincount where there is no mask."""
    if attention_mask is None:
        raise AssertionError(torch.bincount)
    return modeling_mixtral.load_balancing_loss_func(gate_logits, num_experts, top_k, attention_mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_counted_without_waiting_for_the_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of all tokens avoids the wait; loss and gradients are the same."""
    model, found = zoo.model("qwen3_moe"), []
    logits = [torch.randn(50, 4, generator=torch.Generator().manual_seed(layer)).to(dtype) for layer in range(3)]
    for function in (modeling_qwen3_moe.load_balancing_loss_func, counting):
        monkeypatch.setattr(modeling_qwen3_moe, "load_balancing_loss_func", function)
        given = tuple(one.clone().requires_grad_() for one in logits)
        loss = load_balancing_loss(model, given, None)
        found.append([loss, *torch.autograd.grad(loss, given)])
    assert all(map(torch.equal, *found))
    given: Any = tuple(logits)
    expected: Any = modeling_mixtral.load_balancing_loss_func(given, 4, 2)
    assert torch.equal(found[0][0], expected) and expected > 1
