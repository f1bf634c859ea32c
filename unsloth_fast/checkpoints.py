"""Which checkpoint a run goes on from."""

import json
import logging
import math
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of the highest step that was written to its end; None if there is none.

    A checkpoint's trainer_state.json is written last, so a run that was killed while saving leaves none, or half a one.
    """
    found: dict[int, Path] = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = _step(path)
        if step is None:
            logger.warning("checkpoint %s is left out: it was not written to its end", path)
        else:
            found[step] = path
    return str(found[max(found)]) if found else None


def checked_checkpoint(asked: str | Path | bool | None, folder: str | Path) -> str | None:
    """The checkpoint to go on from; None to start anew.

    Args:
        asked: the path of one, True for the last one that was written to its end, False or None for none.
        folder: where the run's checkpoints are.

    Raises:
        ValueError: there is none, or only half a one.
    """
    if not asked:
        return None
    checkpoint = last_checkpoint(folder) if asked is True else str(asked)
    if checkpoint is None:
        raise ValueError(f"resume_from_checkpoint: got True; allowed: False, as {str(folder)!r} holds no checkpoint")
    if _step(Path(checkpoint)) is None:
        raise ValueError(
            f"resume_from_checkpoint: got {checkpoint!r}; allowed: a folder with a trainer_state.json, which is "
            "written last, or True for the last checkpoint that was written to its end"
        )
    return checkpoint


def passes_of_stream(checkpoint: str | Path) -> tuple[int, int]:
    """How often a run had read a stream to its end, and its steps since; a pass counts as max_steps in `epoch`."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    passes = max(math.ceil(state["epoch"]) - 1, 0)
    return passes, round((state["epoch"] - passes) * state["max_steps"])


def _step(checkpoint: Path) -> int | None:
    """The step of a checkpoint; None where it was not written to its end."""
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
