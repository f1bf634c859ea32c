"""What pytest-benchmark stores beside the times, and which backends its tests time."""

from functools import cache
from typing import Any

import pytest
import torch

from conformance.bench.card import Card, Rates
from conformance.report import versions


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--backend` and `--dtype`, as on the command line."""
    parser.addoption("--backend", default="reference,compile,torch,fast", help="which to time, comma-separated")
    parser.addoption("--dtype", default="bfloat16", help="of the inputs")


@cache
def the_card() -> tuple[Card, Rates, dict[str, Any]]:
    """The card, measured once a process."""
    card = Card()
    return card, card.rates(), card.state()


@pytest.fixture(scope="session")
def card() -> tuple[Card, Rates, dict[str, Any]]:
    """The same for tests."""
    return the_card()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Times of one card say nothing about another: name what they depend on, and what lasts from run to run."""
    machine_info |= versions()
    if torch.cuda.is_available():
        card, _, state = the_card()
        machine_info |= {"gpu": card.name, "driver": state["driver"]}
