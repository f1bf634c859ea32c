"""Wrappers of peers have the contract's signatures, and refuse the options that a package lacks."""

import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from conformance import peers
from conformance.calling import grouped
from conformance.case import Case
from conformance.peers import PACKAGES, operation, refuse
from conformance.specs import specs
from unsloth_ref import kernels as reference

WITH_PACKAGE = [peer for peer, package in PACKAGES.items() if package is not None]


@pytest.fixture(params=WITH_PACKAGE)
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A peer's module, with mocks in place of the kernels of its package."""
    name = f"conformance.peers.{request.param}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(peers, "import_kernels", lambda package, *names: [MagicMock(name=name) for name in names])
    yield import_module(name)
    sys.modules.pop(name, None)


def operations(peer: ModuleType) -> dict[str, Any]:
    return {op: getattr(peer, op) for op in reference.__all__ if hasattr(peer, op)}


def test_every_wrapper_has_the_signature_of_the_contract(peer: ModuleType) -> None:
    assert operations(peer)
    for op, wrapper in operations(peer).items():
        assert inspect.signature(wrapper) == inspect.signature(getattr(reference, op)), op


def test_every_option_is_passed_on_or_refused_by_name(peer: ModuleType) -> None:
    for op, wrapper in operations(peer).items():
        spec = specs()[op]
        for name, values in spec.drawing.options.items():
            for value in values:
                case = spec.case(2, 8)
                inputs = spec.inputs(case, torch.float32, "cpu")
                try:
                    wrapper(**grouped(spec.arguments(inputs)), **spec.required(case, torch.float32), **{name: value})
                except NotImplementedError as refused:
                    assert "; allowed with " in str(refused)


def test_a_wrapper_must_repeat_defaults_correctly() -> None:
    def rms_norm(x: Any, weight: Any, eps: float = 1e-5, **options: Any) -> None:
        """The eps of another operation."""

    with pytest.raises(TypeError, match="rms_norm: got eps: float = 1e-05; allowed: the parameters of "):
        operation(rms_norm)


def test_an_unsupported_option_is_refused() -> None:
    refuse("tiny", {"softcap": 0.0, "bias": None}, softcap=0.0, bias=None)
    with pytest.raises(NotImplementedError, match=r"^softcap: got 5\.0; allowed with tiny: 0\.0$"):
        refuse("tiny", {"softcap": 5.0}, softcap=0.0)
    with pytest.raises(NotImplementedError, match=r"^bias: got tensor"):
        refuse("tiny", {"bias": torch.ones(1)}, bias=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        refuse("tiny", {"depth": 1}, softcap=0.0)


@pytest.mark.parametrize(
    "options", [{}, {"activation": "gelu_tanh"}, {"interleaved": True, "alpha": 1.702, "limit": 7.0, "offset": 1.0}]
)
def test_transformers_experts_take_the_tensors_of_the_contract(options: dict[str, Any]) -> None:
    """On sizes that torch's grouped products allow on a CPU; one bias of two is refused."""
    moe_mlp, spec = import_module("conformance.peers.transformers").moe_mlp, specs()["moe_mlp"]
    sizes = {"tokens": 24, "experts": 4, "per_token": 2, "wide": 1, "biased": 1, "inner": 16, "hidden": 32}
    inputs = spec.inputs(Case(tuple(sizes.items())), torch.float32, "cpu")
    torch.testing.assert_close(moe_mlp(**inputs, **options), reference.moe_mlp(**inputs, **options))
    with pytest.raises(NotImplementedError, match=r"^down_bias: got one bias of two; allowed with transformers: "):
        moe_mlp(**inputs | {"gate_up_bias": None}, **options)
