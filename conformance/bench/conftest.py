"""pytest options of the benchmarks, and the machine information that pytest-benchmark stores with the times."""

from functools import cache
from typing import Any

import pytest
import torch

from conformance.bench.card import Card, Rates
from conformance.reporting.results_file import versions


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--backend` and `--dtype`, as on the command line."""
    parser.addoption("--backend", default="reference,compile,torch,fast", help="backends to time, comma-separated")
    parser.addoption("--dtype", default="bfloat16", help="dtype of the inputs")


@cache
def the_card() -> tuple[Card, Rates, dict[str, Any]]:
    """The card, its peak rates and its state, measured once per process."""
    card = Card()
    return card, card.rates(), card.state()


@pytest.fixture(scope="session")
def card() -> tuple[Card, Rates, dict[str, Any]]:
    """The same, as a fixture."""
    return the_card()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what the times depend on and what is constant across runs: times of different cards cannot be compared."""
    machine_info |= versions()
    if torch.cuda.is_available():
        card, _, state = the_card()
        machine_info |= {"gpu": card.name, "driver": state["driver"]}
