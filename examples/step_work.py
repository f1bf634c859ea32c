"""How much must a training step compute, and how long is the GPU idle in it?

The operations that a step needs, whoever trains, are those of its matrix products:

- 2 per token and weight in the forward pass, 2 in the backward pass for the gradient of the input, and 2 more for that
  of a weight which is trained; of a layer's experts, those that a token is routed to;
- 12 per head, column of a head, and pair of a query and a key that it sees: 4 in the forward pass, 8 in the backward.

What is computed again, and what is no matrix product, does not count: it is how a trainer works, not what it is asked.
Model FLOP utilisation is these operations per second, over the rate of a large bfloat16 matrix product on the same GPU.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def operations(model: Any, lengths: Iterable[int], tokens: int) -> float:
    """Floating-point operations of a step.

    Args:
        model: of transformers, with or without peft's adapters.
        lengths: of the documents, in tokens.
        tokens: of a step.
    """
    config = model.config.get_text_config()
    weights = sum((6 if trained else 4) * elements for elements, trained in _matrices(model, config))
    lengths = list(lengths)
    heads = 12 * config.num_attention_heads * _width(config)
    attention = sum(heads * _pairs(lengths, window) for window in _windows(config)) / sum(lengths)
    return tokens * (weights + attention)


def idle_share(intervals: Iterable[tuple[float, float]], seconds: float) -> float:
    """The share of a time in which no kernel ran.

    Args:
        intervals: begin and end of each kernel and copy, in seconds; they may overlap.
        seconds: the whole time.
    """
    busy, last = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    return max(0.0, 1 - busy / seconds)


def _matrices(model: nn.Module, config: Any) -> Iterator[tuple[float, bool]]:
    """The elements that a token is multiplied by, and whether they are trained, for each weight."""
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((found for name in names if (found := getattr(config, name, None))), None)
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "original_module" in name or (id(weight) in tables and weight is not head):
            continue
        used = config.num_experts_per_tok / experts if weight.ndim == 3 and weight.shape[0] == experts else 1
        yield used * _elements(weight), weight.requires_grad


def _elements(weight: Tensor) -> int:
    state = getattr(weight, "quant_state", None)  # of bitsandbytes: the weight holds two elements per byte
    return weight.numel() if state is None else state.shape.numel()


def _width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _windows(config: Any) -> Iterator[int | None]:
    """The window of each layer with attention; None for whole documents."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    for kind in kinds:
        if kind not in ("linear_attention", "conv", "mamba"):
            yield window if kind == "sliding_attention" else None


def _pairs(lengths: Iterable[int], window: int | None) -> int:
    """Pairs of a query and a key that it sees, in all documents."""
    seen = ((length, min(length, window or length)) for length in lengths)
    return sum(width * (width + 1) // 2 + (length - width) * width for length, width in seen)
