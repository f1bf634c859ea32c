"""Linear layers with float8 weights: which become some, how they are stored, and what they compute.

They are transformers' `FP8Linear`, the layers of its fine-grained fp8: the weight in float8 (e4m3), one float32 scale
per block of 128 x 128 in `weight_scale_inv`, and activations that are quantised as they come. So what is saved is a
checkpoint that transformers loads, and checkpoints of this kind load here. transformers computes such layers by kernels
that it downloads, on GPUs from sm_89 on; here `fp8_linear` computes them, on every device, with a gradient for x.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import FineGrainedFP8Config, PreTrainedConfig, PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers import auto
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import product_dtype
from unsloth_fast.models.protocols import Placement
from unsloth_fast.models.quantization import kept_modules, stored_form
from unsloth_fast.models.source import Source
from unsloth_fast.seams import overrides
from unsloth_ref.float8_checks import BLOCK, FLOAT8, blocks
from unsloth_ref.kernels import fp8_dequantize

METHOD = "fp8"  # quant_method in a configuration
_EXCLUDED = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning", "quantization_config")
_FORM: Mapping[str, Any] = {"weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "scale_fmt": "float"}


def is_wanted(
    load_in_fp8: bool | str | None, asked: Sequence[object], config: PreTrainedConfig, given: object = None
) -> bool:
    """Whether the weights are to be quantised to float8 while they are loaded.

    Args:
        load_in_fp8: the user's, of which True and "block" ask for float8.
        asked: load_in_4bit, load_in_8bit, load_in_16bit and full_finetuning, which exclude it.
        config: of the model.
        given: the user's own quantization_config, which excludes it too.

    Raises:
        ValueError: another value; float8 and one of the others; a model that is stored quantised otherwise, or in
            another form of float8.
    """
    if load_in_fp8 not in (True, False, None, "block"):
        raise ValueError(f"load_in_fp8: got {load_in_fp8!r}; allowed: True, False, None, 'block'")
    stored = stored_form(config)
    for name, allowed in _FORM.items() if load_in_fp8 and stored.get("quant_method") == METHOD else ():
        found = stored.get(name, allowed)
        if (list(found) if isinstance(found, tuple) else found) != allowed:
            raise ValueError(
                f"load_in_fp8: got {load_in_fp8!r} and a model with {name}={found!r}; allowed: {allowed!r}"
            )
    if not load_in_fp8:
        return False
    for name, value in zip(_EXCLUDED, (*asked, given), strict=True):
        if value:
            raise ValueError(f"load_in_fp8: got {load_in_fp8!r} and {name}={value!r}; allowed: one of the two")
    if stored and stored.get("quant_method") != METHOD:
        method = stored.get("quant_method")
        raise ValueError(f"load_in_fp8: got {load_in_fp8!r} and a model that is stored as {method!r}; allowed: False")
    return not stored


def one_device(device_map: Any) -> torch.device:
    """The device of a device_map that names one.

    Raises:
        ValueError: one that names several, or leaves the choice to accelerate.
    """
    found = device_map
    if isinstance(device_map, dict) and len(device_map) == 1:
        (found,) = device_map.values()
    if isinstance(found, int):
        return torch.device("cuda", found)
    if found is None or isinstance(found, torch.device):
        return found or torch.device("cpu")
    if isinstance(found, dict) or found in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ValueError(f"device_map: got {device_map!r} with load_in_fp8=True; allowed: one device, such as 'cuda:0'")
    return torch.device(found)


def load(
    auto_class: Any, source: Source, options: dict[str, Any], plain: PreTrainedModel | None, backend: Backend
) -> Any:
    """A model whose float8 layers, if it has some, are frozen and ready for adapters.

    Args:
        auto_class: of transformers.
        source: where the model is.
        options: keywords of its from_pretrained, with dtype and device_map.
        plain: the model without memory, to quantise its linear layers to float8; None to load it as it is stored.
        backend: whose fp8_quantize is used.
    """
    if plain is None:
        with patch.dict(auto.AUTO_QUANTIZER_MAPPING, {METHOD: _AnyDevice}):
            model = auto_class.from_pretrained(source.base, **options, **source.base_hub)
    else:
        device = one_device(options["device_map"])
        model = auto_class.from_pretrained(source.base, **options | {"device_map": None}, **source.base_hub)
        quantise(model, plain, backend, device)
    for layer in model.modules():
        if isinstance(layer, FP8Linear):
            layer.weight.requires_grad_(False)
            layer.weight_scale_inv.requires_grad_(False)
            layer.compute_dtype = options["dtype"]  # of which peft makes adapters
    return model


def quantise(model: PreTrainedModel, plain: PreTrainedModel, backend: Backend, device: torch.device) -> None:
    """Replace the linear layers of a model on the CPU by float8 ones on a device, one by one, and move the rest there.

    Those of `quantization.kept_modules` stay as they are, and so does the head. 16-bit weights leave the CPU one at a
    time, so that the device never holds a second copy of the model.

    Args:
        model: changed in place.
        plain: the same without memory.
        backend: whose fp8_quantize is used.
        device: where the model will be.
    """
    head = model.get_output_embeddings()
    kept = sorted({*kept_modules(plain), *(name for name, module in model.named_modules() if module is head)})
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and should_convert_module(name, kept):
            model.set_submodule(name, _quantised(layer, backend, device))
    model.to(device)  # pyright: ignore[reportArgumentType]
    model.config.quantization_config = FineGrainedFP8Config(modules_to_not_convert=kept)


def _quantised(layer: nn.Linear, backend: Backend, device: torch.device) -> FP8Linear:
    with torch.device("meta"):
        float8 = FP8Linear(layer.in_features, layer.out_features, block_size=(BLOCK, BLOCK))
    values, scale = backend.kernels.fp8_quantize(layer.weight.detach().to(device))
    float8.weight, float8.weight_scale_inv = (nn.Parameter(one, requires_grad=False) for one in (values, scale))
    if layer.bias is not None:
        float8.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=layer.bias.requires_grad)
    return float8.train(layer.training)


def is_float8(layer: nn.Module) -> TypeGuard[FP8Linear]:
    """Whether a layer is a linear one in the form that fp8_linear takes."""
    if not isinstance(layer, FP8Linear) or layer.weight.dtype != FLOAT8 or layer.activation_scheme != "dynamic":
        return False
    rows, columns = layer.weight.shape
    scale = layer.weight_scale_inv
    return scale.dtype == torch.float32 and scale.shape == (blocks(rows), blocks(columns))


def float8_placement(layer: nn.Module, backend: Backend) -> Placement | str | None:
    """The operation and the forward for a linear layer in float8; None for other modules."""
    if not isinstance(layer, FP8Linear):
        return None
    if not is_float8(layer):
        return "float8 in another form than blocks of 128 x 128 with float32 scales"
    fp8_linear = backend.kernels.fp8_linear

    def forward(self: FP8Linear, input: Tensor) -> Tensor:
        dtype = product_dtype(input)
        bias = None if self.bias is None else self.bias.to(dtype)
        return fp8_linear(input.to(dtype), self.weight.detach(), self.weight_scale_inv.detach(), bias)

    return ("fp8_linear",), forward


def dequantised(layer: FP8Linear) -> Tensor:
    """The weight of a layer in float8, in float32."""
    return fp8_dequantize(layer.weight.detach(), layer.weight_scale_inv.detach(), torch.float32)


class _AnyDevice(FineGrainedFP8HfQuantizer):
    """transformers' loader of float8 checkpoints, which would convert them to 16 bits without a recent GPU."""

    @overrides(FineGrainedFP8HfQuantizer)
    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Allow every device."""
