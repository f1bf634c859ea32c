"""How kernels are launched: on what memory, and in which of their two kinds of machine code."""

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

from tests.kernels.test_fast_kernels import DEVICE, random
from unsloth_fast import kernels as fast
from unsloth_fast.kernels import _launch


def halves_of_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a projection to gate and up at once gives."""
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


@pytest.mark.parametrize(
    ("file", "views", "call"),
    [
        ("_gated", halves_of_one(random(3, 16)), fast.swiglu),
        ("rms_norm", halves_of_one(random(3, 16))[1:], lambda x: fast.rms_norm(x, x.new_ones(8))),
        ("layer_norm", halves_of_one(random(3, 16))[1:], lambda x: fast.layer_norm(x, x.new_ones(8), x.new_ones(8))),
        (
            "rope",  # token by token, as projections give their heads
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
def test_strided_views_are_read_where_they_lie(
    file: str, views: tuple[Tensor, ...], call: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, read = import_module(f"unsloth_fast.kernels.{file}"), set()
    launch = module.launch

    def told(kernel: object, programs: int, device_of: Tensor, *arguments: object, **options: object) -> None:
        read.update(a.data_ptr() for a in arguments if isinstance(a, Tensor))
        launch(kernel, programs, device_of, *arguments, **options)

    monkeypatch.setattr(module, "launch", told)
    call(*views)
    assert {view.data_ptr() for view in views} <= read


PAIR = torch.tensor([0, 6], dtype=torch.int32, device=DEVICE)
CALLS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (fast.rms_norm, ((3, 8), (8,))),
    "add_rms_norm": (fast.add_rms_norm, ((3, 8), (3, 8), (8,))),
    "layer_norm": (fast.layer_norm, ((3, 8), (8,), (8,))),
    "swiglu": (fast.swiglu, ((3, 8), (3, 8))),
    "geglu": (fast.geglu, ((3, 8), (3, 8))),
    "rope": (
        lambda q, k: fast.rope(q, k, torch.ones(1, 5, 8, device=DEVICE), torch.ones(1, 5, 8, device=DEVICE)),
        ((2, 4, 5, 8), (2, 2, 5, 8)),
    ),
    "cross_entropy": (lambda logits: fast.cross_entropy(logits, PAIR, reduction="none"), ((2, 8),)),
    "mean": (lambda logits: fast.cross_entropy(logits, PAIR), ((2, 8),)),
    "linear_cross_entropy": (lambda x, weight: fast.linear_cross_entropy(x, weight, PAIR), ((2, 8), (9, 8))),
    "packed_attention": (lambda q, k, v: fast.packed_attention(q, k, v, PAIR, 6), ((6, 2, 8),) * 3),
    "lora_linear": (fast.lora_linear, ((3, 8), (4, 8), (2, 8), (4, 2))),
}


@pytest.mark.parametrize("name", CALLS)
def test_signs_that_are_a_flag_are_seen(name: str) -> None:
    """Of inputs and of the gradients that come back: the imaginary part of a conjugate is such a view."""
    call, shapes = CALLS[name]
    plain = [random(*shape) for shape in shapes]
    found = []
    for flag in (False, True):
        leaves = [one.clone().requires_grad_() for one in plain]
        results = call(*[torch._neg_view(leaf.neg()) if flag else leaf for leaf in leaves])
        results = results if isinstance(results, tuple) else (results,)
        grads = [torch.full_like(one, 0.5) for one in results]
        torch.autograd.backward(results, [torch._neg_view(grad.neg()) if flag else grad for grad in grads])
        found.append([*results, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("offset", "rows", "columns", "stride", "aligned"),
    [(0, 32, 16, 1, True), (0, 3, 16, 32, True), (1, 32, 16, 1, False), (0, 32, 17, 1, False), (0, 32, 16, 2, False)],
)
def test_one_argument_that_is_not_aligned_makes_all_unaligned(
    offset: int, rows: int, columns: int, stride: int, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for counts, which say nothing of addresses, and a stride of 1, which Triton makes a constant of."""
    taken: list[str] = []

    class Kernel:
        arg_names = ("x_ptr", "rows", "columns", "stride", "COLUMNS")
        params = tuple(
            SimpleNamespace(do_not_specialize=name in _launch.COUNTS, do_not_specialize_on_alignment=False)
            for name in arg_names
        )

        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., Any]:
            taken.append(self.name)
            return lambda *_, **__: SimpleNamespace(run=None, function=None, packed_metadata=None)

    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "_compiled", {})
    monkeypatch.setattr(_launch, "unaligned", lambda kernel: Kernel("unaligned"))
    x = torch.empty(64, device=DEVICE)[offset:]
    _launch.launch(Kernel("aligned"), 1, x, x, rows, columns, stride, COLUMNS=16)
    assert taken == ["aligned" if aligned else "unaligned"]


def test_every_kernel_has_an_unaligned_twin() -> None:
    """In a process of its own, without the interpreter."""
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
