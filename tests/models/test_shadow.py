"""A shadowed call: what is compared, what is allowed, and that nothing else changes."""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unsloth_fast.backends import Backend, resolve
from unsloth_fast.shadow import Finding, Watch, shadowed
from unsloth_ref import kernels as reference

T, H, V = 24, 64, 80


def backend(**operations: Callable[..., Any]) -> Backend:
    """The reference with other functions for some operations."""
    own = resolve("reference")
    return replace(own, kernels=SimpleNamespace(**vars(own.kernels) | operations))


def right(name: str) -> Callable[..., Any]:
    """The reference's operation as another function."""
    return functools.partial(getattr(reference, name))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def found(watch: Watch, call: Callable[[], Tensor], *, first: bool = True) -> dict[str, Finding]:
    """What a call and its backward pass give, by result; the first or the last of each."""
    with watch.watching(torch.nn.Identity()):
        call().backward()
    findings = reversed(watch.findings) if first else watch.findings
    return {one.result: one for one in findings}


def test_a_loss_and_its_gradients_are_compared() -> None:
    """They are compared also where the backward pass starts from the call's output itself."""
    watch = Watch()
    loss = shadowed(backend(linear_cross_entropy=right("linear_cross_entropy")), watch).kernels.linear_cross_entropy
    hidden, weight, labels = randn(T, H), randn(V, H, seed=1), torch.arange(T)
    results = found(watch, lambda: loss(hidden, weight, labels))
    assert set(results) == {"output", "gradient of hidden", "gradient of weight"}
    assert all(0 <= one.used < 1 for one in results.values())
    assert not watch.unverified


def test_several_outputs_and_an_input_without_a_gradient() -> None:
    """Each output has a name; the angles get no gradient; an output that nothing reads does no harm."""
    watch = Watch()
    rope = shadowed(backend(rope=right("rope")), watch).kernels.rope
    q, k, angles = randn(1, 4, T, 8), randn(1, 2, T, 8, seed=1), torch.ones(1, T, 8)
    results = found(watch, lambda: rope(q, k, angles, angles)[0].sum())
    assert set(results) == {"output 0", "output 1", "gradient of q", "gradient of k"}
    assert results["gradient of k"].used == 0


def test_tensors_of_lists_are_compared_one_by_one() -> None:
    """A wrong gradient of one is named; a list may hold None and numbers, which are passed on."""

    def lora_mlp(x: Tensor, weight: Any, lora_a: Any, *others: Any, **options: Any) -> Tensor:
        changed = [lora_a[0], 1.001 * lora_a[1] - 0.001 * lora_a[1].detach(), lora_a[2]]
        return reference.lora_mlp(x, weight, changed, *others, **options)

    watch = Watch()
    mlp = shadowed(backend(lora_mlp=lora_mlp), watch).kernels.lora_mlp
    sizes = ((H, T), (H, T), (T, H))
    weight = [randn(*size, seed=n).detach() for n, size in enumerate(sizes)]
    a = [randn(8, size[1], seed=3 + n) for n, size in enumerate(sizes)]
    b = [randn(size[0], 8, seed=6 + n) for n, size in enumerate(sizes)]
    results = found(watch, lambda: mlp(randn(T, T), weight, a, b, [1.0, 2.0, 1.0], [None, randn(H), None]).sum())
    names = {f"gradient of {name}[{n}]" for name in ("lora_a", "lora_b") for n in range(3)}
    assert not watch.unverified
    assert set(results) == names | {"output", "gradient of x", "gradient of bias[1]"}
    assert [name for name, one in results.items() if one.used >= 1] == ["gradient of lora_a[1]"]
    assert "weight[2] [24, 64] float32" in results["output"].inputs


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_keeps_no_inputs(reentrant: bool) -> None:
    """Each result is compared once, and the inputs that wait for the backward pass are recomputed."""
    watch = Watch()
    swiglu = shadowed(backend(swiglu=right("swiglu")), watch).kernels.swiglu
    kept: list[Tensor] = []

    def layer(x: Tensor) -> Tensor:
        gate = x * 2
        kept.append(gate)
        return swiglu(gate, x)

    x = randn(T, H)
    with watch.watching(torch.nn.Identity()):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        y.sum().backward()
    assert [one.result for one in watch.findings] == ["output", "gradient of gate", "gradient of up"]
    assert len(kept) == 2
    assert all(one.used < 1 for one in watch.findings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", ["row", "element", "NaN", "dtype"])
def test_wrong_outputs_break_the_budget(dtype: torch.dtype, wrong: str) -> None:
    """One row of many, one element, a NaN, or another dtype is enough."""

    def rms_norm(*args: Any, **kwargs: Any) -> Tensor:
        y = reference.rms_norm(*args, **kwargs)
        if wrong == "dtype":
            return y.double()
        mask = torch.zeros_like(y, dtype=torch.bool)
        mask[3, slice(None) if wrong == "row" else 5] = True
        return torch.where(mask, float("nan") if wrong == "NaN" else -y, y)

    watch = Watch()
    norm = shadowed(backend(rms_norm=rms_norm), watch).kernels.rms_norm
    results = found(watch, lambda: norm(randn(T, H, dtype=dtype), randn(H, dtype=dtype, seed=1)).sum())
    output = results["output"]
    assert output.used > 1
    assert output.inputs == f"x [{T}, {H}] {str(dtype)[6:]}, weight [{H}] {str(dtype)[6:]}"


def test_a_missing_gradient_breaks_the_budget() -> None:
    """Peers drop the gradient of a norm's weight."""

    def rms_norm(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return reference.rms_norm(x, weight.detach(), *args, **kwargs)

    watch = Watch()
    norm = shadowed(backend(rms_norm=rms_norm), watch).kernels.rms_norm
    results = found(watch, lambda: norm(randn(T, H), randn(H, seed=1)).sum())
    assert results["gradient of weight"].used > 1
    assert results["gradient of x"].used < 1


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_result_without_a_gradient_breaks_the_budget(reentrant: bool | None) -> None:
    """One of two results is detached; no gradient ever comes back to it. A checkpoint's second call adds nothing."""

    def rope(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        q, k = reference.rope(*args, **options)
        return q.detach(), k

    watch = Watch()
    kernel = shadowed(backend(rope=rope), watch).kernels.rope
    q, angles = randn(1, 4, T, 8), torch.ones(1, T, 8)

    class Heads(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            turned, kept = kernel(q * 2, q[:, :2], angles, angles)
            return turned.sum() + kept.sum()

    heads: Any = Heads()
    if reentrant is None:
        found(watch, lambda: heads(q))
    else:
        found(watch, lambda: checkpoint(heads, q, use_reentrant=reentrant))
    (lost,) = (one for one in watch.findings if one.used > 1)
    assert (lost.module, lost.result, lost.which) == ("Heads", "output 0", "a result without a gradient,")
    assert "gradient of k" in {one.result for one in watch.findings}


def test_a_frozen_result_needs_no_gradient() -> None:
    watch = Watch()
    kernel = shadowed(backend(rope=right("rope")), watch).kernels.rope
    q, angles = randn(1, 4, T, 8), torch.ones(1, T, 8)
    found(watch, lambda: kernel(q.detach(), q[:, :2], angles, angles)[1].sum())
    assert watch.findings and all(one.used < 1 for one in watch.findings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_that_a_call_writes_to_breaks_the_budget(dtype: torch.dtype) -> None:
    """The result is that of the changed input, so no other comparison shows it."""

    def rms_norm(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight.data[3] *= 2
        return reference.rms_norm(x, weight, *args, **kwargs)

    watch = Watch()
    norm = shadowed(backend(rms_norm=rms_norm), watch).kernels.rms_norm
    with torch.no_grad(), watch.watching(torch.nn.Identity()):
        norm(randn(T, H, dtype=dtype), randn(H, dtype=dtype, seed=1))
    assert [one.result for one in watch.findings if one.used > 1] == ["weight"]


def test_a_result_that_is_no_tensor_is_named() -> None:
    watch = Watch()
    norm = shadowed(backend(rms_norm=lambda *args: None), watch).kernels.rms_norm
    with watch.watching(torch.nn.Identity()):
        assert norm(randn(T, H), randn(H, seed=1)) is None
    (finding,) = watch.findings
    assert (finding.module, finding.which) == ("outside", "NoneType instead of a tensor")


def test_a_confident_loss_in_float32_stays_within_the_budget() -> None:
    """The loss is the difference of much larger numbers, and the error of plain PyTorch is chance."""
    watch = Watch()
    exchanged = backend(cross_entropy=lambda logits, *rest, **options: reference.cross_entropy(logits - 7, *rest))
    loss = shadowed(exchanged, watch).kernels.cross_entropy
    labels = torch.arange(T)
    for seed in range(8):
        logits = randn(T, V, seed=seed).detach()
        logits[labels, labels] += 12
        watch.findings.clear()
        results = found(watch, lambda logits=logits: loss(logits.requires_grad_(), labels))
        assert results["output"].used < 1


def test_an_input_that_is_overwritten_is_not_compared() -> None:
    """The operation did not save it, so training goes on; the watch says what it could not compare."""
    watch = Watch()
    norm = shadowed(backend(rope=right("rope")), watch).kernels.rope
    q, angles = randn(1, 4, T, 8), torch.zeros(1, T, 8)
    with watch.watching(torch.nn.Identity()):
        x = q * 2
        y, _ = norm(x, x[:, :2], angles, angles)
        x.detach().add_(1)
        y.sum().backward()
    assert "rope" in watch.unverified
    assert {one.result for one in watch.findings} == {"output 0", "output 1"}
