"""The modules that an adapter trains: what names, a pattern, or parts of the model stand for in a family."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.layers import last_parts, read_layers, role, routers, text_names

logger = logging.getLogger(__name__)

EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_ALL = "all-linear"
_USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What several layers are called where a family has them in one, or where experts have them in one parameter.
_IN_ONE = {name: ("qkv_proj", "query_key_value", "Wqkv", "W_pack", "c_attn") for name in ("q_proj", "k_proj", "v_proj")}
_IN_ONE |= {name: ("gate_up_proj",) for name in ("gate_proj", "up_proj")}
_NOT_FOR_EXPERTS = ("lora_dropout", "use_dora", "lora_bias")


@dataclass(frozen=True)
class Parts:
    """The parts of the text model that get an adapter; None for what was not said.

    Attributes:
        language: the layers of the text model.
        attention: linear layers in attention.
        mlp: linear layers in MLPs and experts.
    """

    language: bool | None = None
    attention: bool | None = None
    mlp: bool | None = None

    def include(self, name: str) -> bool:
        """Whether a module of this name is in a part that gets an adapter."""
        part = role(name)
        flags = {"attention": (self.attention,), "mlp": (self.mlp,), None: (self.attention, self.mlp)}[part]
        return self.language is not False and not any(flag is False for flag in flags)

    @property
    def asked(self) -> bool:
        """Whether a part was named."""
        return any(part is not None for part in (self.language, self.attention, self.mlp))


@dataclass(frozen=True)
class Targets:
    """What an adapter trains, as `peft.LoraConfig` names it.

    Attributes:
        modules: names of modules with LoRA, or a pattern for them.
        parameters: names of parameters with LoRA: weights of experts, [E, O, I].
        excluded: a pattern for modules that `modules` matches and that get no LoRA.
        saved: modules that are trained in full.
        paths: the full names of the modules with LoRA.
    """

    modules: list[str] | str
    parameters: list[str]
    excluded: str | None
    saved: list[str] | None
    paths: frozenset[str]

    def fields(self) -> dict[str, Any]:
        """The fields of `peft.LoraConfig`."""
        found: dict[str, Any] = {"target_modules": self.modules, "modules_to_save": self.saved}
        if self.parameters:
            found["target_parameters"] = self.parameters
        if self.excluded is not None:
            found["exclude_modules"] = self.excluded
        return found


def choose_targets(
    model: nn.Module, asked: list[str] | str | None, saved: list[str] | None, parts: Parts, fields: Mapping[str, Any]
) -> Targets:
    """The modules that get LoRA and those trained in full. What a family lacks is left out, which is logged.

    Modules outside the text model get none, nor do those that are read instead of called (`read_layers`).

    Args:
        model: the model, with or without adapters.
        asked: the names of modules, a pattern for full names, or "all-linear"; None for the usual seven, or for all
            linear layers of the parts that were named.
        saved: names of modules to be trained in full.
        parts: the parts of the model that get LoRA.
        fields: further fields of `peft.LoraConfig`.

    Raises:
        ValueError: no module is left, or a module to be trained in full is not there.
    """
    base = without_adapter(model)
    modules = _plain_modules(base)
    text = text_names(base, modules)
    head = base.get_output_embeddings()
    layers = {name for name, layer in modules.items() if isinstance(layer, nn.Linear | Conv1D) and layer is not head}
    linear = layers & text
    never = read_layers(base)
    own_names = last_parts(linear - never)
    _check_saved(saved, modules, own_names)
    of_experts = ["gate_up_proj", "down_proj"] if asked is None and parts.asked else []
    usable = linear - routers(base, {name: modules[name] for name in linear})
    usual = not parts.asked and (asked is None or (isinstance(asked, list) and {*_USUAL} <= {*asked}))
    asked, whole = _without_embeddings(_names(asked, usable, parts), own_names)
    saved = list(dict.fromkeys([*(saved or []), *whole])) or None
    parameters = [] if isinstance(asked, str) else _expert_parameters(base, [*asked, *of_experts], text, parts, fields)
    if isinstance(asked, list):
        asked = _present(asked, modules, parameters)
    matched = _matched(asked, modules, layers)
    read = never & matched
    chosen = {name for name in matched if name in text and name not in read and parts.include(name)}
    if read:
        logger.warning(
            "target_modules: %s: no LoRA, as their weights are read without a call", ", ".join(last_parts(read))
        )
    if not chosen and not parameters:
        left = "none is left in the parts asked for" if matched or parts.asked else "the model has none"
        raise ValueError(
            f"target_modules: got {asked!r}, of which {left}; allowed: {', '.join(own_names)}, or '{_ALL}'"
        )
    own = _patterns(fields.get("exclude_modules"))
    if usual:
        _log_left({name for name in usable - matched if not any(re.fullmatch(one, name) for one in own)}, never)
    excluded = [*own, *(_generalised(name) for name in sorted(matched - chosen))]
    pattern = "|".join(dict.fromkeys(excluded)) if excluded else None
    which = fields.get("layers_to_transform")
    paths = {name for name in chosen if _in_layers(name, which) and not any(re.fullmatch(one, name) for one in own)}
    return Targets(asked, parameters, pattern, saved, frozenset(paths))


def _plain_modules(base: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names that they have without adapters; of a wrapped one, what peft wraps."""
    found: dict[str, nn.Module] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            wrapped += (f"{name}.",)
            inner: Any = module
            module = inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner.original_module
        found[name] = module
    return found


def _names(asked: list[str] | str | None, linear: Iterable[str], parts: Parts) -> list[str] | str:
    """What was asked for, or the usual layers where nothing was, as one list of names or a pattern."""
    if asked is not None:
        return asked if isinstance(asked, str) else list(dict.fromkeys(asked))
    if parts.asked:
        return last_parts(name for name in linear if role(name) and parts.include(name))
    own = last_parts(linear)
    if set(_USUAL).isdisjoint(own):
        allowed = ", ".join(own)
        raise ValueError(f"target_modules: got None, and the model has none of {_USUAL}; allowed: {allowed}")
    return list(_USUAL)


def _without_embeddings(asked: list[str] | str, own_names: list[str]) -> tuple[list[str] | str, list[str]]:
    """The names of modules for LoRA, and those of embeddings and heads, which are trained in full."""
    if isinstance(asked, str):
        return asked, []
    whole = [name for name in asked if name in EMBEDDING_NAMES]
    if whole:
        logger.info("target_modules: %s: trained in full, as modules_to_save, not with LoRA", ", ".join(whole))
    rest = [name for name in asked if name not in whole]
    if whole and not rest:
        raise ValueError(
            f"target_modules: got only {whole}; allowed: together with at least one of {', '.join(own_names)}"
        )
    return rest, whole


def _check_saved(saved: list[str] | None, modules: Iterable[str], own_names: list[str]) -> None:
    for name in saved or []:
        if not any(path.endswith(name) for path in modules):  # peft's own test
            raise ValueError(
                f"modules_to_save: got {name!r}; allowed: {', '.join(own_names)}, embed_tokens, norm and so on"
            )


def _present(asked: list[str], modules: Iterable[str], parameters: list[str]) -> list[str]:
    """The names that the model has, those of layers in one with others replaced; what is missing is logged."""
    of_experts = {name.rpartition(".")[2] for name in parameters}
    found, missing = [], []
    for name in asked:
        names = [other for other in (name, *_IN_ONE.get(name, ())) if any(_ends_with(path, other) for path in modules)]
        found += names[:1]
        if names and names[0] != name:
            logger.info("target_modules: %s is part of %s here, which gets LoRA", name, names[0])
        elif not names and not of_experts.intersection((name, *_IN_ONE.get(name, ()))):
            missing.append(name)
    usual = [name for name in missing if name in _USUAL]
    if missing and (found or parameters):
        logger.log(
            logging.INFO if len(usual) == len(missing) else logging.WARNING,
            "target_modules: the model has no %s; LoRA on the rest",
            ", ".join(missing),
        )
    return list(dict.fromkeys(found)) if found or parameters else asked


def _log_left(left: set[str], never: set[str]) -> None:
    """Log the linear layers, such as those of mixers and shared experts, that the usual names leave without LoRA."""
    called, read = (", ".join(sorted(set(map(_end, names)))) for names in (left - never, left & never))
    if called:
        also = f", nor on {read}, whose weights are read without a call" if read else ""
        logger.warning("target_modules: no LoRA on %s, which 'all-linear' adds%s", called, also)


def _end(path: str) -> str:
    """The last part of a name that is not a number."""
    return re.sub(r"(\.\d+)+$", "", path).rpartition(".")[2]


def _expert_parameters(
    base: nn.Module, asked: list[str], text: Iterable[str], parts: Parts, fields: Mapping[str, Any]
) -> list[str]:
    """The names, as peft compares them, of experts' weights that are one parameter for all experts."""
    if parts.mlp is False or parts.language is False or "target_parameters" in fields:
        return []
    wanted = {other for name in asked for other in (name, *_IN_ONE.get(name, ()))}
    layers, found = fields.get("layers_to_transform"), []
    for path, module in _plain_modules(base).items():
        for name, parameter in module.named_parameters(recurse=False):
            if name in wanted and parameter.ndim == 3 and path in text and _in_layers(path, layers):
                found.append(f"{path}.{name}")
    refused = [field for field in _NOT_FOR_EXPERTS if fields.get(field)]
    if found and refused:
        raise ValueError(
            f"{refused[0]}: got {fields[refused[0]]!r} with LoRA on experts, whose weights are one parameter; allowed: "
            f"{refused[0]}=False or 0, or target_modules with names of attention alone"
        )
    if found and layers is None:  # the end of the name alone, as in other adapters
        found = list(dict.fromkeys(".".join(name.split(".")[-3:]) for name in found))
    if found:
        logger.info("target_modules: LoRA on the experts' parameters %s", ", ".join(found))
    return found


def _matched(asked: list[str] | str, modules: Iterable[str], linear: set[str]) -> set[str]:
    """The modules that peft would adapt."""
    if asked == _ALL:
        return linear
    if isinstance(asked, str):
        return {path for path in modules if re.fullmatch(asked, path)}
    return {path for path in modules if any(_ends_with(path, name) for name in asked)}


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _in_layers(path: str, layers: list[int] | int | None) -> bool:
    index = re.search(r"\.(\d+)(\.|$)", path)
    return layers is None or (
        index is not None and int(index[1]) in ([layers] if isinstance(layers, int) else layers or [int(index[1])])
    )


def _generalised(path: str) -> str:
    """A pattern for the module of this name in every layer."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(path))


def _patterns(excluded: list[str] | str | None) -> list[str]:
    """The user's own exclude_modules as patterns for full names."""
    if excluded is None or isinstance(excluded, str):
        return [excluded] if excluded else []
    return [rf"(?:.*\.)?{re.escape(name)}" for name in excluded]
