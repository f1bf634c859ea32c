"""Argument checks of linear layers with adapters, and of an MLP of them, which both backends call."""

from collections.abc import Sequence

from torch import Tensor

from unsloth_ref import checks, float8_checks
from unsloth_ref.nf4_checks import nf4_arguments
from unsloth_ref.types import Float8Weight, NF4Weight, QuantisedWeight

LAYERS = ("gate", "up", "down")


def lora_arguments(
    x: Tensor,
    weight: Tensor | QuantisedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    which: str = "",
    rows: str = "x",
) -> None:
    """Check x [..., I], weight [O, I], lora_a [R, I], lora_b [O, R] and bias [O] of a layer with an adapter.

    Messages add `which` to the names of all arguments but x, and call the tensor with the dimension I `rows`.
    """
    if x.ndim == 0:
        raise ValueError("x: got shape []; allowed: [..., I]")
    checks.dtype("x", x)
    if isinstance(weight, NF4Weight):
        nf4_arguments(*weight, x.dtype)
        checks.same_device(f"weight{which}", weight.packed, "x", x)
        weight = x.new_empty(()).expand(*weight.shape)  # in its place below
    elif isinstance(weight, Float8Weight):
        checks.dimensions(f"weight{which}", weight.values, 2, "[O, I]")
        float8_checks.weight_arguments(x, *weight, which)
        weight = x.new_empty(()).expand(*weight.shape)
    checks.dimensions(f"weight{which}", weight, 2, "[O, I]")
    checks.shape(f"weight{which}", weight, (weight.shape[0], x.shape[-1]), f"[O, I], the last dimension of {rows}")
    checks.dtype(f"weight{which}", weight, (x.dtype,))
    checks.dimensions(f"lora_a{which}", lora_a, 2, "[R, I]")
    checks.shape(f"lora_a{which}", lora_a, (lora_a.shape[0], x.shape[-1]), f"[R, I], the last dimension of {rows}")
    wider = [kind for kind in checks.FLOATS if kind == x.dtype or kind.itemsize > x.dtype.itemsize]
    checks.dtype(f"lora_a{which}", lora_a, wider)
    both = f"[O, R], the rows of weight{which} and of lora_a{which}"
    checks.shape(f"lora_b{which}", lora_b, (weight.shape[0], lora_a.shape[0]), both)
    checks.dtype(f"lora_b{which}", lora_b, (lora_a.dtype,))
    others = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    if bias is not None:
        checks.shape(f"bias{which}", bias, weight.shape[:1], f"one entry per row of weight{which}")
        checks.dtype(f"bias{which}", bias, (x.dtype,))
        others["bias"] = bias
    for name, tensor in others.items():
        checks.same_device(f"{name}{which}", tensor, "x", x)


def lora_layers_arguments(
    x: Tensor,
    weight: Sequence[Tensor | QuantisedWeight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float] | None,
    bias: Sequence[Tensor | None] | None,
) -> None:
    """Check the arguments of layers with adapters that share x: as many of each as there are weights, at least 1."""
    count = len(weight)
    if count == 0 or isinstance(weight, QuantisedWeight):
        seen = _single(weight) if count else "0 layers"
        raise ValueError(f"weight: got {seen}; allowed: a list of at least 1 layer")
    for name, values in (("lora_a", lora_a), ("lora_b", lora_b), ("scaling", scaling), ("bias", bias)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: got {checks.counted(len(values), 'layer')}; allowed: {count}, one per weight")
    for index, layer in enumerate(zip(weight, lora_a, lora_b, bias or [None] * count, strict=True)):
        lora_arguments(x, *layer, which=f"[{index}]")


def _single(weight: object) -> str:
    """What a weight of one layer is called where a list of weights is wanted."""
    return "an NF4Weight" if isinstance(weight, NF4Weight) else "a Float8Weight"


def lora_mlp_arguments(
    x: Tensor,
    weight: Sequence[Tensor | QuantisedWeight],
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
        if values is not None and (len(values) != count or isinstance(values, QuantisedWeight)):
            seen = _single(values) if isinstance(values, QuantisedWeight) else checks.counted(len(values), "layer")
            raise ValueError(f"{name}: got {seen}; allowed: {count}, one each for {', '.join(LAYERS)}")
    checks.one_of("activation", activation, ("silu", "gelu", "gelu_tanh"))
    gate, up, down = zip(weight, lora_a, lora_b, bias or [None] * count, strict=True)
    lora_arguments(x, *gate, which="[0]")
    lora_arguments(x, *up, which="[1]")
    outputs, wanted = up[0].shape[0], gate[0].shape[0]
    if outputs != wanted:
        raise ValueError(f"weight[1]: got {checks.counted(outputs, 'row')}; allowed: {wanted}, those of weight[0]")
    hidden = x.new_empty(()).expand(*x.shape[:-1], wanted)  # of that shape, without memory
    lora_arguments(hidden, *down, which="[2]", rows="the product of gate and up")
