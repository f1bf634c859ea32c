"""Which checkpoint a run goes on from."""

import json
import logging
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of the highest step that was written to its end; None if there is none.

    A checkpoint's trainer_state.json is written last, so a run that was killed while saving leaves none, or half a one.
    """
    found: dict[int, Path] = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            found[json.loads((path / "trainer_state.json").read_text())["global_step"]] = path
        except (OSError, ValueError):
            logger.warning("checkpoint %s is left out: it was not written to its end", path)
    return str(found[max(found)]) if found else None
