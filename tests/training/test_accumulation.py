"""Exact gradient accumulation on a tiny Llama in float64, and the size of the errors that other trainers made."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import unsloth_fast.training
import unsloth_ref.training
from tests import tiny
from unsloth_ref import kernels
from unsloth_ref.types import IGNORE_INDEX

PACKAGES = [unsloth_ref.training, unsloth_fast.training]
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)

# Lengths for which the mean of means is far off: one target has the weight of 127.
LENGTHS = [4, 64, 8, 33, 2, 17, 128, 5]
# A gradient is a sum over 253 targets of sums over at most 128 positions: a few thousand roundings of float64, relative
# to the norm of the gradient.
EXACT = 4000 * 2.0**-53


def llama() -> nn.Module:
    """A tiny Llama, always with the same weights."""
    return tiny.model(dtype=torch.float64, max_position_embeddings=128, num_hidden_layers=1)


def untouched(seed: int) -> nn.Module:
    """A newly initialised Llama of vocabulary 100; its weights are drawn here, so that releases do not differ."""
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
    """Padding-free microbatches of `size` documents each."""
    return [package.collate(found[first : first + size]).as_dict() for first in range(0, len(found), size)]


def loss_with(model: nn.Module, package: ModuleType) -> Callable[[Any, Any], Tensor]:
    """A function of a microbatch and a count: the summed loss of the model, divided by the count."""

    def loss_of(batch: Any, count: Any) -> Tensor:
        with tiny.KeepFloat64():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return package.next_token_loss(logits, batch["labels"], cross_entropy=kernels.cross_entropy, num_items=count)

    return loss_of


def gradient(model: nn.Module) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def accumulate(loss_of: Callable[[Any, Any], Tensor], package: ModuleType, window: list[dict[str, Any]]) -> float:
    """Add the gradients of one step, and return its loss: each microbatch is divided by the targets of all."""
    count = package.count_targets(microbatch["labels"] for microbatch in window)
    total = 0.0
    for microbatch in window:
        loss = loss_of(microbatch, count)
        loss.backward()
        total += loss.item()
    return total


def accumulated(package: ModuleType, steps: int, model: nn.Module, found: list[Any]) -> tuple[float, Tensor]:
    """Loss and gradient of the documents in `steps` microbatches."""
    model.zero_grad()
    loss = accumulate(loss_with(model, package), package, batches(package, found, len(found) // steps))
    return loss, gradient(model)


def mean_of_means(steps: int, model: nn.Module, found: list[Any]) -> tuple[float, Tensor]:
    """The same, with each microbatch divided by its own targets and by the number of microbatches."""
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
def test_accumulation_is_exact_up_to_rounding(package: ModuleType, steps: int) -> None:
    """The loss and the gradient of two, four or eight microbatches are those of one."""
    loss, whole = accumulated(unsloth_ref.training, 1, llama(), examples())
    parts_loss, parts = accumulated(package, steps, llama(), examples())
    assert abs(parts_loss - loss) <= EXACT * loss
    assert (parts - whole).norm() <= EXACT * whole.norm()


# Reported for a tiny Llama whose sizes and texts are unknown, by the number of microbatches: the relative error of the
# gradient of a mean of means, its norm divided by the right norm, and the error of the loss.
REPORTED = {2: (0.18, 1.03, 4.6230 - 4.6219), 4: (0.93, 1.44, 4.6121 - 4.6219), 8: (2.99, 3.23, 4.5816 - 4.6219)}
DIGITS = torch.tensor([0.01, 0.01, 0.0002])


def test_what_a_mean_of_means_costs() -> None:
    """The reported numbers of one model and text are within the range of 64 models and texts, to the last digit."""
    costs: dict[int, list[tuple[float, float, float]]] = {steps: [] for steps in REPORTED}
    for seed in range(64):
        model, found = untouched(seed), examples(seed=seed, vocab=100)
        loss, whole = accumulated(unsloth_ref.training, 1, model, found)
        for steps, seen in costs.items():
            mean_loss, mean = mean_of_means(steps, model, found)
            seen.append(
                (float((mean - whole).norm() / whole.norm()), float(mean.norm() / whole.norm()), mean_loss - loss)
            )
    for steps, numbers in REPORTED.items():
        seen, reported = torch.tensor(costs[steps]), torch.tensor(numbers)
        assert (seen.min(0).values <= reported + DIGITS / 2).all(), steps
        assert (seen.max(0).values >= reported - DIGITS / 2).all(), steps


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_what_a_mean_of_means_costs_by_the_lengths_alone(steps: int) -> None:
    """The error has a closed form if the gradients of the N targets have equal norms and are orthogonal.

    This holds for zero logits. A microbatch of n targets gives each the weight 1 / (steps * n) instead of 1 / N. The
    norm of the gradient, divided by the right norm, is the root of N / steps^2 times the sum of 1 / n; the error is the
    root of that sum less 1: 0.172, 0.834 and 2.508.
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
    """Loss and gradient are too small by the number of microbatches."""
    loss, whole = accumulated(unsloth_ref.training, 1, llama(), examples())
    model = llama()
    own = loss_with(model, unsloth_ref.training)
    twice = accumulate(lambda b, n: own(b, n) / 4, unsloth_ref.training, batches(unsloth_ref.training, examples(), 2))
    assert abs(twice * 4 - loss) <= EXACT * loss
    assert (gradient(model) * 4 - whole).norm() <= EXACT * whole.norm()


def assert_off(package: ModuleType, batch: dict[str, Any], wrong: int, by: float) -> None:
    """Dividing the batch by a wrong count gives `by` times the right loss and gradient; `count_targets` gives these."""
    model, other = llama(), llama()
    count = package.count_targets([batch["labels"]])
    right = loss_with(model, package)(batch, count)
    found = loss_with(other, package)(batch, wrong)
    right.backward()
    found.backward()
    assert found.item() == pytest.approx(by * right.item(), rel=EXACT)
    assert (gradient(other) - by * gradient(model)).norm() <= EXACT * abs(by) * gradient(model).norm()
    own = llama()
    assert accumulate(loss_with(own, package), package, [batch]) == pytest.approx(right.item(), rel=EXACT)
    assert (gradient(own) - gradient(model)).norm() <= EXACT * gradient(model).norm()


@each_package
def test_what_counting_first_labels_costs(package: ModuleType) -> None:
    """The first token of a document is not a target: counting it scales the loss by (tokens - documents) / tokens."""
    tokens = nn.utils.rnn.pad_sequence([example["input_ids"] for example in examples()], batch_first=True)
    padding = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
    batch = {"input_ids": tokens, "labels": tokens.masked_fill(padding, IGNORE_INDEX), "position_ids": None}
    unshifted = int((batch["labels"] != IGNORE_INDEX).sum())
    assert unshifted == sum(LENGTHS)
    assert_off(package, batch, unshifted, sum(length - 1 for length in LENGTHS) / sum(LENGTHS))


@each_package
def test_what_subtracting_boundaries_twice_costs(package: ModuleType) -> None:
    """T tokens in N documents have T - N targets. Subtracting N - 1 again makes loss and gradient too large."""
    (batch,) = batches(package, examples(), len(LENGTHS))
    right, wrong = sum(LENGTHS) - len(LENGTHS), sum(LENGTHS) - 2 * len(LENGTHS) + 1
    assert_off(package, batch, wrong, right / wrong)
    # Masked labels are not masked or counted again.
    again = {"input_ids": batch["input_ids"][0], "labels": batch["labels"][0], "seq_lengths": LENGTHS}
    assert torch.equal(package.collate([again]).labels, batch["labels"])
    # Five tokens in four documents have one target; 5 - 2 * 4 + 1 is negative.
    (short,) = batches(package, examples([1, 2, 1, 1]), 4)
    assert int(package.count_targets([short["labels"]])) == 1


@each_package
def test_what_joining_documents_costs(package: ModuleType) -> None:
    """Four short documents have the same loss one by one, padded, and concatenated.

    The loss differs if the last token of each is trained to predict the next document, and if documents see each other
    too. The reported numbers of one model and text are within the range of 64 models and texts, to the last digit.
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
                logits, padded.masked_fill(~mask, IGNORE_INDEX), cross_entropy=kernels.cross_entropy
            )
            (batch,) = batches(package, found, 4)
            loss = loss_with(model, package)(batch, None)
            unmasked = batch | {"labels": batch["input_ids"]}
            unmasked_loss = loss_with(model, package)(unmasked, None)
            joined = loss_with(model, package)(unmasked | {"position_ids": torch.arange(11)[None]}, None)
        assert [int(package.count_targets([labels])) for labels in (batch["labels"], batch["input_ids"])] == [7, 10]
        assert float(loss) == pytest.approx(float(sum(apart)) / 7, rel=EXACT)
        assert float(padded_loss) == pytest.approx(float(sum(apart)) / 7, rel=EXACT)
        seen.append([float(unmasked_loss - loss), float(joined - loss)])
    off = torch.tensor(seen)
    assert off.abs().min() > 1e6 * EXACT
    reported, digit = torch.tensor([4.5590 - 4.6233, 4.6641 - 4.6233]), 0.0001
    assert (off.min(0).values <= reported + digit).all() and (reported - digit <= off.max(0).values).all()


@each_package
def test_a_microbatch_without_targets_changes_nothing(package: ModuleType) -> None:
    """A step without any target has loss 0 and gradient 0, not NaN."""
    window = batches(package, examples(), 4)
    idle = package.collate([{"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX] * 3}]).as_dict()
    with_idle, without = llama(), llama()
    one = accumulate(loss_with(with_idle, package), package, [idle, *window])
    other = accumulate(loss_with(without, package), package, window)
    assert abs(one - other) <= EXACT * other
    assert (gradient(with_idle) - gradient(without)).norm() <= EXACT * gradient(without).norm()
    model = llama()
    assert accumulate(loss_with(model, package), package, [idle]) == 0
    assert not gradient(model).any()


@each_package
def test_gradients_are_added_to_those_of_the_step_before(package: ModuleType) -> None:
    """Two windows without `zero_grad` between them give twice the gradient of one."""
    model, window = llama(), batches(package, examples(), 4)
    accumulate(loss_with(model, package), package, window)
    once = gradient(model)
    accumulate(loss_with(model, package), package, window)
    assert (gradient(model) - 2 * once).norm() <= EXACT * once.norm()


@each_package
def test_microbatches_are_not_modified(package: ModuleType) -> None:
    window = batches(package, examples(), 4)
    before = copy.deepcopy(window)
    accumulate(loss_with(llama(), package), package, window)
    for batch, copied in zip(window, before, strict=True):
        assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(copied[name])) for name in copied)


@each_package
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=5),
    idle=st.integers(0, 4),
    seed=st.integers(0, 3),
)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_any_partition_of_a_batch_has_its_loss_and_gradient(
    package: ModuleType, lengths: list[list[int]], idle: int, seed: int
) -> None:
    """The model is a bigram model in float64; one of the microbatches may have no target."""
    parts = [package.collate(examples(rows, seed + index, vocab=7)).as_dict() for index, rows in enumerate(lengths)]
    parts[idle % len(parts)]["labels"].fill_(IGNORE_INDEX)
    whole = {name: torch.cat([part[name] for part in parts], dim=1) for name in ("input_ids", "labels")}
    weights = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def run(window: list[dict[str, Any]]) -> tuple[float, Tensor]:
        leaf = weights.clone().requires_grad_()

        def loss_of(batch: Any, count: Tensor) -> Tensor:
            logits = leaf[0][batch["input_ids"]] @ leaf[1].T
            return package.next_token_loss(
                logits, batch["labels"], cross_entropy=kernels.cross_entropy, num_items=count
            )

        loss = accumulate(loss_of, package, window)
        assert leaf.grad is not None
        return loss, leaf.grad

    loss, grad = run(parts)
    whole_loss, whole_grad = run([whole])
    # Weights are below 4 in size, so a logit is below 48 and a loss below 96 + log(7) < 128.
    assert abs(loss - whole_loss) <= 128 * EXACT
    assert (grad - whole_grad).abs().max() <= 128 * EXACT


def test_the_fast_pieces_never_read_a_number() -> None:
    """Neither a loss nor a count is copied to the CPU, which would wait for the device at every microbatch."""
    reads = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__):
                reads.append(func.__name__)
            return func(*args, **(kwargs or {}))

    def cross_entropy(logits: Tensor, labels: Tensor, *, num_items: Tensor, **options: Any) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items

    weight = nn.Parameter(torch.ones(7, 7))
    window = [torch.randint(0, 7, (2, 5)) for _ in range(6)]
    pieces = unsloth_fast.training
    with Watched():
        count = pieces.count_targets(window)
        for labels in window:
            loss = pieces.next_token_loss(weight[labels], labels, cross_entropy=cross_entropy, num_items=count)
            loss.backward()
    assert reads == []
    assert weight.grad is not None
