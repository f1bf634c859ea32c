"""The reference lora_mlp against its formula, finite differences, and MLPs of transformers with peft's layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.functional import gelu, silu
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.operations.lora_linear import DEVICE, randn
from tests.operations.lora_mlp import CHECKS, layers_of, leaves_of
from unsloth_ref.kernels import lora_mlp
from unsloth_ref.types import GatedActivation

ACTIVATIONS: dict[GatedActivation, tuple[str, Callable[[Tensor], Tensor]]] = {
    "silu": ("silu", silu),
    "gelu": ("gelu", gelu),
    "gelu_tanh": ("gelu_pytorch_tanh", lambda gate: gelu(gate, approximate="tanh")),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formula_of_merged_weights(activation: GatedActivation) -> None:
    """In float64, with a bias of gate and of down; values and all gradients."""
    layers = layers_of()
    x, weight, a, b, scaling, bias = layers
    merged = [w + s * two @ one for w, one, two, s in zip(weight, a, b, scaling, strict=True)]
    gate, up = x @ merged[0].T + bias[0], x @ merged[1].T
    wanted = (ACTIVATIONS[activation][1](gate) * up) @ merged[2].T + bias[2]
    found = lora_mlp(*layers, activation=activation)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    dy = randn(*found.shape, seed=50).detach()
    ours, theirs = (grad(y, leaves_of(layers), dy) for y in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_gradients_are_the_derivatives() -> None:
    """First and second derivatives agree with finite differences."""
    x, weight, a, b, scaling, _ = layers_of(rows=1, columns=3, inner=2, out=2)

    def mlp(x: Tensor, *tensors: Tensor) -> Tensor:
        return lora_mlp(x, tensors[:3], tensors[3:6], tensors[6:], scaling)

    assert gradcheck(mlp, (x, *weight, *a, *b))
    assert gradgradcheck(mlp, (x, *weight, *a, *b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_bits_as_peft(activation: GatedActivation, dtype: torch.dtype) -> None:
    """LlamaMLP with peft's layers, without dropout, adapters in the dtype of x; values and gradients but that of x."""
    config = LlamaConfig(hidden_size=64, intermediate_size=65, hidden_act=ACTIVATIONS[activation][0], mlp_bias=True)
    names = ("gate_proj", "up_proj", "down_proj")
    adapters = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=list(names))
    model: Any = inject_adapter_in_model(adapters, LlamaMLP(config)).to(DEVICE, dtype)
    layers = [model.get_submodule(name).requires_grad_() for name in names]
    x = randn(2, 7, 64, dtype=dtype)
    weight, bias = [one.base_layer.weight for one in layers], [one.base_layer.bias for one in layers]
    a, b = ([one.get_submodule(f"{part}.default").weight for one in layers] for part in ("lora_A", "lora_B"))
    ours, theirs = lora_mlp(x, weight, a, b, [1.5] * 3, bias, activation=activation), model(x)
    assert torch.equal(ours, theirs)
    leaves, dy = [*weight, *a, *b, *bias], randn(2, 7, 64, dtype=dtype, seed=3).detach()
    for our_grad, their_grad in zip(grad(ours, leaves, dy), grad(theirs, leaves, dy), strict=True):
        assert torch.equal(our_grad, their_grad)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_what_both_backends_keep(check: Callable[..., None]) -> None:
    check(lora_mlp)
