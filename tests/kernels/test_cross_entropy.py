"""The Triton cross_entropy at the edges of its tiles and segments, and where programs leave segments to others."""

from collections.abc import Callable
from importlib import import_module
from math import log2
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.tensors import NO_OPTIONS, assert_within, random, with_gradients
from tests.operations.calls import DEVICE
from unsloth_fast import kernels as fast
from unsloth_fast.kernels._launch import Kernel, launch
from unsloth_ref import kernels as reference


@pytest.mark.parametrize("columns", [1, 7, 9, 8191, 8192, 8193])
@pytest.mark.parametrize("where", ["first", "last"])
def test_cross_entropy_at_the_edges_of_its_tiles(columns: int, where: str) -> None:
    """Losses and gradients agree with float64, with the label in the first or the last column."""
    logits, dloss = 4 * random(2, columns), random(2)
    labels = torch.full((2,), 0 if where == "first" else columns - 1, device=DEVICE)
    loss, dlogits = with_gradients(lambda x: fast.cross_entropy(x, labels, reduction="none"), dloss, logits)
    z = logits.double()
    exact = with_gradients(lambda x: reference.cross_entropy(x, labels, reduction="none"), dloss.double(), z)

    lse = torch.logsumexp(z, -1, keepdim=True)
    onehot = torch.nn.functional.one_hot(labels, columns)
    roundings = log2(columns) + 8
    assert_within(loss, exact[0], roundings, lse[:, 0].abs() + z.gather(1, labels[:, None])[:, 0].abs())
    size = torch.exp(z - lse) * (1 + z.abs() + lse.abs()) + onehot
    assert_within(dlogits, exact[1], roundings, size * dloss.double().abs()[:, None])


@pytest.mark.parametrize("columns", [8191, 8192, 8193, 16_385, 50_257])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_total_of_rows_in_segments(columns: int, smoothing: float) -> None:
    """The loss and the early gradient agree with float64, with labels at the ends of segments."""
    places = [0, columns // 2 - 1, columns // 2, 8191 % columns, 8192 % columns, columns - 1, -100]
    logits, labels = 4 * random(len(places), columns), torch.tensor(places, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    (loss, dlogits), exact = (
        with_gradients(lambda x, f=f: f(x, labels, label_smoothing=smoothing, z_loss=1e-3), one, logits.to(dtype))
        for f, dtype in ((fast.cross_entropy, torch.float32), (reference.cross_entropy, torch.float64))
    )

    z, targets = logits[:-1].double(), labels[:-1, None]
    lse = torch.logsumexp(z, -1, keepdim=True)
    roundings, count = log2(columns) + 8, len(z)
    terms = lse.abs() + z.gather(1, targets).abs() + smoothing * z.abs().mean(-1, keepdim=True) + 1e-3 * lse.square()
    assert_within(loss, exact[0], roundings, terms.sum() / count)
    share = torch.exp(z - lse) * (1 + 2e-3 * lse.abs()) * (1 + z.abs() + lse.abs())
    onehot = torch.nn.functional.one_hot(targets[:, 0], columns)
    assert_within(dlogits[:-1], exact[1][:-1], roundings, (share + onehot + smoothing / columns) / count)
    assert not dlogits[-1].any()


def test_a_softcap_adds_no_error_of_its_own_size() -> None:
    """The logits lie far below the cap, near the place where the formula of tanh changes, and up to the cap."""
    small = torch.logspace(-6, -1, 200, device=DEVICE)
    shares = torch.cat([small, small + 0.35, torch.linspace(0.5, 4, 100, device=DEVICE)])
    logits = torch.stack([torch.zeros_like(shares), 30 * shares], 1)
    labels = torch.zeros(len(logits), dtype=torch.long, device=DEVICE)
    loss = fast.cross_entropy(logits, labels, reduction="none", softcap=30.0)
    z = 30 * torch.tanh(logits[:, 1].double() / 30)
    assert_within(loss, torch.nn.functional.softplus(z), 4, 1 + z)


@pytest.mark.parametrize("columns", [8193, 50_257])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_programs_leave_has_the_bits_of_programs_that_find_all_sums(
    columns: int, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first programs of a row do not wait, and another kernel does their work: in a new tensor and in place."""
    module = import_module("unsloth_fast.kernels.cross_entropy")
    logits, labels = 4 * random(3, columns), torch.tensor([0, columns - 1, -100], device=DEVICE)
    options = NO_OPTIONS._replace(label_smoothing=smoothing, z_loss=1e-3)
    left: list[int] = []

    def repeating(times: int) -> Callable[..., None]:
        """Launches the kernel of the total again, with the sums that its programs have published before."""

        def launch_again(kernel: Kernel, programs: int, tensor: Tensor, *arguments: Any, **settings: Any) -> None:
            for _ in range(times if kernel is module.cross_entropy_total_kernel else 1):
                launch(kernel, programs, tensor, *arguments, **settings)
                if kernel is module.cross_entropy_total_kernel:
                    left.append(int(arguments[3][0]))

        return launch_again

    monkeypatch.setattr(module, "POLLS", 0)
    monkeypatch.setattr(module, "launch", repeating(1))
    found = [
        module.cross_entropy_total(logits.clone(), labels, None, options, in_place=in_place)
        for in_place in (False, True)
    ]
    monkeypatch.setattr(module, "launch", repeating(2))
    usual = module.cross_entropy_total(logits, labels, None, options)

    most = 2 * (-(-columns // module.SEGMENT_COLUMNS) - 1)  # the last program of a row finds all sums
    assert all(0 < number <= most for number in left) and (DEVICE != "cpu" or left == [most] * 4)
    assert left[2] == left[3]  # none has been left the second time
    for other in found:
        assert all(map(torch.equal, usual, other))
