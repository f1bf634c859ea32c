"""Where are the parts of a model, on the hub or on disk? Of an adapter those of its base model are elsewhere."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

# Keywords for where files come from; the config, the model and the tokenizer all take them.
HUB_KEYWORDS = ("revision", "cache_dir", "local_files_only", "force_download", "subfolder")


@dataclass(frozen=True)
class Source:
    """Where the parts of a model are, on the hub or on disk.

    Attributes:
        name: of the model or of an adapter, as the user gave it.
        is_adapter: whether the name is that of an adapter.
        base: the name of the model below the adapter; `name` without an adapter.
        hub: keywords for where the files of `name` come from.
    """

    name: str
    is_adapter: bool
    base: str
    hub: dict[str, Any]

    @property
    def base_hub(self) -> dict[str, Any]:
        """Keywords for the files of the base model: an adapter's revision and subfolder are its own."""
        return _without(self.hub, "revision", "subfolder") if self.is_adapter else self.hub

    @property
    def adapter_hub(self) -> dict[str, Any]:
        """Keywords for the files of the adapter, which holds no code."""
        return _without(self.hub, "trust_remote_code")

    def find_tokenizer(self) -> str:
        """The name to load the tokenizer by: an adapter's folder need not have one."""
        file = "tokenizer_config.json"
        found = cached_file(self.name, file, _raise_exceptions_for_missing_entries=False, **self.adapter_hub)
        return self.name if found else self.base


def find_source(name: str, hub: Mapping[str, object]) -> Source:
    """Find out whether the name is that of an adapter, and of which model.

    Raises:
        ValueError: no name, or an adapter that does not name its base model.
        FileNotFoundError: a folder that does not exist, or that holds no model.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"model_name: got {name!r}; allowed: a name on the hub, or the path of a folder")
    if "subfolder" not in hub:
        _check_folder(str(name))
    keywords: dict[str, Any] = dict(hub)
    adapter_keywords = _without(keywords, "trust_remote_code", "force_download")
    if find_adapter_config_file(name, **adapter_keywords) is None:
        return Source(name, False, name, keywords)
    base = PeftConfig.from_pretrained(name, **adapter_keywords).base_model_name_or_path
    if not base:
        raise ValueError(f"model_name: got {name!r}, an adapter without base_model_name_or_path; allowed: one with it")
    return Source(name, True, base, keywords)


def _check_folder(name: str) -> None:
    """Refuse a missing folder, which the hub would take for a malformed name, and one that only holds checkpoints."""
    folder = Path(name)
    is_path = folder.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1
    if is_path and not folder.exists():
        raise FileNotFoundError(
            f"model_name: got {name!r}, which does not exist (from {Path.cwd()}); allowed: the folder of a model or an "
            "adapter, or a name on the hub"
        )
    if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
        inside = sorted(path.name for path in folder.glob("checkpoint-*")) or "no checkpoint either"
        raise FileNotFoundError(
            f"model_name: got {name!r}, a folder without config.json or adapter_config.json; allowed: the folder of a "
            f"model or an adapter; inside it: {inside}"
        )


def _without(keywords: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name not in names}
