"""Triton's interpreter, patched, gives what it gives without."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import backends
from conformance.interpreter import _Once, _Remembered

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen for a whole process")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With Triton's own functions for it, whoever loaded a backend before."""
    backends.load("fast", "cpu")
    module: Any = importlib.import_module("triton.runtime.interpreter")
    assert isinstance(module._patch_lang, _Once)
    assert isinstance(module._get_np_dtype, _Remembered)
    monkeypatch.setattr(module, "_patch_lang", module._patch_lang._patch)
    monkeypatch.setattr(module, "_get_np_dtype", module._get_np_dtype._numpy_dtype)
    return module


def loss_and_gradient() -> tuple[Tensor, Tensor]:
    """Of a kernel that calls device functions, its own and those of `triton.language.standard`."""
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = backends.load("fast", "cpu").functions["cross_entropy"](logits, torch.arange(6))
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def test_the_same_bits_for_fewer_patches(interpreter: Any) -> None:
    native, calls = interpreter._patch_lang, []

    def counted(function: Any) -> Any:
        calls.append(function)
        return native(function)

    interpreter._patch_lang = counted
    wanted, many = loss_and_gradient(), len(calls)
    calls.clear()
    interpreter._patch_lang = _Once(counted, interpreter._LangPatchScope)
    found = loss_and_gradient()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert len(calls) < many / 4


def test_the_language_is_put_back_when_the_launch_ends(interpreter: Any) -> None:
    language, gated = (importlib.import_module(name) for name in ("triton.language", "unsloth_fast.kernels._gated"))
    kernel, before, once = (
        gated.gated_forward_kernel.fn,
        language.load,
        _Once(interpreter._patch_lang, interpreter._LangPatchScope),
    )
    for _ in range(2):
        launch, device_call = once(kernel), once(kernel)
        assert language.load is not before
        device_call.restore()
        assert language.load is not before
        launch.restore()
        assert language.load is before


def test_the_same_dtypes_for_fewer_tables(interpreter: Any) -> None:
    language: Any = importlib.import_module("triton.language")
    scalars = [getattr(language, name) for name in ("int1", "int32", "uint16", "int64", "bfloat16", "float32")]
    scalars += [language.pointer_type(scalar) for scalar in scalars]
    calls = []

    def counted(dtype: Any) -> Any:
        calls.append(dtype)
        return interpreter._get_np_dtype(dtype)

    remembered = _Remembered(counted)
    for dtype in (*scalars, *(language.block_type(scalar, [4, 8]) for scalar in scalars)):
        assert remembered(dtype) == interpreter._get_np_dtype(dtype)
    assert calls == scalars
