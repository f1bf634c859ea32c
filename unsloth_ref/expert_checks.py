"""Argument checks of products by groups of rows and of experts, which both backends call."""

from torch import Tensor

from unsloth_ref import checks


def grouped_arguments(x: Tensor, weight: Tensor, group_sizes: Tensor) -> None:
    """Check x [T, H], weight [E, O, H] and group_sizes [E] of a product by groups of rows."""
    checks.dimensions("x", x, 2, "[T, H]")
    checks.dtype("x", x)
    checks.dimensions("weight", weight, 3, "[E, O, H]")
    if weight.shape[0] == 0 or weight.shape[2] != x.shape[1]:
        seen = list(weight.shape)
        raise ValueError(f"weight: got shape {seen}; allowed: [E, O, {x.shape[1]}], the H of x, E at least 1")
    checks.dtype("weight", weight, (x.dtype,))
    checks.same_device("weight", weight, "x", x)
    checks.shape("group_sizes", group_sizes, weight.shape[:1], "one size per matrix of weight")
    checks.dtype("group_sizes", group_sizes, checks.INTEGERS)
    checks.same_device("group_sizes", group_sizes, "x", x)


def groups_fit(group_sizes: Tensor, rows: int) -> None:
    """Raise ValueError unless the sizes of groups are not negative and add up to rows. Synchronises a GPU."""
    sizes = group_sizes.tolist()
    if min(sizes) < 0 or sum(sizes) != rows:
        seen = sizes if len(sizes) <= 8 else f"{sizes[:4]} ... {sizes[-4:]}, in sum {sum(sizes)}"
        raise ValueError(f"group_sizes: got {seen}; allowed: sizes from 0 that add up to {rows}, the T of x")


def expert_arguments(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    """Check the tensors of expert MLPs.

    They are x [T, H], gate_up [E, 2F, H], down [E, H, F], expert_indices and expert_weights [T, k], and the biases
    [E, 2F] and [E, H].
    """
    checks.dimensions("x", x, 2, "[T, H]")
    checks.dtype("x", x)
    rows, columns = x.shape
    checks.dimensions("gate_up", gate_up, 3, "[E, 2F, H]")
    if gate_up.shape[0] == 0 or gate_up.shape[1] % 2 or gate_up.shape[2] != columns:
        seen = list(gate_up.shape)
        raise ValueError(f"gate_up: got shape {seen}; allowed: [E, 2F, {columns}], the H of x, E at least 1")
    experts, inner = gate_up.shape[0], gate_up.shape[1] // 2
    checks.shape("down", down, (experts, columns, inner), "[E, H, F], those of gate_up")
    checks.dimensions("expert_indices", expert_indices, 2, "[T, k]")
    if expert_indices.shape[0] != rows or expert_indices.shape[1] == 0:
        seen = list(expert_indices.shape)
        raise ValueError(f"expert_indices: got shape {seen}; allowed: [{rows}, k], the T of x, k at least 1")
    checks.dtype("expert_indices", expert_indices, checks.INTEGERS)
    checks.shape("expert_weights", expert_weights, expert_indices.shape, "the shape of expert_indices")
    checks.dtype("gate_up", gate_up, (x.dtype,))
    checks.dtype("down", down, (x.dtype,))
    wider = [kind for kind in checks.FLOATS if kind == x.dtype or kind.itemsize > x.dtype.itemsize]
    checks.dtype("expert_weights", expert_weights, wider)
    for name, bias, matrices in ("gate_up_bias", gate_up_bias, gate_up), ("down_bias", down_bias, down):
        if bias is not None:
            checks.shape(name, bias, matrices.shape[:2], "one entry per row of its matrices")
            checks.dtype(name, bias, (x.dtype,))
            checks.same_device(name, bias, "x", x)
    others = {"gate_up": gate_up, "down": down, "expert_indices": expert_indices, "expert_weights": expert_weights}
    for name, tensor in others.items():
        checks.same_device(name, tensor, "x", x)


def expert_gate(activation: str, alpha: float, limit: float | None, offset: float) -> None:
    """Check the activation of expert MLPs and its options."""
    checks.one_of("activation", activation, ("silu", "gelu_tanh"))
    checks.gate_options(alpha, limit, offset)
    if activation != "silu" and alpha != 1.0:
        raise ValueError(f"alpha: got {alpha!r} with activation={activation!r}; allowed: with 'silu', or 1.0")


def experts_exist(expert_indices: Tensor, experts: int) -> None:
    """Raise ValueError for an index outside [0, experts). Synchronises a GPU."""
    wrong = (expert_indices < 0) | (expert_indices >= experts)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"expert_indices: got {int(expert_indices[index])} at index {index}; allowed: 0 to {experts - 1}"
        )
