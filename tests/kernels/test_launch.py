"""How kernels are launched: on which memory, and with which of their two variants of machine code."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.spec import Spec
from tests.kernels.tensors import random
from tests.operations.calls import DEVICE, DIFFERENTIABLE, call_of
from unsloth_fast import kernels as fast
from unsloth_fast.kernels import _launch


def halves_of_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of one projection, such as gate and up."""
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


@pytest.mark.parametrize(
    ("file", "views", "call"),
    [
        ("_gated", halves_of_one(random(3, 16)), fast.swiglu),
        ("rms_norm", halves_of_one(random(3, 16))[1:], lambda x: fast.rms_norm(x, x.new_ones(8))),
        ("layer_norm", halves_of_one(random(3, 16))[1:], lambda x: fast.layer_norm(x, x.new_ones(8), x.new_ones(8))),
        (
            "rope",  # token by token, the layout of a projection
            tuple(random(2, 5, heads, 8).transpose(1, 2) for heads in (4, 2)),
            lambda q, k: fast.rope(q, k, random(1, 5, 8), random(1, 5, 8)),
        ),
        (
            "packed_attention",
            tuple(random(4, 6, 8).transpose(0, 1) for _ in range(3)),
            lambda q, k, v: fast.packed_attention(q, k, v, torch.tensor([0, 6], dtype=torch.int32, device=DEVICE), 6),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_strided_views_are_not_copied(
    file: str, views: tuple[Tensor, ...], call: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, read = import_module(f"unsloth_fast.kernels.{file}"), set()
    launch = module.launch

    def observed(kernel: object, programs: int, device_of: Tensor, *arguments: object, **options: object) -> None:
        read.update(a.data_ptr() for a in arguments if isinstance(a, Tensor))
        launch(kernel, programs, device_of, *arguments, **options)

    monkeypatch.setattr(module, "launch", observed)
    call(*views)
    assert {view.data_ptr() for view in views} <= read


@pytest.mark.parametrize(("spec", "options"), DIFFERENTIABLE)
def test_the_negative_bit_is_resolved(spec: Spec, options: dict[str, Any]) -> None:
    """It is resolved for inputs and incoming gradients; the imaginary part of a conjugate is such a view."""
    call, inputs = call_of(spec, 3, 8, options)
    found = []
    for negated in (False, True):
        leaves = [one.clone().requires_grad_() for one in inputs]
        results = call(fast, *[torch._neg_view(leaf.neg()) if negated else leaf for leaf in leaves])
        grads = [torch.full_like(one, 0.5) for one in results]
        torch.autograd.backward(results, [torch._neg_view(grad.neg()) if negated else grad for grad in grads])
        found.append([*results, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("offset", "rows", "columns", "stride", "aligned"),
    [(0, 32, 16, 1, True), (0, 3, 16, 32, True), (1, 32, 16, 1, False), (0, 32, 17, 1, False), (0, 32, 16, 2, False)],
)
def test_one_unaligned_argument_selects_the_unaligned_kernel(
    offset: int, rows: int, columns: int, stride: int, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exceptions are varying integers, which Triton does not specialise on, and a stride of 1, which is a constant."""
    launched: list[str] = []

    class Kernel:
        arg_names = ("x_ptr", "rows", "columns", "stride", "COLUMNS")
        params = tuple(
            SimpleNamespace(do_not_specialize=name == "rows", do_not_specialize_on_alignment=False)
            for name in arg_names
        )

        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., Any]:
            launched.append(self.name)
            return lambda *_, **__: SimpleNamespace(run=None, function=None, packed_metadata=None)

    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "_compiled", {})
    monkeypatch.setattr(_launch, "unaligned", lambda kernel: Kernel("unaligned"))
    x = torch.empty(64, device=DEVICE)[offset:]
    _launch.launch(Kernel("aligned"), 1, x, x, rows, columns, stride, COLUMNS=16)
    assert launched == ["aligned" if aligned else "unaligned"]


def test_every_kernel_has_an_unaligned_variant() -> None:
    """This is checked in another process, without the interpreter."""
    code = """
import sys, triton, unsloth_fast.kernels
from unsloth_fast.kernels._launch import specialised, unaligned
modules = [module for name, module in sys.modules.items() if name.startswith("unsloth_fast.kernels.")]
kernels = {k for module in modules for n, k in vars(module).items() if n.endswith("_kernel")}
assert len(kernels) >= 15 and all(isinstance(kernel, triton.JITFunction) for kernel in kernels)
for kernel in kernels:
    twin = unaligned(kernel)
    assert twin is unaligned(kernel)
    for mine, other, parameter in zip(specialised(kernel), specialised(twin), kernel.params):
        assert parameter.is_constexpr or other == (mine[0], False), (kernel, parameter.name)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
