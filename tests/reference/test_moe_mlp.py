"""The reference moe_mlp against values worked by hand, transformers' experts, and finite differences."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tests.operations.lora_linear import DEVICE, randn
from unsloth_ref.kernels import moe_mlp

# Float64: sums of some dozen terms of order 1.
FLOAT64: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}
EXPERTS, COLUMNS, INNER = 4, 6, 5


def inputs_of(tokens: int, per_token: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, gate_up, down, indices of which expert 1 has none, and weights."""
    shapes = (tokens, COLUMNS), (EXPERTS, 2 * INNER, COLUMNS), (EXPERTS, COLUMNS, INNER)
    x, gate_up, down = (randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    indices = torch.randint(EXPERTS - 1, (tokens, per_token), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return x, gate_up, down, indices + (indices > 0), randn(tokens, per_token, seed=9, dtype=dtype)


def test_values_worked_by_hand() -> None:
    """SiLU(0) = 0 and its slope is 1/2: with a gate of 0 only the gate's gradient and those behind it differ from 0."""
    leaves = [
        torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for value in ([[2.0]], [[[0.0], [3.0]], [[9.0], [9.0]]], [[[5.0]], [[9.0]]], [[7.0]])
    ]
    x, gate_up, down, weights = leaves
    y = moe_mlp(x, gate_up, down, torch.tensor([[0]]), weights)
    assert y.tolist() == [[0.0]]
    dx, dgate_up, ddown, dweights = grad(y.sum(), leaves)
    # dh = 7 * 5 = 35; dgate = 35 * up * 1/2 with up = 6; times x = 2.
    assert dgate_up.tolist() == [[[210.0], [0.0]], [[0.0], [0.0]]]
    assert not (dx.any() or ddown.any() or dweights.any())


@pytest.mark.parametrize(("name", "activation"), [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh")])
@pytest.mark.parametrize("per_token", [1, 3])
def test_transformers_experts_agree(name: str, activation: Any, per_token: int) -> None:
    """Value and all gradients agree; some tokens have an expert twice."""
    sizes = {"hidden_size": COLUMNS, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    config = MixtralConfig(**sizes, hidden_act=name)
    config._experts_implementation = "eager"
    module: Any = MixtralExperts(config).to(DEVICE, torch.float64)
    x, gate_up, down, indices, weights = inputs_of(9, per_token)
    with torch.no_grad():
        module.gate_up_proj.copy_(gate_up)
        module.down_proj.copy_(down)
    ours, theirs = moe_mlp(x, gate_up, down, indices, weights, activation=activation), module(x, indices, weights)
    dy = randn(9, COLUMNS, seed=5).detach()
    found = [ours, *grad(ours, (x, gate_up, down, weights), dy)]
    wanted = [theirs, *grad(theirs, (x, module.gate_up_proj, module.down_proj, weights), dy)]
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, **FLOAT64)


@pytest.mark.parametrize("per_token", [1, 3])
def test_the_experts_of_gpt_oss_agree(per_token: int) -> None:
    """Value and all gradients agree: of biases, interleaved columns, and a gate of which some rows are clamped."""
    config = GptOssConfig(hidden_size=COLUMNS, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    module: Any = GptOssExperts(config).to(DEVICE, torch.float64)
    x, gate_up, down, indices, weights = inputs_of(9, per_token)
    x = (4 * x).detach().requires_grad_()
    biases = randn(EXPERTS, 2 * INNER, seed=7), randn(EXPERTS, COLUMNS, seed=8)
    own = [module.gate_up_proj, module.down_proj, module.gate_up_proj_bias, module.down_proj_bias]
    with torch.no_grad():
        for parameter, value in zip(own, (gate_up.mT, down.mT, *biases), strict=True):
            parameter.copy_(value)
    options: dict[str, Any] = {"interleaved": True, "alpha": 1.702, "limit": 7.0, "offset": 1.0}
    ours = moe_mlp(x, gate_up, down, indices, weights, *biases, **options)
    theirs = module(x, indices, weights)
    dy = randn(9, COLUMNS, seed=5).detach()
    found = [ours, *grad(ours, (x, weights, gate_up, down, *biases), dy)]
    right = list(grad(theirs, (x, weights, *own), dy))
    right[2:4] = [gradient.mT for gradient in right[2:4]]
    for one, other in zip(found, [theirs, *right], strict=True):
        torch.testing.assert_close(one, other, **FLOAT64)
    without_limit = moe_mlp(x, gate_up, down, indices, weights, *biases, **{**options, "limit": None})
    assert not torch.allclose(without_limit, ours)


def test_an_expert_twice_counts_twice() -> None:
    x, gate_up, down, indices, weights = inputs_of(4, 2)
    twice = moe_mlp(x, gate_up, down, indices[:, :1].expand(4, 2), weights)
    torch.testing.assert_close(
        twice, moe_mlp(x, gate_up, down, indices[:, :1], weights.sum(1, keepdim=True)), **FLOAT64
    )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gradients_are_the_derivatives_and_an_idle_expert_gets_0(activation: str) -> None:
    x, gate_up, down, indices, weights = inputs_of(3, 2)
    biases = randn(EXPERTS, 2 * INNER, seed=7), randn(EXPERTS, COLUMNS, seed=8)
    inputs = x, gate_up, down, weights, *biases
    options: dict[str, Any] = {"activation": activation, "limit": 0.5, "offset": 1.0}

    def call(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, *biases: Tensor) -> Tensor:
        return moe_mlp(x, gate_up, down, indices, weights, *biases, **options)

    assert gradcheck(call, inputs)
    for gradient in grad(call(*inputs).sum(), (gate_up, down, *biases)):
        assert gradient.any() and not gradient[1].any()


def test_weights_of_experts_may_be_wider() -> None:
    """The result has the dtype of x, and the gradient of the weights has their own."""
    x, gate_up, down, indices, _ = inputs_of(5, 2, torch.bfloat16)
    weights = randn(5, 2, seed=9, dtype=torch.float32)
    y = moe_mlp(x, gate_up, down, indices, weights)
    (dweights,) = grad(y.float().sum(), weights)
    assert (y.dtype, dweights.dtype) == (torch.bfloat16, torch.float32)


def test_compiled_code_adds_nothing_for_a_slot_without_an_expert() -> None:
    x, gate_up, down, indices, weights = inputs_of(5, 2)
    outside = torch.cat([indices[:, :1], torch.full_like(indices[:, 1:], EXPERTS)], 1)
    biases = randn(EXPERTS, 2 * INNER, seed=7), randn(EXPERTS, COLUMNS, seed=8)
    found = torch.compile(moe_mlp, fullgraph=True, backend="eager")(x, gate_up, down, outside, weights, *biases)
    torch.testing.assert_close(found, moe_mlp(x, gate_up, down, indices[:, :1], weights[:, :1], *biases), **FLOAT64)
