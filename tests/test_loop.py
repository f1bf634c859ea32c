"""The training loop: exact accumulation on a tiny Llama in float64, and the size of what others got wrong."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import unsloth_fast.training
import unsloth_ref.training
from tests import tiny
from unsloth_ref import kernels

PACKAGES = [unsloth_ref.training, unsloth_fast.training]
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)

# The lengths whose mean of means is known to be far off: one target weighs as much as 127.
LENGTHS = [4, 64, 8, 33, 2, 17, 128, 5]
# A gradient is a sum over 253 targets of sums over at most 128 positions: a few thousand roundings of float64, relative
# to the gradient's norm.
EXACT = 4000 * 2.0**-53


def llama() -> nn.Module:
    """The model, always the same."""
    return tiny.model(dtype=torch.float64, max_position_embeddings=128, num_hidden_layers=1)


def examples(lengths: list[int] = LENGTHS) -> list[dict[str, Any]]:
    """Documents of random words."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 48, (length,), generator=generator)} for length in lengths]


def batches(package: ModuleType, size: int, lengths: list[int] = LENGTHS) -> list[dict[str, Any]]:
    """Padding-free microbatches of so many documents."""
    found = examples(lengths)
    return [package.collate(found[first : first + size]).as_dict() for first in range(0, len(found), size)]


def loss_with(model: nn.Module, package: ModuleType) -> Callable[[Any, Tensor | None], Tensor]:
    """The loss of a microbatch of this model."""

    def loss_of(batch: Any, count: Tensor | None) -> Tensor:
        with tiny.KeepFloat64():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return package.next_token_loss(logits, batch["labels"], cross_entropy=kernels.cross_entropy, num_items=count)

    return loss_of


def gradient(model: nn.Module) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def accumulated(package: ModuleType, steps: int) -> tuple[float, Tensor]:
    """Loss and gradient over so many microbatches."""
    model = llama()
    loss = package.accumulate(loss_with(model, package), batches(package, len(LENGTHS) // steps))
    return float(loss), gradient(model)


def mean_of_means(steps: int) -> tuple[float, Tensor]:
    """The same with each microbatch divided by its own targets, and all by their number."""
    model = llama()
    loss_of = loss_with(model, unsloth_ref.training)
    losses = []
    for batch in batches(unsloth_ref.training, len(LENGTHS) // steps):
        loss = loss_of(batch, None) / steps
        loss.backward()
        losses.append(loss.item())
    return sum(losses), gradient(model)


@each_package
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_accumulation_changes_nothing_but_rounding(package: ModuleType, steps: int) -> None:
    """Two, four or eight microbatches have the loss and the gradient of one."""
    loss, whole = accumulated(unsloth_ref.training, 1)
    parts_loss, parts = accumulated(package, steps)
    assert abs(parts_loss - loss) <= EXACT * loss
    assert (parts - whole).norm() <= EXACT * whole.norm()


def test_what_a_mean_of_means_costs() -> None:
    """The gradient is off by more at every step of cutting: over a tenth, a half, and more than the gradient itself."""
    _, whole = accumulated(unsloth_ref.training, 1)
    errors = [float((mean_of_means(steps)[1] - whole).norm() / whole.norm()) for steps in (2, 4, 8)]
    assert errors == sorted(errors)
    assert errors[0] > 0.1 and errors[1] > 0.5 and errors[2] > 1


def test_what_dividing_twice_costs() -> None:
    """Loss and gradient shrink by the number of microbatches."""
    loss, whole = accumulated(unsloth_ref.training, 1)
    model = llama()
    own = loss_with(model, unsloth_ref.training)
    twice = unsloth_ref.training.accumulate(lambda b, n: own(b, n) / 4, batches(unsloth_ref.training, 2))
    assert abs(float(twice) * 4 - loss) <= EXACT * loss
    assert (gradient(model) * 4 - whole).norm() <= EXACT * whole.norm()


def test_what_counting_labels_that_are_no_targets_costs() -> None:
    """The first token of a document is no target: counting it shrinks the loss by (tokens - documents) / tokens."""
    (batch,) = batches(unsloth_ref.training, len(LENGTHS))
    assert int(unsloth_ref.training.count_targets([batch["labels"]])) == sum(LENGTHS) - len(LENGTHS)
    padded = nn.utils.rnn.pad_sequence(
        [example["input_ids"] for example in examples()], batch_first=True, padding_value=-100
    )
    assert int((padded != -100).sum()) == sum(LENGTHS)
    assert int(unsloth_ref.training.count_targets([padded])) == sum(LENGTHS) - len(LENGTHS)


@each_package
def test_a_microbatch_without_targets_counts_for_nothing(package: ModuleType) -> None:
    """Nor does a window without any: loss 0, gradient 0, nothing that is no number."""
    window = batches(package, 4)
    idle = package.collate([{"input_ids": [5, 6, 7], "labels": [-100] * 3}]).as_dict()
    with_idle, without = llama(), llama()
    one = package.accumulate(loss_with(with_idle, package), [idle, *window])
    other = package.accumulate(loss_with(without, package), window)
    assert abs(float(one - other)) <= EXACT * float(other)
    assert (gradient(with_idle) - gradient(without)).norm() <= EXACT * gradient(without).norm()
    model = llama()
    assert float(package.accumulate(loss_with(model, package), [idle])) == 0
    assert not gradient(model).any()


def trained(package: ModuleType, size: int, accumulation: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Losses, and all weights after training with AdamW under a falling rate."""
    model = llama()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    found = batches(package, size, lengths)
    losses = package.train(
        loss_with(model, package), iter(found), optimizer, accumulation=accumulation, scheduler=scheduler
    )
    return losses, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@each_package
def test_windows_train_as_whole_batches_the_short_last_one_too(package: ModuleType) -> None:
    """Ten documents, four a step: two at a time or all four at once; two are left for the third step."""
    lengths = [*LENGTHS, 9, 3]
    losses, weights = trained(package, 2, 2, lengths)
    whole_losses, whole_weights = trained(unsloth_ref.training, 4, 1, lengths)
    assert losses.shape == whole_losses.shape == (3,)
    # A step of AdamW is lr * g / (|g| + eps), and so changes by at most lr / eps = 1e5 times what the gradient does.
    torch.testing.assert_close(losses, whole_losses, rtol=1e5 * EXACT, atol=0)
    torch.testing.assert_close(weights, whole_weights, rtol=0, atol=1e5 * EXACT)


@each_package
def test_the_loop_by_hand(package: ModuleType) -> None:
    """The same as its four lines written out, bit for bit, for one microbatch a step."""
    losses, weights = trained(package, 2, 1, LENGTHS)
    model = llama()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    expected = []
    for batch in batches(package, 2):
        optimizer.zero_grad()
        loss = loss_with(model, package)(batch, package.count_targets([batch["labels"]]))
        loss.backward()
        optimizer.step()
        scheduler.step()
        expected.append(loss.detach())
    assert torch.equal(losses, torch.stack(expected))
    assert torch.equal(weights, torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))


def test_the_fast_loop_never_reads_a_number() -> None:
    """Neither a loss nor a count is read back before the end: that would wait for the device at every microbatch."""
    reads = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__):
                reads.append(func.__name__)
            return func(*args, **(kwargs or {}))

    weight = nn.Parameter(torch.ones(7, 7))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def loss_of(batch: Any, count: Tensor) -> Tensor:
        return (weight[batch["labels"].clamp(min=0)].logsumexp(-1).sum()) / count

    window = [{"labels": torch.randint(0, 7, (2, 5))} for _ in range(6)]
    with Watched():
        unsloth_fast.training.train(loss_of, window, optimizer, accumulation=2)
    assert reads == ["cpu"]


@each_package
def test_errors_name_the_argument(package: ModuleType) -> None:
    """An empty window, a window of nothing."""
    loss_of = loss_with(llama(), package)
    with pytest.raises(ValueError, match=r"^window: got no microbatch"):
        package.accumulate(loss_of, [])
    optimizer = AdamW([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=r"^accumulation: got 0"):
        package.train(loss_of, [], optimizer, accumulation=0)
    assert package.train(loss_of, [], optimizer).shape == (0,)
