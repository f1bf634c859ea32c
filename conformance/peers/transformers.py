"""transformers' experts of a mixture, by torch's grouped products. Its other modules are compositions of torch's own.

The function takes a module; here that is an object with the attributes that it reads.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from conformance.peers import import_kernels, operation

_experts, _plain_gate, _gpt_oss_gate = import_kernels(
    "transformers",
    "transformers.integrations.moe:grouped_mm_experts_forward",
    "transformers.integrations.moe:_default_apply_gate",
    "transformers.models.gpt_oss.modeling_gpt_oss:GptOssExperts._apply_gate",
)
_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


@operation
def moe_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_indices: Tensor, expert_weights: Tensor,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, *, activation: str = "silu",
    interleaved: bool = False, alpha: float = 1.0, limit: float | None = None, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """As experts_implementation="grouped_mm", with the gate of most models or that of gpt-oss."""
    is_gpt_oss = (activation, interleaved, offset, limit is None) == ("silu", True, 1.0, False)
    if not is_gpt_oss and (interleaved, alpha, offset, limit) != (False, 1.0, 0.0, None):
        got = f"interleaved={interleaved}, alpha={alpha}, offset={offset}, limit={limit}"
        allowed = "False, 1.0, 0.0, None, or with 'silu' True, any, 1.0, any but None"
        raise NotImplementedError(f"got activation={activation!r}, {got}; allowed with transformers: {allowed}")
    if (gate_up_bias is None) != (down_bias is None):
        raise NotImplementedError("down_bias: got one bias of two; allowed with transformers: both, or none")
    module: Any = SimpleNamespace(
        num_experts=len(gate_up), has_gate=True, has_bias=down_bias is not None, is_transposed=False,
        gate_up_proj=gate_up, gate_up_proj_bias=gate_up_bias, down_proj=down, down_proj_bias=down_bias,
        act_fn=_ACTIVATIONS[activation], alpha=alpha, limit=limit,
        has_post_expert_norm=False, _is_expert_parallel=False,
    )  # fmt: skip
    module._apply_gate = partial(_gpt_oss_gate if is_gpt_oss else _plain_gate, module)
    return _experts(module, x, expert_indices, expert_weights)
