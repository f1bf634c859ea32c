"""What the numeric checks of modules share: copies with other weights, random rows, how the results are compared."""

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

BY_MODE = "differs between training and evaluation"
BY_GRADIENT = "has other gradients"
_NEAR = 2.0**-12  # of gradients, which transformers computes in float32 for any dtype: half of its digits
_OF_EVERY_MODULE = vars(nn.Module())


@contextmanager
def quietly_on_the_cpu() -> Iterator[None]:
    """For the forward of a class on a copy: on the CPU, without gradients, warnings and transformers' advice.

    transformers advises once per process to install another library for what is slow, and here an operation takes its
    place. A call that needs the advice may still come, so it is not marked as given.
    """
    silent = patch.object(logging.Logger, "warning_once", lambda *_, **__: None)
    with warnings.catch_warnings(action="ignore"), silent, torch.device("cpu"), torch.no_grad():
        yield


def inputs_of(forward: Callable[..., object]) -> int | None:
    """How many inputs a forward takes, all by position; a gated norm takes two, experts take three."""
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    return len(kinds) - 1 if set(kinds) == {inspect.Parameter.POSITIONAL_OR_KEYWORD} else None


def plain(module: nn.Module) -> tuple[object, ...]:
    """The class of a module, and its attributes: numbers and text by value, all others by identity."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return type(module), *((name, _value(value)) for name, value in own.items())


def _value(value: object) -> object:
    """Hashable; equal for the partial functions that each GELU of transformers makes for itself."""
    if isinstance(value, partial):
        keywords = ((name, _value(given)) for name, given in value.keywords.items())
        return partial, id(value.func), *map(_value, value.args), *keywords
    return value if isinstance(value, int | float | str | None) else id(value)


def rows_of_scales(columns: int, generator: torch.Generator) -> Tensor:
    """Random rows, so small and so large that a clamp or a cap shows."""
    scales = torch.tensor((0.1, 1.0, 10.0, 100.0), dtype=torch.float64)[:, None]
    return scales * torch.randn((len(scales), columns), generator=generator, dtype=torch.float64)


def refusal(operation: str, agreeing: int, difference: float = 0.0) -> str:
    """Why no candidate was chosen: several agree with the module, or the closest differs by so much."""
    if agreeing:
        return f"{agreeing} ways to compute it by {operation} agree"
    return f"differs from every {operation} by {difference:.2g} at least"


def sizes_of(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, under peft's wrappers and in 4 bits too; None for any other module."""
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return cast(tuple[int, int], sizes) if all(isinstance(size, int) for size in sizes) else None


def copy_with(module: nn.Module, parameters: Mapping[str, Any] = {}, children: Mapping[str, Any] = {}) -> Any:
    """A copy with other parameters or children, which shares all else with the module."""
    copied: Any = copy.copy(module)
    copied._parameters = {**module._parameters, **parameters}
    copied._modules = {**module._modules, **children}
    return copied


def in_both_modes(module: Any, *inputs: Tensor, **options: Tensor) -> Tensor | None:
    """What the forward of its class computes; None if training changes it, as a layer of dropout does."""
    results: list[Tensor] = []
    for training in (False, True):
        module.train(training)
        with torch.random.fork_rng([]):
            results.append(type(module).forward(module, *inputs, **options))
    return results[0] if torch.equal(*results) else None


def has_gradients_of(found: Callable[..., object], module: Any, *inputs: Tensor, **options: Tensor) -> bool:
    """Whether a function of a module has the gradients of its class's forward: a detached part changes no result.

    Args:
        found: takes the module and its inputs.
        module: a copy, whose parameters are compared too.
        *inputs: of the forward.
        **options: further ones.
    """
    own, other = (_gradients(each, module, inputs, options) for each in (type(module).forward, found))
    return all((one - two).norm() <= _NEAR * one.norm() for one, two in zip(own, other, strict=True))


def _gradients(function: Callable[..., Any], module: Any, inputs: Iterable[Tensor], options: Any) -> list[Tensor]:
    """The gradients of the inputs and of the parameters for an uneven gradient of the result."""
    leaves = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
    weights = {each: each.requires_grad for each in module.parameters()}
    wanted = [*(each for each in leaves if each.requires_grad), *weights]
    try:
        with torch.enable_grad():
            for each in weights:
                each.requires_grad_(True)
            result = function(module, *leaves, **options)
            uneven = torch.arange(result.numel(), dtype=torch.float64).cos().view_as(result).to(result.dtype)
            if not result.requires_grad:
                return [torch.zeros_like(each) for each in wanted]
            return list(torch.autograd.grad(result, wanted, uneven, allow_unused=True, materialize_grads=True))
    finally:
        for each, trained in weights.items():
            each.requires_grad_(trained)


class Sparse(nn.Module):
    """A linear map with at most ceil(I / O) weights in each row: whole layers of the widest models take gigabytes."""

    weight = bias = None  # Mamba's mixers hand them to a function that computes nothing without its library

    def __init__(self, sizes: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__()
        inputs, outputs = sizes
        each = -(-inputs // outputs)
        self.taken = torch.randperm(each * outputs, generator=generator).view(outputs, each) % inputs
        self.weights = torch.randn(self.taken.shape, generator=generator, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """The products."""
        return (x[..., self.taken] * self.weights).sum(-1)
