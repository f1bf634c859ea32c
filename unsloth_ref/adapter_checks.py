"""The argument checks of an MLP of layers with adapters; both backends call them, as those of checks.py."""

from collections.abc import Sequence

from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.types import NF4Weight

LAYERS = ("gate", "up", "down")


def lora_mlp_arguments(
    x: Tensor,
    weight: Sequence[Tensor | NF4Weight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float] | None,
    bias: Sequence[Tensor | None] | None,
    activation: str,
) -> None:
    """Check x [..., H] and the layers of a gated MLP: gate and up from H to F, down from F to O."""
    count = len(LAYERS)
    groups = ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b), ("scaling", scaling), ("bias", bias)
    for name, values in groups:
        if values is not None and (len(values) != count or isinstance(values, NF4Weight)):
            seen = "an NF4Weight" if isinstance(values, NF4Weight) else f"{len(values)} layers"
            raise ValueError(f"{name}: got {seen}; allowed: {count}, one each for {', '.join(LAYERS)}")
    checks.one_of("activation", activation, ("silu", "gelu", "gelu_tanh"))
    gate, up, down = zip(weight, lora_a, lora_b, bias or [None] * count, strict=True)
    checks.lora_arguments(x, *gate, which="[0]")
    checks.lora_arguments(x, *up, which="[1]")
    outputs, wanted = up[0].shape[0], gate[0].shape[0]
    if outputs != wanted:
        raise ValueError(f"weight[1]: got {outputs} rows; allowed: {wanted}, those of weight[0]")
    hidden = x.new_empty(()).expand(*x.shape[:-1], wanted)  # of that shape, without memory
    checks.lora_arguments(hidden, *down, which="[2]", rows="the product of gate and up")
