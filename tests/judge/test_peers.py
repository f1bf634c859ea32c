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
