"""Data sets that a data loader can send to its workers, whichever way the workers are started.

Workers that are spawned receive the data set by pickle, which refuses the functions that TRL, or a user's lambda, put
into a stream. dill, with which `datasets` sends functions to its own processes, takes them.
"""

from typing import Any

import dill
from datasets import Dataset, IterableDataset
from torch import Tensor

from unsloth_fast.data.types import Value


class _PickledByDill:
    """A data set that is pickled as its base class, by dill; in the process that reads it, it is of the base class."""

    def __reduce__(self) -> tuple[Any, ...]:
        base = type(self).__mro__[2]
        # A stream's epoch is a tensor in shared memory. Pickled as such it stays shared with a worker that persists.
        shared = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        own = {name: value for name, value in vars(self).items() if name not in shared}
        return _restored, (base, dill.dumps(own, recurse=True), shared)


class _Stream(_PickledByDill, IterableDataset):
    pass


class _Transformed(_PickledByDill, Dataset):
    pass


def picklable(dataset: Value) -> Value:
    """The data set, which pickle accepts even where its functions are local ones.

    Args:
        dataset: a stream, or a map-style data set with a transform; any other is returned as it is.
    """
    if isinstance(dataset, _PickledByDill):
        return dataset
    if isinstance(dataset, IterableDataset):
        return _restored(_Stream, None, vars(dataset))
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return _restored(_Transformed, None, vars(dataset))
    return dataset


def _restored(kind: Any, pickled: bytes | None, attributes: dict[str, Any]) -> Any:
    """A data set of this class with these attributes, and those that dill pickled."""
    dataset = kind.__new__(kind)
    state = attributes | (dill.loads(pickled) if pickled else {})
    if hasattr(dataset, "__setstate__"):
        dataset.__setstate__(state)
    else:
        vars(dataset).update(state)
    return dataset
