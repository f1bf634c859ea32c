"""The training loss: shift, count and normalisation, compared with torch's cross entropy in float64."""

import inspect
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

import unsloth_fast.training
import unsloth_ref.training
from unsloth_ref.kernels import cross_entropy
from unsloth_ref.types import IGNORE_INDEX

PACKAGES = [unsloth_ref.training, unsloth_fast.training]
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)

# Sums of at most 64 terms in different orders differ by less than 64 roundings of float64, relative to the sum of the
# absolute terms; log-sum-exp and the division add fewer than 64 more.
EXACT = 128 * 2.0**-53


def batch(lengths: list[int], vocab: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [B, S, V] in float64, and labels [B, S] padded with ignored labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(lengths), max(lengths), vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (len(lengths), max(lengths)), generator=generator)
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORE_INDEX
    return logits, labels


def test_both_packages_export_the_same_pieces() -> None:
    """Names, parameters and defaults are equal."""
    assert unsloth_ref.training.__all__ == unsloth_fast.training.__all__
    for name in unsloth_ref.training.__all__:
        assert inspect.signature(getattr(PACKAGES[0], name)) == inspect.signature(getattr(PACKAGES[1], name))


@each_package
@given(rows=st.integers(0, 3), length=st.integers(0, 6), ignore_index=st.sampled_from([IGNORE_INDEX, 0, -1]))
@settings(max_examples=30, deadline=None)
def test_shift_and_count_by_definition(package: ModuleType, rows: int, length: int, ignore_index: int) -> None:
    """The target at t is the label at t + 1; the labels are not modified."""
    generator = torch.Generator().manual_seed(rows * 7 + length)
    labels = torch.randint(-1, 3, (rows, length), generator=generator)
    before = labels.clone()
    shifted = package.shift_labels(labels, ignore_index)
    assert shifted.tolist() == [[*row[1:], ignore_index][:length] for row in labels.tolist()]
    counted = package.count_targets([labels, labels], ignore_index)
    assert counted.dtype == torch.int64 and counted.ndim == 0
    assert counted.item() == 2 * sum(label != ignore_index for row in labels.tolist() for label in row[1:])
    assert torch.equal(labels, before)


@each_package
def test_count_of_nothing_is_zero(package: ModuleType) -> None:
    """The microbatches are an empty iterator."""
    assert package.count_targets(iter(())).item() == 0


@each_package
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_and_gradient_equal_torch(package: ModuleType, label_smoothing: float) -> None:
    """Without num_items the loss is the mean over the targets of the call."""
    logits, labels = batch([5, 2, 9, 1])
    ours = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    loss = package.next_token_loss(ours, labels, cross_entropy=cross_entropy, label_smoothing=label_smoothing)
    expected = torch_cross_entropy(
        theirs[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), label_smoothing=label_smoothing
    )
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=EXACT)


@each_package
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_microbatches_sum_to_the_batch(package: ModuleType, lengths: list[int], seed: int) -> None:
    """One microbatch per row, each divided by the count of all, gives the loss and the gradient of the batch."""
    logits, labels = batch(lengths, seed=seed)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = package.next_token_loss(whole, labels, cross_entropy=cross_entropy)
    loss.backward()
    count = package.count_targets(row[None] for row in labels)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(lengths)):
        part = package.next_token_loss(
            parts[row : row + 1], labels[row : row + 1], cross_entropy=cross_entropy, num_items=count
        )
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, loss.detach(), rtol=EXACT, atol=0)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=EXACT)


def test_a_mean_of_means_is_wrong() -> None:
    """If each microbatch is divided by its own count, one target of 2 tokens has the weight of 11 targets of 12."""
    logits, labels = batch([2, 12])
    loss = unsloth_ref.training.next_token_loss(logits, labels, cross_entropy=cross_entropy)
    each = [
        unsloth_ref.training.next_token_loss(logits[row : row + 1], labels[row : row + 1], cross_entropy=cross_entropy)
        for row in range(2)
    ]
    torch.testing.assert_close((1 * each[0] + 11 * each[1]) / 12, loss, rtol=EXACT, atol=0)
    # The two means differ by (each0 - each1) * (1/2 - 1/12).
    expected_error = (each[0] - each[1]) * 5 / 12
    torch.testing.assert_close((each[0] + each[1]) / 2 - loss, expected_error, rtol=0, atol=10 * EXACT)
    assert expected_error.abs() > 1e6 * EXACT


@each_package
def test_no_target_gives_zero(package: ModuleType) -> None:
    """If all labels are ignored, loss and gradient are 0, with and without num_items; torch's mean is NaN."""
    logits, labels = batch([1, 1, 3])
    labels[:] = IGNORE_INDEX
    logits.requires_grad_()
    assert torch_cross_entropy(logits.flatten(0, 1), labels.flatten()).isnan()
    assert (torch_cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 0).isnan()
    for num_items in (None, package.count_targets([labels])):
        loss = package.next_token_loss(logits, labels, cross_entropy=cross_entropy, num_items=num_items)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert not gradient.any()


def test_the_fast_loss_does_not_copy_the_logits() -> None:
    """The operation gets the memory of the logits."""
    logits, labels = batch([5, 3])
    seen = []

    def spy(flat: Tensor, targets: Tensor, **options: object) -> Tensor:
        seen.append((flat.data_ptr(), tuple(flat.shape), tuple(targets.shape)))
        return flat.sum()

    unsloth_fast.training.next_token_loss(logits, labels, cross_entropy=spy)
    assert seen == [(logits.data_ptr(), (10, 11), (10,))]


@each_package
def test_errors_name_the_argument(package: ModuleType) -> None:
    """Wrong shapes and dtypes are refused."""
    logits, labels = batch([3])
    with pytest.raises(ValueError, match=r"^logits: got shape"):
        package.next_token_loss(logits[0], labels, cross_entropy=cross_entropy)
    with pytest.raises(ValueError, match=r"^labels: got shape"):
        package.next_token_loss(logits, labels[:, :2], cross_entropy=cross_entropy)
    with pytest.raises(TypeError, match=r"^labels: got dtype"):
        package.next_token_loss(logits, labels.double(), cross_entropy=cross_entropy)
    with pytest.raises(ValueError, match=r"^labels: got shape"):
        package.shift_labels(labels[0])
    with pytest.raises(TypeError, match=r"^labels: got dtype"):
        package.count_targets([labels.float()])
