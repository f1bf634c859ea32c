"""Which model is judged, and on which documents: a tiny random one of any architecture, or one that is loaded.

subject = Subject.named("llama")                a tiny random model of an architecture
subject = Subject("folder/or/name")             a model in a folder or on the hub
model = subject.model(torch.float32, "cpu")     untouched, in training mode; the same weights each time
documents = documents_of(subject, "cpu")        documents.padded(), documents.packed(), documents.alone()
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn.functional import pad
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from conformance.models.shrinking import tiny_config
from unsloth_fast.models.loading import model_class

# Of the documents that are drawn: beyond a tiny model's window, within it, and without a target. With two of them, a
# model that sees the first bound alone would pass.
LENGTHS = (9, 6, 1)
IGNORED = 0.3  # the share of tokens that are no targets
NOISE = 0.1  # on every weight of a random model, so that no norm has ones, no attention is even and no bias is 0
DROPOUT = 0.5
_SPECIAL = 3  # tokens of a tiny vocabulary that are never drawn
# What code of transformers raises for a configuration that it cannot use, or for a package that is missing.
_FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError),
    ValueError,
    StrictDataclassError,
)


class NotBuilt(Exception):
    """A model that cannot be built here; the message states why."""


@dataclass(frozen=True)
class Subject:
    """The model under judgement.

    Attributes:
        name: of an architecture, as transformers' model_type, or the path or name of a model.
        random: whether it is a tiny random model of the architecture.
        fields: of the configuration of a random model, beside those that make it tiny: pairs of name and value.
        dropout: the one field with a dropout that has one, of DROPOUT; "" for none.
    """

    name: str
    random: bool = False
    fields: tuple[tuple[str, Any], ...] = ()
    dropout: str = ""

    @classmethod
    def named(cls, architecture: str, **fields: Any) -> "Subject":
        """A tiny random model of an architecture."""
        return cls(architecture, True, tuple(fields.items()))

    def config(self) -> PreTrainedConfig:
        """Its configuration, without dropout but that of `dropout`; raises NotBuilt."""
        if not self.random:
            return _without_noise(AutoConfig.from_pretrained(self.name), self.dropout)
        if self.name not in CONFIG_MAPPING:
            raise NotBuilt(f"transformers has no architecture {self.name}")
        try:
            config = tiny_config(self.name, **dict(self.fields))
            model_class(config)  # raises ValueError for one that the package does not train
            return _without_noise(config, self.dropout)
        except _FAILURES as failure:
            raise NotBuilt(f"no configuration of a tiny model: {_in_one_line(failure)}") from failure

    def model(self, dtype: torch.dtype, device: str, *, experts: str | None = None) -> Any:
        """The untouched model in training mode, the same each time.

        Args:
            dtype: of its weights: one with float32 or 16 bits. `.double()` of it has the same weights in float64.
            device: where it computes.
            experts: transformers' experts_implementation; None for the default, of which some take no float64.
        """
        if not self.random:
            return self._loaded(dtype, device, experts)
        config = self.config()
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                model = _from_config(config, torch.float32, experts)
                with torch.no_grad():
                    for tensor in [*model.parameters(), *_stored_buffers(model)]:
                        tensor += NOISE * torch.randn_like(tensor)
                if dtype != torch.float32:  # buffers such as RoPE's frequencies are then made as when loading
                    weights, model = model.state_dict(), _from_config(config, dtype, experts)
                    model.load_state_dict(weights)
        except _FAILURES as failure:
            raise NotBuilt(f"no tiny model: {_in_one_line(failure)}") from failure
        return model.to(device).train()

    def _loaded(self, dtype: torch.dtype, device: str, experts: str | None) -> Any:
        config, options = self.config(), {} if experts is None else {"experts_implementation": experts}
        try:
            model = model_class(config).from_pretrained(self.name, config=config, dtype=dtype, **options)
        except _FAILURES as failure:
            raise NotBuilt(f"{self.name} is not loaded: {_in_one_line(failure)}") from failure
        return model.to(device).train()


def architectures() -> list[str]:
    """The names of transformers' architectures that have a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_text_architectures() -> list[str]:
    """The names of the others that have an image-text model, whose text part is judged."""
    return [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in architectures()]


@dataclass(frozen=True)
class Documents:
    """Documents, and the batches that are made of them.

    Attributes:
        tokens: of each document, [S], int64.
        labels: of each, [S]; -100 where a token is no target.
    """

    tokens: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]

    @cached_property
    def lengths(self) -> list[int]:
        """The tokens of each document."""
        return [len(tokens) for tokens in self.tokens]

    @cached_property
    def targets(self) -> int:
        """All tokens that are predicted; the first of a document is not."""
        return sum(int((labels[1:] != -100).sum()) for labels in self.labels)

    def alone(self) -> list[dict[str, Any]]:
        """A batch of one row for each document."""
        return [
            {"input_ids": tokens[None], "labels": labels[None]}
            for tokens, labels in zip(self.tokens, self.labels, strict=True)
        ]

    def padded(self, *, left: bool = False) -> dict[str, Any]:
        """One batch with a row for each document, [B, S]; padding is the token 0, at the end or at the beginning.

        The first token of a document, which padding may precede, is no target.
        """

        def rows(of: Sequence[Tensor], value: int) -> Tensor:
            widths = [max(self.lengths) - len(row) for row in of]
            return torch.stack(
                [pad(row, (w, 0) if left else (0, w), value=value) for row, w in zip(of, widths, strict=True)]
            )

        mask = rows([torch.ones_like(tokens) for tokens in self.tokens], 0)
        return {"input_ids": rows(self.tokens, 0), "attention_mask": mask, "labels": rows(self._following, -100)}

    @property
    def _following(self) -> list[Tensor]:
        """The labels of tokens that another one of their document precedes."""
        return [torch.cat((torch.full_like(labels[:1], -100), labels[1:])) for labels in self.labels]

    def packed(self) -> dict[str, Any]:
        """One batch of one row without padding, [1, T], as the padding-free collators of TRL and of unsloth_fast."""
        device = self.tokens[0].device
        bounds = torch.tensor([0, *self.lengths], device=device).cumsum(0).to(torch.int32)
        return {
            "input_ids": torch.cat(self.tokens)[None],
            "labels": torch.cat(self._following)[None],
            "position_ids": torch.cat([torch.arange(length, device=device) for length in self.lengths])[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(self.lengths),
            "max_length_k": max(self.lengths),
        }

    def turned(self) -> "Documents":
        """In the opposite order."""
        return Documents(self.tokens[::-1], self.labels[::-1])

    def with_others(self, kept: int, seed: int = 0) -> "Documents":
        """Of the same lengths, with other tokens in all documents but one: those of all documents, drawn anew."""
        known, generator = torch.cat(self.tokens), torch.Generator().manual_seed(seed)
        drawn = (torch.randint(len(known), (length,), generator=generator) for length in self.lengths)
        others = (known[indices.to(known.device)] for indices in drawn)
        tokens = tuple(own if i == kept else o for i, (own, o) in enumerate(zip(self.tokens, others, strict=True)))
        return replace(self, tokens=tokens)


def lengths_of(count: int | None) -> Sequence[int]:
    """The lengths of so many documents: LENGTHS again and again; None for these alone."""
    return LENGTHS if count is None else [LENGTHS[place % len(LENGTHS)] for place in range(count)]


def documents_of(
    subject: Subject, device: str, data: Path | None = None, *, lengths: Sequence[int] = LENGTHS
) -> Documents:
    """The documents that a model is judged on.

    Args:
        subject: the model.
        device: of the tensors.
        data: a text file, one document per line, or a .jsonl file with a field "text"; None for random tokens.
        lengths: of the documents with random tokens; those of a file are cut to the longest of them.
    """
    if data is not None:
        tokens = _read(subject, data, len(lengths), max(lengths))
    else:
        count = getattr(subject.config().get_text_config(), "vocab_size", None)
        if count is None:
            raise NotBuilt("its configuration has no vocab_size: it does not generate text from text")
        generator = torch.Generator().manual_seed(0)
        tokens = [torch.randint(_SPECIAL, count, (n,), generator=generator) for n in lengths]
    generator = torch.Generator().manual_seed(1)
    labels = [row.masked_fill(torch.rand(len(row), generator=generator) < IGNORED, -100) for row in tokens]
    return Documents(tuple(row.to(device) for row in tokens), tuple(row.to(device) for row in labels))


def _without_noise(config: PreTrainedConfig, dropout: str) -> PreTrainedConfig:
    """The configuration without dropout, but that of one field, and without noise on routers: two runs are the same."""
    for inner in _parts(config):
        for name, value in vars(inner).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(inner, name, DROPOUT if name == dropout else 0.0)
    return config


def dropouts_of(config: PreTrainedConfig) -> list[str]:
    """The fields of a configuration, and of those inside it, that are a dropout."""
    fields = (name for inner in _parts(config) for name, value in vars(inner).items() if isinstance(value, float))
    return sorted({name for name in fields if "drop" in name})


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    inner = (getattr(config, name, None) for name in config.sub_configs)
    return [config, *(part for part in inner if isinstance(part, PreTrainedConfig))]


def _read(subject: Subject, data: Path, count: int, longest: int) -> list[Tensor]:
    """The first documents of a file that have two tokens or more, cut to the longest length; raises NotBuilt."""
    if subject.random:
        raise NotBuilt(f"data: got {data}; allowed: none, as a random model has no tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(subject.name)
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = [json.loads(line)["text"] for line in lines] if data.suffix == ".jsonl" else lines
    rows = (torch.tensor(tokenizer(text)["input_ids"][:longest]) for text in texts)
    found = list(islice((row for row in rows if len(row) > 1), count))
    if len(found) < 2:
        raise NotBuilt(f"data: got {data} with {len(found)} documents of two tokens or more; allowed: 2 or more")
    return found


def _from_config(config: PreTrainedConfig, dtype: torch.dtype, experts: str | None) -> Any:
    options = {} if experts is None else {"experts_implementation": experts}
    return model_class(config).from_config(copy.deepcopy(config), dtype=dtype, **options)


def _stored_buffers(model: Any) -> list[Tensor]:
    """The buffers that are saved and no integers, such as the biases of a router: weights that have no gradient."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = ((name, tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters)
    return [tensor for _, tensor in stored if tensor.is_floating_point()]


def _in_one_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
