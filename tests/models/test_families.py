"""The table of families in docs/models.md: what it says of each is what the code does with a tiny model.

`python -m tests.models.test_families` prints the table.
"""

import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from conformance.models.building import Subject, architectures, documents_of, image_text_architectures
from conformance.models.task import quiet
from conformance.models.trial import ModelTrial
from unsloth_fast import backends
from unsloth_fast.models import place, placement
from unsloth_fast.models.head import plain_head
from unsloth_fast.models.logits import logit_options

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
RELEASE = "5.24."  # of transformers, whose classes the table names
# The families that people fine-tune, in the order of how many do, with their architectures.
ROWS: dict[str, str] = {
    "Qwen2.5, R1 distills": "qwen2",
    "Llama 3": "llama",
    "Qwen3": "qwen3",
    "Qwen3.5, 3.6, 3.8": "qwen3_5",
    "Gemma 4": "gemma4",
    "Gemma 3": "gemma3_text",
    "Gemma 2": "gemma2",
    "gpt-oss": "gpt_oss",
    "Mistral, Devstral, Magistral": "mistral",
    "Qwen3-MoE": "qwen3_moe",
    "Qwen3.5-MoE, 3.6-MoE": "qwen3_5_moe",
    "Qwen3-Next": "qwen3_next",
    "Ministral 3": "ministral3",
    "Phi-3, 3.5, 4": "phi3",
    "GLM-4": "glm4",
    "GLM-4.5, 4.6": "glm4_moe",
    "GLM-4.7-Flash": "glm4_moe_lite",
    "GLM-5": "glm_moe_dsa",
    "DeepSeek V3": "deepseek_v3",
    "Kimi K2.5": "kimi_k25",
    "DeepSeek V3.2": "deepseek_v32",
    "DeepSeek V4": "deepseek_v4",
    "Granite 4": "granitemoehybrid",
    "LFM2, 2.5": "lfm2",
    "LFM2-MoE": "lfm2_moe",
    "LFM3": "lfm3",
    "Nemotron-H, Nemotron 3": "nemotron_h",
    "Falcon-H1": "falcon_h1",
    "Muse Glimmer": "muse_glimmer",
    "OLMo 2": "olmo2",
    "OLMo 3": "olmo3",
    "SmolLM3": "smollm3",
    "Seed-OSS": "seed_oss",
    "HunYuan": "hunyuan_v1_dense",
    "Qwen2.5-VL": "qwen2_5_vl",
    "Qwen3-VL": "qwen3_vl",
    "Qwen3-VL-MoE": "qwen3_vl_moe",
    "Llama 4": "llama4_text",
    "Mixtral": "mixtral",
    "Mistral 4": "mistral4",
    "Mistral Large 4": "mistral_large4",
    "ERNIE 4.5": "ernie4_5",
    "ERNIE 4.5 MoE": "ernie4_5_moe",
    "Cohere 2": "cohere2",
    "MiniMax M2": "minimax_m2",
}
COLUMNS: dict[str, tuple[str, ...]] = {  # of the table, with the operations that each names
    "norm": ("rms_norm", "layer_norm", "gated_rms_norm"),
    "rotary": ("rope", "qk_norm_rope"),
    "MLP": ("swiglu", "fused_swiglu", "geglu", "relu_squared"),
    "attention": ("packed_attention",),
    "experts": ("moe_mlp",),
    "mixer": ("causal_conv", "gated_delta_rule", "mamba2_scan"),
}
HEAD = "| family | `--config` | " + " | ".join(COLUMNS) + " | head | left as it is, or refused |"


@cache
def row(family: str) -> str:
    """The row of a family."""
    name = ROWS[family]
    trial = ModelTrial(Subject.named(name), "reference", torch.float32, "cpu")
    with quiet():
        model = trial.untouched()
        placed = place(model, backends.resolve("reference"))
        left: Iterable[str] = getattr(model, placement._LOGGED)[1]
        refused = trial.obstacles
        whole = logits_are_needed(model, trial)
    known = {operation for operations in COLUMNS.values() for operation in operations}
    assert set(placed) <= known, f"a column for {set(placed) - known}"
    cells = [", ".join(f"`{operation}`" for operation in each if operation in placed) for each in COLUMNS.values()]
    notes = [shown(entry) for entry in sorted(left) if not (refused and entry.startswith("packed "))]
    notes += [f"not packed: {why}" for why in refused]
    head = "whole logits" if whole else "`linear_cross_entropy`"
    return f"| {family} | `{name}` | " + " | ".join([*cells, head, "; ".join(notes)]) + " |"


def shown(entry: str) -> str:
    """A class and its reason, without the number that a check measured."""
    return re.sub(r" by \S+ at least", "", re.sub(r"^(packed )?(\w+)", r"\1`\2`", entry))


def logits_are_needed(model: Any, trial: ModelTrial) -> bool:
    """Whether the loss makes the whole logits."""
    batch = documents_of(trial.subject, "cpu").padded()
    return plain_head(model) is None or logit_options(model, model.forward, batch) is None


@pytest.mark.parametrize("family", ROWS)
def test_a_row_says_what_the_code_does(family: str) -> None:
    if not version("transformers").startswith(RELEASE):
        pytest.skip(f"the table is of transformers {RELEASE}*")
    assert row(family) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_table_has_no_other_row() -> None:
    """Each family has one, in this order, and its name is one that `--config` takes."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEAD) + 2
    rows = lines[start : lines.index("", start)]
    assert [line.split(" | ")[:2] for line in rows] == [[f"| {one}", f"`{name}`"] for one, name in ROWS.items()]
    named = {name for name in ROWS.values() if name in CONFIG_MAPPING}
    assert named <= {*architectures(), *image_text_architectures()}


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in (HEAD, "|---" * (len(COLUMNS) + 4) + "|", *map(row, ROWS)))
