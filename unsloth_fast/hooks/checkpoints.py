"""The checkpoint from which a run resumes."""

import json
import logging
import math
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """The complete checkpoint of the highest step; None if there is none.

    A checkpoint's trainer_state.json is written last. A run that is killed while saving leaves none, or part of one.
    """
    found: dict[int, Path] = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = _step(path)
        if step is None:
            logger.warning("checkpoint %s is ignored: it is incomplete", path)
        else:
            found[step] = path
    return str(found[max(found)]) if found else None


def resolve_checkpoint(asked: str | Path | bool | None, folder: str | Path) -> str | None:
    """The path of the checkpoint to resume from; None to start from the beginning.

    Args:
        asked: a path, True for the last complete checkpoint, False or None to start from the beginning.
        folder: the folder with the run's checkpoints.

    Raises:
        ValueError: there is no checkpoint, or it is incomplete.
    """
    if not asked:
        return None
    checkpoint = last_checkpoint(folder) if asked is True else str(asked)
    if checkpoint is None:
        raise ValueError(f"resume_from_checkpoint: got True; allowed: False, as {str(folder)!r} holds no checkpoint")
    if _step(Path(checkpoint)) is None:
        raise ValueError(
            f"resume_from_checkpoint: got {checkpoint!r}; allowed: a folder with a complete trainer_state.json, which "
            "is written last, or True for the last complete checkpoint"
        )
    return checkpoint


def passes_of_stream(checkpoint: str | Path) -> tuple[int, int]:
    """How many times a run had read a stream to its end, and its steps since then.

    In the state's `epoch`, a pass over a stream counts as max_steps steps.
    """
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    passes = max(math.ceil(state["epoch"]) - 1, 0)
    return passes, round((state["epoch"] - passes) * state["max_steps"])


def _step(checkpoint: Path) -> int | None:
    """The step of a checkpoint; None if it is incomplete."""
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
