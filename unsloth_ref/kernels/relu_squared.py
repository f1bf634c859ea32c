"""The square of ReLU.

    p = max(x, 0)      y = p^2      dx = 2 * dy * p

Source: So et al. 2021, arXiv:2109.08668. Rounding: as transformers' ReLUSquaredActivation, once.
"""

from torch import Tensor

from unsloth_ref import checks


def relu_squared(x: Tensor) -> Tensor:
    """Square the positive elements and replace all others by 0.

    Args:
        x: [..., F], any float dtype.

    Returns:
        [..., F] in x.dtype.

    Raises:
        ValueError: x has no dimension.
        TypeError: x does not have a float dtype.
    """
    checks.has_rows("x", x)
    checks.dtype("x", x)
    return x.relu().square()
