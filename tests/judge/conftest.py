"""What several tests of the judge need."""

from collections.abc import Iterator

import pytest

from conformance.models.task import quiet


@pytest.fixture(scope="module")
def quiet_models() -> Iterator[None]:
    """Libraries say nothing of tiny models."""
    with quiet():
        yield
