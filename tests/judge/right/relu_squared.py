"""Right squares of ReLU."""

from torch import Tensor

from tests.judge import world
from tests.judge.contract import compiled
from unsloth_ref import checks


def by_a_product(x: Tensor) -> Tensor:
    """ReLU times ReLU: the gradient is a sum of two terms."""
    checks.has_rows("x", x)
    checks.dtype("x", x)
    return x.relu() * x.relu()


def by_a_power(x: Tensor) -> Tensor:
    """In float32, rounded once."""
    checks.has_rows("x", x)
    checks.dtype("x", x)
    return (x.float().relu() ** 2).to(x.dtype)


TABLE = {
    "of_transformers": world.nemotron.relu_squared,
    "by_a_product": by_a_product,
    "by_a_power": by_a_power,
    "compiled": compiled(by_a_power),
    "in_other_tiles": (("TILE = 1024", "TILE = 4096"),),
}
