"""Are the layers of a training recorded as CUDA graphs, and if not, why?"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unsloth_fast.hooks.module_lists import UNSHARDED
from unsloth_fast.models import recording
from unsloth_fast.models.graphs import Recordings, recorded
from unsloth_fast.models.interface import stacks_of
from unsloth_fast.models.packed import documents_of

logger = logging.getLogger(__name__)


@contextmanager
def recorded_layers(trainer: Any) -> Iterator[Recordings]:
    """Within the context the layers are recorded, as far as the arguments ask for it and nothing forbids it.

    The log says what forbids it, as a warning if cuda_graphs=True asked for it.

    Args:
        trainer: an `UnslothTrainer`, or one of TRL's with `UnslothTrainingArguments`.

    Yields:
        The recordings, with which a step that runs out of memory is repeated; none where other processes would wait.

    Raises:
        ValueError: it was asked to, and also to verify operations or to compile the model, which needs their Python.
    """
    args = trainer.args
    asked: bool | None = getattr(args, "cuda_graphs", None)
    others = [name for name in ("verify_every", "torch_compile") if getattr(args, name, None)]
    if asked and others:
        raise ValueError(f"cuda_graphs: got True with {others[0]}={getattr(args, others[0])}; allowed: False, or None")
    obstacle = f"{others[0]}={getattr(args, others[0])}" if others else _obstacle(trainer)
    level = logging.WARNING if asked else logging.INFO
    if asked is False or obstacle is not None:
        if asked is not False and args.process_index == 0:
            logger.log(level, "cuda_graphs=%s: the layers are launched one by one: %s", asked, obstacle)
        yield Recordings()
        return
    with recorded(trainer.model, level) as recordings:
        yield recordings if args.world_size == 1 else Recordings()


def _obstacle(trainer: Any) -> str | None:
    """Why nothing of a training can be recorded; None if it can."""
    args, distributed = trainer.args, trainer.accelerator.distributed_type
    if args.device.type != recording.DEVICE:
        return f"the device is {args.device.type!r}"
    if args.n_gpu > 1:
        return f"torch.nn.DataParallel copies the model to {args.n_gpu} GPUs in each step"
    if distributed not in UNSHARDED:
        return f"the training is distributed by {distributed.value}"
    if not any(map(documents_of, stacks_of(trainer.model))):
        return "the model's attention takes no packed batches"
    return None
