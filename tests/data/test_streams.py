"""Data sets that are sent to spawned workers: pickled with any functions in them, and with the same rows."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.data.samples import stream, text, tokens, trainer_on
from unsloth_fast.data.streams import picklable


def lambdas(data: Dataset) -> IterableDataset:
    """A shuffled stream with functions that pickle refuses."""
    factor = 2
    rows = data.to_iterable_dataset(num_shards=2).map(lambda row: {"twice": [factor * one for one in row["input_ids"]]})
    return rows.filter(lambda row: len(row["twice"]) > 1).shuffle(seed=0, buffer_size=2)


@pytest.mark.parametrize(
    "data",
    [
        lambdas(tokens(3, 1, 4, 2)),
        stream(tokens(3, 4)),
        tokens(3, 4).with_transform(lambda rows: {"a": rows["labels"]}),
    ],
    ids=["lambdas", "a generator", "a transform"],
)
def test_local_functions_are_pickled(data: Any) -> None:
    """The copy is an ordinary data set, and the original one does not change."""
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(data)
    sent = picklable(data)
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is type(data) and isinstance(sent, type(data))
    assert list(received) == list(sent) == list(data)
    assert picklable(sent) is sent


def test_the_epoch_of_a_stream_is_not_copied() -> None:
    """The epoch is a tensor in shared memory, by which the rows of a persistent worker are shuffled anew."""
    sent = picklable(lambdas(tokens(3, 4)))
    restore, (kind, data, shared) = sent.__reduce__()
    assert [type(value) for value in shared.values()] == [torch.Tensor]
    received = restore(kind, data, shared)
    sent.set_epoch(3)
    assert received.epoch == 3 and list(received) == list(sent)


def test_a_data_set_that_pickle_accepts_stays_as_it_is() -> None:
    for data in (tokens(3), {"a": 1}, None):
        assert picklable(data) is data


@pytest.mark.parametrize("options", [{"padding_free": False}, {}, {"packing": True, "max_length": 16}])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_trainer_can_send_its_data_to_workers(tmp_path: Path, options: dict[str, Any], streamed: bool) -> None:
    """The data set and the collator can be pickled, those of training and those of evaluations."""
    data = text("w1 w2 w3", "w4 w5")
    data = stream(data) if streamed else data
    trainer = trainer_on(tmp_path, data, eval_dataset={"a": data}, **options)
    for rows in (trainer.train_dataset, trainer.eval_dataset["a"]):
        assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    loaders = (trainer.get_train_dataloader(), trainer.get_eval_dataloader("a"))
    for rows, loader in zip((trainer.train_dataset, trainer.eval_dataset["a"]), loaders, strict=True):
        sent = pickle.loads(pickle.dumps(loader.collate_fn))
        batches = [collate([dict(row) for row in rows]) for collate in (loader.collate_fn, sent)]
        assert batches[0].keys() == batches[1].keys()
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in ("input_ids", "labels"))
