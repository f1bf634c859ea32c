"""Counting: targets and tokens, with a stand-in for the sum over two processes."""

import logging
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import unsloth_fast.training
import unsloth_ref.training
from unsloth_fast.hooks.counting import Counter, logged_tokens, scaled_by_devices

PACKAGES = [unsloth_ref.training, unsloth_fast.training]
COUNT_TARGETS = unsloth_ref.training.count_targets
WARNING = "the first step's batches have no target"


def batch(labels: list[list[int]], mask: list[list[int]] | None = None) -> dict[str, Tensor]:
    """A microbatch with these labels and, if given, an attention mask."""
    made = {"input_ids": torch.full((len(labels), len(labels[0])), 3), "labels": torch.tensor(labels)}
    return made if mask is None else made | {"attention_mask": torch.tensor(mask)}


def counter_of() -> Counter:
    """A counter of a run on the CPU."""
    return Counter(torch.device("cpu"))


def sum_over(processes: int) -> Callable[[Tensor], Tensor]:
    """The sum over so many processes, each with the counts of this one."""
    return lambda counts: counts * processes


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_counts_the_targets_of_its_microbatches(package: ModuleType, processes: int) -> None:
    """The first token of a row is not a target; the counts of all processes and of this one are returned."""
    batches = [batch([[5, 6, 7], [5, -100, 7]]), batch([[-100, 8]])]
    everywhere, here = counter_of().step(batches, package.count_targets, sum_over(processes))
    assert (int(everywhere), int(here)) == (4 * processes, 4)
    for count in (everywhere, here):
        assert count.shape == () and count.dtype == torch.int64


@pytest.mark.parametrize("processes", [1, 2])
def test_tokens_are_summed_over_steps_until_they_are_taken(processes: int) -> None:
    """Padding is not counted; a batch without a mask has none."""
    counter = counter_of()
    padded = batch([[5, 6, 7], [5, 6, -100]], mask=[[1, 1, 1], [1, 1, 0]])
    counter.step([padded, batch([[5, 6, 7, 8]])], COUNT_TARGETS, sum_over(processes))
    counter.step([padded], COUNT_TARGETS, sum_over(processes))
    assert counter.take_tokens() == (5 + 4 + 5) * processes
    assert counter.take_tokens() == 0
    counter.step([padded], COUNT_TARGETS, sum_over(processes))
    assert counter.take_tokens() == 5 * processes


@pytest.mark.parametrize(
    ("steps", "warnings"),
    [
        ([[[5, 6]]], 0),
        ([[[5, -100]]], 1),
        ([[[5, -100]], [[5, -100]]], 1),
        ([[[5, 6]], [[5, -100]]], 0),
    ],
    ids=["a target", "none", "none twice", "none later"],
)
def test_only_a_first_step_without_a_target_is_warned_about(
    steps: list[list[list[int]]], warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Later steps are not checked: to read the count waits for the device."""
    counter = counter_of()
    for labels in steps:
        counter.step([batch(labels)], COUNT_TARGETS, sum_over(1))
    assert [record.levelno for record in caplog.records if WARNING in record.message] == [logging.WARNING] * warnings


def test_targets_on_another_process_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    everywhere, here = counter_of().step(
        [batch([[5, -100]])], COUNT_TARGETS, lambda counts: counts + torch.tensor([3, 0])
    )
    assert (int(everywhere), int(here)) == (3, 0)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("num_items", "on_all", "tp_size", "factor"),
    [(5, True, 1, 4), (5, True, 2, 2), (5, False, 1, 1), (None, True, 1, 1)],
)
def test_a_loss_that_a_count_of_all_devices_divided_is_scaled_by_them(
    num_items: int | None, on_all: bool, tp_size: int, factor: int
) -> None:
    """Of the four processes, tensor-parallel ones share a batch and count once."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(average_tokens_across_devices=on_all),
        accelerator=SimpleNamespace(num_processes=4),
        get_tp_size=lambda: tp_size,
    )
    assert scaled_by_devices(torch.tensor(3.0), num_items, trainer).item() == 3 * factor


class Tokens:
    """A stand-in for the counter, with these tokens since the last call."""

    def __init__(self, *tokens: int) -> None:
        self.waiting = list(tokens)

    def take_tokens(self) -> int:
        """The next number."""
        return self.waiting.pop(0)


@pytest.mark.parametrize(("by_transformers", "expected"), [("no", [107, 107, 112]), ("non_padding", [100, 100, 100])])
def test_logged_tokens_continue_those_of_the_state(by_transformers: str, expected: list[int]) -> None:
    """A resumed run has 100 in its state. Where transformers counts, the state is only read; the counter is emptied."""
    state: Any = SimpleNamespace(num_input_tokens_seen=100)
    counter: Any = Tokens(7, 0, 5)
    assert [logged_tokens(state, counter, by_transformers) for _ in range(3)] == expected
    assert state.num_input_tokens_seen == expected[-1] and counter.waiting == []


def test_padding_is_not_logged_where_transformers_counts_it() -> None:
    """The tokens of a resumed run continue the last number in its log, those of a new training begin at 0."""
    counter, padded = counter_of(), batch([[5, 6, 7], [5, 6, -100]], mask=[[1, 1, 1], [1, 1, 0]])

    def logged(state: Any) -> int:
        counter.step([padded], COUNT_TARGETS, sum_over(1))
        return logged_tokens(state, counter, "all")

    new = SimpleNamespace(num_input_tokens_seen=6, log_history=[])
    assert [logged(new), logged(new)] == [5, 10]
    resumed = SimpleNamespace(num_input_tokens_seen=60, log_history=[{"num_tokens": 50.0}, {"eval_loss": 1.0}])
    assert [logged(resumed), logged(resumed)] == [55, 60] and resumed.num_input_tokens_seen == 60
