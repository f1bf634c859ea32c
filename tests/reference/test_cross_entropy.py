"""The reference cross_entropy against values worked by hand, its formulas in numpy, PyTorch and transformers."""

from math import inf, log, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy as torch_cross_entropy
from transformers.loss.loss_utils import ForCausalLMLoss

from unsloth_ref.kernels import cross_entropy
from unsloth_ref.types import Reduction

# Float64 on 12 x 12 at most: fewer than 40 roundings of 1.1e-16 of terms below 100 sum to less than 5e-13; a single
# rounding in float32 (6e-8) is larger.
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"logit_scale": 0.5, "softcap": 3.0},
    {"label_smoothing": 0.1, "z_loss": 0.01},
    {"logit_scale": 1.5, "softcap": 2.0, "label_smoothing": 0.3, "z_loss": 0.1},
]


def logits_of(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers of standard deviation 3 that depend on the seed alone and require a gradient."""
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype).requires_grad_()


def labels_of(rows: int, vocab: int, ignore_index: int = -100, seed: int = 0) -> Tensor:
    """Labels over the whole vocabulary; about a third of the rows is ignored."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab, (rows,), generator=rng)
    return labels.masked_fill(torch.rand(rows, generator=rng) < 1 / 3, ignore_index)


@pytest.mark.parametrize(
    ("logits", "label", "options", "loss", "gradient"),
    [
        # p = (1/8, 2/8, 5/8)
        ([0.0, log(2), log(5)], 2, {}, log(1.6), [0.125, 0.25, -0.375]),
        # 0.7 ln 1.6 + 0.3 (ln 8 - ln 10 / 3);  p - 0.7 onehot - 0.1
        ([0.0, log(2), log(5)], 2, {"label_smoothing": 0.3}, 0.7225764936765611, [0.025, 0.15, -0.175]),
        # ln 1.6 + ln(8)^2 / 2;  p (1 + ln 8) - onehot
        (
            [0.0, log(2), log(5)],
            2,
            {"z_loss": 0.5},
            2.6320421918776415,
            [0.38493019270997947, 0.7698603854199589, 0.9246509635498974],
        ),
        # z = (2 tanh(ln(3) / 2), 0) = (1, 0);  (p - 1) (1 - 1/4) / 2: if the cap came first, z would be (0.8, 0)
        (
            [2 * log(3), 0.0],
            0,
            {"logit_scale": 0.5, "softcap": 2.0},
            0.31326168751822286,
            [-0.10085303301374816, 0.13447071068499755],
        ),
    ],
    ids=["plain", "label_smoothing", "z_loss", "scale before softcap"],
)
def test_values_worked_by_hand(
    logits: list[float], label: int, options: dict[str, Any], loss: float, gradient: list[float]
) -> None:
    """Each case is one row; comments above show the arithmetic."""
    x = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    ours = cross_entropy(x, torch.tensor([label]), **options)
    torch.testing.assert_close(ours.item(), loss, **FLOAT64)
    torch.testing.assert_close(grad(ours, x)[0][0].tolist(), gradient, **FLOAT64)


def formulas(
    x: np.ndarray,
    labels: np.ndarray,
    ignore_index: int,
    *,
    logit_scale: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses [T] and their derivatives [T, V], row by row, by the formulas of the module's docstring."""
    losses, derivatives, s = np.zeros(len(x)), np.zeros_like(x), label_smoothing
    for row, label in enumerate(labels):
        if label == ignore_index:
            continue
        z = logit_scale * x[row]
        if softcap:
            z = softcap * np.tanh(z / softcap)
        lse = np.log(np.exp(z).sum())
        p, onehot = np.exp(z - lse), np.arange(len(z)) == label
        losses[row] = (1 - s) * (lse - z[label]) + s * (lse - z.mean()) + z_loss * lse**2
        dz = p * (1 + 2 * z_loss * lse) - (1 - s) * onehot - s / len(z)
        derivatives[row] = dz * (1 - (z / softcap) ** 2 if softcap else 1) * logit_scale
    return losses, derivatives


@EXAMPLES
@given(
    rows=st.integers(0, 6),
    vocab=st.integers(1, 12),
    ignore_index=st.sampled_from([-100, 0, 999]),
    logit_scale=st.sampled_from([1.0, 0.5, -2.0]),
    softcap=st.sampled_from([0.0, 2.0, 30.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**16),
)
def test_formulas_of_the_docstring(rows: int, vocab: int, ignore_index: int, seed: int, **options: float) -> None:
    """Losses, gradients and the three reductions agree, for any options and labels, with all rows ignored or none."""
    logits, labels = logits_of(rows, vocab, seed=seed), labels_of(rows, vocab, ignore_index, seed)
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    losses, derivatives = formulas(logits.detach().numpy(), labels.numpy(), ignore_index, **options)

    def ours(reduction: Reduction) -> Tensor:
        return cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction, **options)

    targets = max(1, int((labels != ignore_index).sum()))
    torch.testing.assert_close(ours("none").detach().numpy(), losses, **FLOAT64)
    torch.testing.assert_close(ours("sum").item(), losses.sum().item(), **FLOAT64)
    torch.testing.assert_close(ours("mean").item(), losses.sum().item() / targets, **FLOAT64)
    expected = derivatives * upstream.numpy()[:, None]
    torch.testing.assert_close(grad(ours("none"), logits, upstream)[0].numpy(), expected, **FLOAT64)
    torch.testing.assert_close(grad(ours("mean"), logits)[0].numpy(), derivatives / targets, **FLOAT64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_the_derivatives(options: dict[str, Any], reduction: Reduction) -> None:
    """First and second derivatives agree with finite differences, with one ignored row."""
    labels = torch.tensor([1, -100, 4])

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels, reduction=reduction, **options)

    assert gradcheck(loss, logits_of(3, 5))
    assert gradgradcheck(loss, logits_of(3, 5))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_agrees_with_pytorch_in_float64(reduction: Reduction, label_smoothing: float, ignore_index: int) -> None:
    """Value and gradient are those of torch.nn.functional.cross_entropy, with -inf among the logits."""
    logits, labels = logits_of(12, 12), labels_of(12, 12, ignore_index)
    if not label_smoothing:  # the loss with a mean of logits that contain -inf is not finite
        labels[0] = 5
        logits.data[0, 1:4] = -inf
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    ours, theirs = cross_entropy(logits, labels, **options), torch_cross_entropy(logits, labels, **options)
    torch.testing.assert_close(ours, theirs, **FLOAT64)
    (dx,), (their_dx,) = (grad(loss.sum(), logits) for loss in (ours, theirs))
    torch.testing.assert_close(dx, their_dx, **FLOAT64)
    assert (dx[logits == -inf] == 0).all()


@pytest.mark.parametrize("num_items", [None, torch.tensor(7)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_transformers(dtype: torch.dtype, num_items: Tensor | None) -> None:
    """ForCausalLMLoss shifts the labels first; both compute in float32, in different orders of sums."""
    batch, length, vocab = 2, 6, 11
    logits = logits_of(batch, length, vocab, dtype=dtype)
    labels = labels_of(batch * length, vocab).view(batch, length)
    theirs = ForCausalLMLoss(logits, labels, vocab, num_items_in_batch=num_items)
    shifted = torch.cat([labels[:, 1:], torch.full((batch, 1), -100)], 1)
    ours = cross_entropy(logits.flatten(0, 1), shifted.flatten(), num_items=num_items)
    # A row: V additions and eight other roundings, of terms up to |z| + log V. The sum: one rounding per row, of
    # partial sums of at most 2 (|z| + log V) per row. Each side may have that error.
    rows, largest = batch * length, logits.abs().max().item() + log(vocab)
    allowed = 2 * (vocab + 8 + 2 * rows) * 2**-24 * largest * rows / (shifted != -100).sum().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_their_float32_copies(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The loss has the same float32 bits; the gradient is that of float32, rounded once."""
    logits, labels = logits_of(9, 33, dtype=dtype), labels_of(9, 33)
    ours, wide = (cross_entropy(x, labels, **options) for x in (logits, logits.float()))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, wide)
    copy = logits.detach().float().requires_grad_()
    (exact,) = grad(cross_entropy(copy, labels, **options), copy)
    assert torch.equal(grad(ours, logits)[0], exact.to(dtype))


def test_int32_labels_give_the_bits_of_int64_labels() -> None:
    """The dtype of the labels has no effect."""
    logits, labels = logits_of(9, 33), labels_of(9, 33)
    assert torch.equal(cross_entropy(logits, labels.int()), cross_entropy(logits, labels))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_ignored_row_is_exactly_zero_whatever_its_logits(
    dtype: torch.dtype, options: dict[str, Any], reduction: Reduction
) -> None:
    """Even with NaN and infinite logits its loss and gradient are 0, and other rows keep their bits."""
    clean, labels = logits_of(5, 7, dtype=dtype), torch.tensor([-100, 1, -100, 6, -100])
    dirty = clean.detach().clone()
    dirty[0], dirty[2, 3], dirty[4, 0] = nan, inf, -inf
    dirty.requires_grad_()
    ours, expected = (cross_entropy(x, labels, reduction=reduction, **options) for x in (dirty, clean))
    (dx,), (expected_dx,) = (grad(loss.sum(), x) for loss, x in ((ours, dirty), (expected, clean)))
    assert torch.equal(ours, expected)
    assert torch.equal(dx, expected_dx)
    assert not dx[labels == -100].any()
    if reduction == "none":
        assert not ours[labels == -100].any()


@pytest.mark.parametrize(("rows", "vocab"), [(3, 5), (0, 5), (0, 1)])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"num_items": 0}])
def test_no_target_gives_zero(rows: int, vocab: int, options: dict[str, Any]) -> None:
    """With all rows ignored, or without rows, loss and gradient are 0, not 0 / 0."""
    logits = logits_of(rows, vocab)
    loss = cross_entropy(logits, torch.full((rows,), -100), **options)
    (dx,) = grad(loss.sum(), logits)
    assert torch.equal(loss, torch.zeros(rows if options.get("reduction") == "none" else (), dtype=torch.float64))
    assert torch.equal(dx, torch.zeros_like(logits))


def test_a_vocabulary_of_one_has_no_loss() -> None:
    """V = 1: the only class has probability 1, loss and gradient are exactly 0."""
    logits = logits_of(4, 1)
    loss = cross_entropy(logits, torch.zeros(4, dtype=torch.int64), label_smoothing=0.1)
    assert loss.item() == 0
    assert not grad(loss, logits)[0].any()


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"logit_scale": 0.25}, {"label_smoothing": 0.4}])
def test_uniform_logits_give_log_vocabulary(options: dict[str, Any]) -> None:
    """Equal logits of any size: every class has probability 1 / V."""
    logits = torch.full((4, 12), 50.0, dtype=torch.float64)
    loss = cross_entropy(logits, torch.arange(4), **options)
    torch.testing.assert_close(loss.item(), log(12), **FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_far_logits_do_not_overflow(dtype: torch.dtype) -> None:
    """exp(8192) overflows every dtype, 16 * 16384 float16; the loss is the difference to the largest logit."""
    logits = torch.tensor([[8192.0, -8192.0]], dtype=dtype, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1]), logit_scale=16.0)
    assert loss.item() == 16 * 16384
    assert grad(loss, logits)[0].tolist() == [[16.0, -16.0]]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("num_items", [4, 3.7, torch.tensor(4), torch.tensor(3.5), 1, 0, torch.tensor(0)], ids=repr)
def test_num_items_divides_the_sum(num_items: float | Tensor, reduction: Reduction) -> None:
    """It does so under both reductions, for each type of number; a value below 1 counts as 1."""
    logits, labels = logits_of(6, 9), labels_of(6, 9)
    total = cross_entropy(logits, labels, reduction="sum")
    loss = cross_entropy(logits, labels, reduction=reduction, num_items=num_items)
    assert loss.shape == ()
    divisor = max(1, num_items.item() if isinstance(num_items, Tensor) else num_items)
    torch.testing.assert_close(loss.item(), total.item() / divisor, **FLOAT64)
    torch.testing.assert_close(grad(loss, logits)[0], grad(total, logits)[0] / divisor, **FLOAT64)


@EXAMPLES
@given(
    rows=st.integers(0, 12),
    cut=st.integers(0, 12),
    options=st.sampled_from(OPTIONS),
    num_items=st.sampled_from([1, 5, 1000]),
    seed=st.integers(0, 2**16),
)
def test_parts_of_a_batch_add_up(rows: int, cut: int, options: dict[str, Any], num_items: int, seed: int) -> None:
    """loss(A + B, N) equals loss(A, N) + loss(B, N), for gradients too, as gradient accumulation requires."""
    logits, labels = logits_of(rows, 11, seed=seed), labels_of(rows, 11, seed=seed)

    def loss(part: slice) -> Tensor:
        return cross_entropy(logits[part], labels[part], num_items=num_items, **options)

    whole, parts = loss(slice(None)), loss(slice(cut)) + loss(slice(cut, None))
    torch.testing.assert_close(whole, parts, **FLOAT64)
    torch.testing.assert_close(grad(whole, logits), grad(parts, logits), **FLOAT64)


@pytest.mark.parametrize("label", [-1, 5, -101, 2**40])
def test_a_label_outside_the_vocabulary_is_an_error(label: int) -> None:
    """The message names the label, its index and the allowed values."""
    with pytest.raises(ValueError, match=f"labels: got {label} at index 2; allowed: 0 to 4, or ignore_index -100"):
        cross_entropy(logits_of(3, 5), torch.tensor([0, -100, label]))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_label_outside_the_vocabulary_gives_nan_in_compiled_code(options: dict[str, Any]) -> None:
    """Compiled code does not check labels: the row's loss and gradient are NaN, and other rows are not affected."""
    labels = torch.tensor([0, -1, -100, 5, 4])
    rows, outside = torch.tensor([0, 2, 4]), torch.tensor([1, 3])
    logits = logits_of(5, 5)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="eager")
    losses = compiled(logits, labels, reduction="none", **options)
    expected = cross_entropy(logits[rows], labels[rows], reduction="none", **options)
    (dx,), (expected_dx,) = grad(losses.sum(), logits), grad(expected.sum(), logits)
    torch.testing.assert_close(losses[rows], expected, **FLOAT64)
    torch.testing.assert_close(dx[rows], expected_dx[rows], **FLOAT64)
    assert losses[outside].isnan().all()
    assert dx[outside].isnan().all()
    assert compiled(logits, labels, **options).isnan()
