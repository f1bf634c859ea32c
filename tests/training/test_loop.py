"""The training loop: exact accumulation on a tiny Llama in float64, and the size of what others got wrong."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

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


def untouched(seed: int) -> nn.Module:
    """Hugging Face's Llama as it begins, of a vocabulary of 100, drawn here so that releases do not differ."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=2, **sizes)).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def examples(lengths: list[int] = LENGTHS, seed: int = 1, vocab: int = 48) -> list[dict[str, Any]]:
    """Documents of random words."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, vocab, (length,), generator=generator)} for length in lengths]


def batches(package: ModuleType, found: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Padding-free microbatches of so many documents."""
    return [package.collate(found[first : first + size]).as_dict() for first in range(0, len(found), size)]


def loss_with(model: nn.Module, package: ModuleType) -> Callable[[Any, Any], Tensor]:
    """The loss of a microbatch of this model."""

    def loss_of(batch: Any, count: Any) -> Tensor:
        with tiny.KeepFloat64():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return package.next_token_loss(logits, batch["labels"], cross_entropy=kernels.cross_entropy, num_items=count)

    return loss_of


def gradient(model: nn.Module) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def accumulated(package: ModuleType, steps: int, model: nn.Module, found: list[Any]) -> tuple[float, Tensor]:
    """Loss and gradient over so many microbatches."""
    model.zero_grad()
    loss = package.accumulate(loss_with(model, package), batches(package, found, len(found) // steps))
    return float(loss), gradient(model)


def mean_of_means(steps: int, model: nn.Module, found: list[Any]) -> tuple[float, Tensor]:
    """The same with each microbatch divided by its own targets, and all by their number."""
    model.zero_grad()
    loss_of = loss_with(model, unsloth_ref.training)
    losses = []
    for batch in batches(unsloth_ref.training, found, len(found) // steps):
        loss = loss_of(batch, None) / steps
        loss.backward()
        losses.append(loss.item())
    return sum(losses), gradient(model)


@each_package
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_accumulation_changes_nothing_but_rounding(package: ModuleType, steps: int) -> None:
    """Two, four or eight microbatches have the loss and the gradient of one."""
    loss, whole = accumulated(unsloth_ref.training, 1, llama(), examples())
    parts_loss, parts = accumulated(package, steps, llama(), examples())
    assert abs(parts_loss - loss) <= EXACT * loss
    assert (parts - whole).norm() <= EXACT * whole.norm()


# What spec/trainer.md 4.3 tells of some tiny Llama, whose sizes and texts it does not: the relative error of the
# gradient of a mean of means over so many microbatches, its norm by the right one's, and the error of the loss.
TOLD = {2: (0.18, 1.03, 4.6230 - 4.6219), 4: (0.93, 1.44, 4.6121 - 4.6219), 8: (2.99, 3.23, 4.5816 - 4.6219)}
TOLD_DIGITS = torch.tensor([0.01, 0.01, 0.0002])


def test_what_a_mean_of_means_costs() -> None:
    """What was told of one model and text lies, to its last digit, within what 64 of them give."""
    costs: dict[int, list[tuple[float, float, float]]] = {steps: [] for steps in TOLD}
    for seed in range(64):
        model, found = untouched(seed), examples(seed=seed, vocab=100)
        loss, whole = accumulated(unsloth_ref.training, 1, model, found)
        for steps, seen in costs.items():
            mean_loss, mean = mean_of_means(steps, model, found)
            seen.append(
                (float((mean - whole).norm() / whole.norm()), float(mean.norm() / whole.norm()), mean_loss - loss)
            )
    for steps, told in TOLD.items():
        seen, told = torch.tensor(costs[steps]), torch.tensor(told)
        assert (seen.min(0).values <= told + TOLD_DIGITS / 2).all(), steps
        assert (seen.max(0).values >= told - TOLD_DIGITS / 2).all(), steps


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_what_a_mean_of_means_costs_by_the_lengths_alone(steps: int) -> None:
    """Where the N targets' gradients are of one size and have nothing in common, as those of even logits are.

    A microbatch of n targets gives each 1 / (steps n) instead of 1 / N. So the norm, by the right one's, is the root of
    N / steps^2 times the sum of 1 / n, and the error the root of one less: 0.172, 0.834 and 2.508.
    """
    parts = batches(unsloth_ref.training, examples(), len(LENGTHS) // steps)
    counts = torch.stack([unsloth_ref.training.count_targets([part["labels"]]) for part in parts])
    right, means = [], []
    for part in parts:
        logits = torch.zeros(1, part["labels"].shape[1], 48, dtype=torch.float64, requires_grad=True)
        for gradients, count, share in ((right, counts.sum(), 1), (means, None, steps)):
            loss = unsloth_ref.training.next_token_loss(
                logits, part["labels"], cross_entropy=kernels.cross_entropy, num_items=count
            )
            gradients.append(torch.autograd.grad(loss / share, logits)[0].flatten())
    whole, mean = torch.cat(right), torch.cat(means)
    norm = counts.sum() / steps**2 * (1 / counts.double()).sum()
    assert float(mean.norm() / whole.norm()) == pytest.approx(float(norm.sqrt()), rel=EXACT)
    assert float((mean - whole).norm() / whole.norm()) == pytest.approx(float((norm - 1).sqrt()), rel=EXACT)


def test_what_dividing_twice_costs() -> None:
    """Loss and gradient shrink by the number of microbatches."""
    loss, whole = accumulated(unsloth_ref.training, 1, llama(), examples())
    model = llama()
    own = loss_with(model, unsloth_ref.training)
    twice = unsloth_ref.training.accumulate(lambda b, n: own(b, n) / 4, batches(unsloth_ref.training, examples(), 2))
    assert abs(float(twice) * 4 - loss) <= EXACT * loss
    assert (gradient(model) * 4 - whole).norm() <= EXACT * whole.norm()


def assert_off(package: ModuleType, batch: dict[str, Any], wrong: int, by: float) -> None:
    """Loss and gradient of the batch are so many times the right ones if divided by a wrong count; not by the loop."""
    model, other = llama(), llama()
    count = package.count_targets([batch["labels"]])
    right = loss_with(model, package)(batch, count)
    found = loss_with(other, package)(batch, wrong)
    right.backward()
    found.backward()
    assert found.item() == pytest.approx(by * right.item(), rel=EXACT)
    assert (gradient(other) - by * gradient(model)).norm() <= EXACT * abs(by) * gradient(model).norm()
    own = llama()
    assert float(package.accumulate(loss_with(own, package), [batch])) == pytest.approx(right.item(), rel=EXACT)
    assert (gradient(own) - gradient(model)).norm() <= EXACT * gradient(model).norm()


@each_package
def test_what_counting_labels_that_are_no_targets_costs(package: ModuleType) -> None:
    """The first token of a document is no target: counting it shrinks the loss by (tokens - documents) / tokens."""
    tokens = nn.utils.rnn.pad_sequence([example["input_ids"] for example in examples()], batch_first=True)
    padding = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
    batch = {"input_ids": tokens, "labels": tokens.masked_fill(padding, -100), "position_ids": None}
    unshifted = int((batch["labels"] != -100).sum())
    assert unshifted == sum(LENGTHS)
    assert_off(package, batch, unshifted, sum(length - 1 for length in LENGTHS) / sum(LENGTHS))


@each_package
def test_what_taking_boundaries_off_twice_costs(package: ModuleType) -> None:
    """Of T tokens in N documents T - N are targets: less N - 1 once more, loss and gradient grow."""
    (batch,) = batches(package, examples(), len(LENGTHS))
    right, wrong = sum(LENGTHS) - len(LENGTHS), sum(LENGTHS) - 2 * len(LENGTHS) + 1
    assert_off(package, batch, wrong, right / wrong)
    # What is masked is neither masked nor counted again.
    again = {"input_ids": batch["input_ids"][0], "labels": batch["labels"][0], "seq_lengths": LENGTHS}
    assert torch.equal(package.collate([again]).labels, batch["labels"])
    # Five tokens in four documents have a target; 5 - 2 * 4 + 1 is less than none.
    (short,) = batches(package, examples([1, 2, 1, 1]), 4)
    assert int(package.count_targets([short["labels"]])) == 1


@each_package
def test_what_joining_documents_costs(package: ModuleType) -> None:
    """Four short documents have one loss apart, padded and end to end.

    It is another one where the last token of each is to foresee the next document, and where they see each other, too;
    and what was told of one model and text, to the last digit, lies within what 64 of them give.
    """
    lengths = [5, 2, 1, 3]
    seen = []
    for seed in range(64):
        model, found = untouched(seed), examples(lengths, seed, vocab=100)
        tokens = [example["input_ids"] for example in found]
        with torch.no_grad(), tiny.KeepFloat64():
            apart = [
                nn.functional.cross_entropy(model(text[None]).logits[0, :-1], text[1:], reduction="sum")
                for text in tokens
            ]
            padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
            mask = torch.arange(5) < torch.tensor(lengths)[:, None]
            logits = model(padded, attention_mask=mask.long()).logits
            padded_loss = package.next_token_loss(
                logits, padded.masked_fill(~mask, -100), cross_entropy=kernels.cross_entropy
            )
            (batch,) = batches(package, found, 4)
            loss = loss_with(model, package)(batch, None)
            unmasked = batch | {"labels": batch["input_ids"]}
            foreseen = loss_with(model, package)(unmasked, None)
            joined = loss_with(model, package)(unmasked | {"position_ids": torch.arange(11)[None]}, None)
        assert [int(package.count_targets([labels])) for labels in (batch["labels"], batch["input_ids"])] == [7, 10]
        assert float(loss) == pytest.approx(float(sum(apart)) / 7, rel=EXACT)
        assert float(padded_loss) == pytest.approx(float(sum(apart)) / 7, rel=EXACT)
        seen.append([float(foreseen - loss), float(joined - loss)])
    off = torch.tensor(seen)
    assert off.abs().min() > 1e6 * EXACT
    told, digit = torch.tensor([4.5590 - 4.6233, 4.6641 - 4.6233]), 0.0001
    assert (off.min(0).values <= told + digit).all() and (told - digit <= off.max(0).values).all()


@each_package
def test_a_microbatch_without_targets_counts_for_nothing(package: ModuleType) -> None:
    """Nor does a window without any: loss 0, gradient 0, nothing that is no number."""
    window = batches(package, examples(), 4)
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
    found = iter(batches(package, examples(lengths), size))
    losses = package.train(loss_with(model, package), found, optimizer, accumulation=accumulation, scheduler=scheduler)
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
    for batch in batches(package, examples(), 2):
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
