"""`train_on_responses_only` on whole trainers: the same losses and weights as plain TRL with masks made by hand."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.trainer.runs import BATCHINGS, SGD, TRL_DROPS_LABELS, arguments, textbook
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments
from unsloth_fast.chat_templates import train_on_responses_only
from unsloth_fast.chat_templates.responses import has_target
from unsloth_fast.data import responses

pytestmark = pytest.mark.filterwarnings("ignore")


def words() -> PreTrainedTokenizerFast:
    """`tiny.tokenizer`, and a template in which w1 begins what a user says and w2 a response."""
    made = tiny.tokenizer()
    made.chat_template = (
        "{% for message in messages %}{{ 'w1 ' if message['role'] == 'user' else 'w2 ' }}"
        "{{ message['content'] }}{{ ' <eos> ' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
    )
    return made


PARTS = ("w1", "w2")


def texts(count: int = 18) -> list[str]:
    """Written conversations of one to three turns; the contents have none of the parts' words."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        turns = []
        for _ in range(1 + index % 3):
            for part in PARTS:
                size = int(torch.randint(1, 4, (1,), generator=generator))
                inside = [f"w{i}" for i in torch.randint(3, 45, (size,), generator=generator).tolist()]
                turns += [part, *inside]
            turns.append("<eos>")
        found.append(" ".join(turns))
    return found


def masked_by_hand(ids: list[int]) -> list[int]:
    """w1 and w2 are the tokens 4 and 5."""
    labels, trains = [], False
    for token in ids:
        labels.append(token if trains and token not in (4, 5) else -100)
        trains = {4: False, 5: True}.get(token, trains)
    return labels


def tokenized(rows: list[str]) -> Dataset:
    ids = [words()(row)["input_ids"] for row in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": [masked_by_hand(row) for row in ids]})


def trainer_of(kind: type, folder: Path, data: Any, **options: Any) -> Any:
    settings = options.pop("settings", {})
    args = arguments(folder, SFTConfig if kind is SFTTrainer else UnslothTrainingArguments, **settings)
    return kind(
        model=options.pop("model", None) or tiny.model(dtype=torch.float64),
        args=args,
        train_dataset=data,
        processing_class=words(),
        **options,
    )


def documents(dataset: Any) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens and labels of each document, packed or not."""
    for row in dataset:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            yield row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("given", [True, False])
def test_the_data_sets_of_a_trainer(given: bool, batching: str, streamed: bool, tmp_path: Path) -> None:
    if TRL_DROPS_LABELS and streamed and batching == "packed":
        pytest.skip("the installed trl packs the tokens of a stream without their labels")
    data = Dataset.from_dict({"text": texts()})
    other = Dataset.from_dict({"text": texts(5)})
    if streamed:
        data = data.to_iterable_dataset()
    settings = BATCHINGS[batching] | {"max_length": 32}
    evaluated = {"one": other, "two": other.to_iterable_dataset() if streamed else other}
    trainer = trainer_of(UnslothTrainer, tmp_path, data, eval_dataset=evaluated, settings=settings)
    collator = trainer.data_collator
    assert train_on_responses_only(trainer, *(PARTS if given else ())) is trainer
    assert trainer.data_collator is collator
    sets = [(trainer.train_dataset, 18), (trainer.eval_dataset["one"], 5), (trainer.eval_dataset["two"], 5)]
    for dataset, count in sets:
        found = list(documents(dataset))
        assert len(found) == count
        for ids, labels in found:
            assert labels == masked_by_hand(ids)
    assert isinstance(trainer.train_dataset, IterableDataset) == streamed


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("streamed", [False, True])
def test_losses_and_weights_equal_those_of_trl_with_masks_by_hand(
    batching: str, streamed: bool, tmp_path: Path
) -> None:
    """Six steps in float64 agree with TRL's trainer, a textbook loss, and labels masked by hand."""
    if TRL_DROPS_LABELS and (streamed or batching == "packed"):
        pytest.skip("the installed trl packs tokens without their labels, and makes those of a stream in its collator")
    plain = SGD | {"max_steps": 6, "learning_rate": 0.1}
    if batching == "packed":
        plain |= {"packing": True, "max_length": 32}
    given, masked = Dataset.from_dict({"text": texts()}), tokenized(texts())
    if streamed:
        given, masked = given.to_iterable_dataset(), masked.to_iterable_dataset()
    with tiny.KeepFloat64():
        theirs = trainer_of(SFTTrainer, tmp_path / "1", masked, settings=plain, compute_loss_func=textbook)
        theirs.train()
        ours = trainer_of(UnslothTrainer, tmp_path / "2", given, settings=plain | BATCHINGS[batching])
        train_on_responses_only(ours, *PARTS).train()
    losses, expected = ([entry["loss"] for entry in one.state.log_history[:-1]] for one in (ours, theirs))
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=1e-9)
    weights = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-7, atol=1e-9)


def test_trls_own_trainer(tmp_path: Path) -> None:
    trainer = trainer_of(SFTTrainer, tmp_path, Dataset.from_dict({"text": texts()}))
    train_on_responses_only(trainer)
    for ids, labels in documents(trainer.train_dataset):
        assert labels == masked_by_hand(ids)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["labels"].tolist()[0] == trainer.train_dataset[0]["labels"]


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_without_a_response(streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are dropped and counted in the log, and so are those whose response max_length cut off."""
    rows: Any = Dataset.from_dict({"text": [*texts(3), "w1 w7 w8", "w1 " + "w9 " * 40 + "w2 w3"]})
    trainer = trainer_of(
        UnslothTrainer, tmp_path, rows.to_iterable_dataset() if streamed else rows, settings={"max_length": 32}
    )
    train_on_responses_only(trainer)
    assert len(list(trainer.train_dataset)) == 3
    if not streamed:
        message = "train_dataset: rows without a response after response_part='w2 ' are dropped: 2 of 5; max_length"
        assert message in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
def test_no_response_at_all(streamed: bool, tmp_path: Path) -> None:
    rows: Any = Dataset.from_dict({"text": texts(4)})
    trainer = trainer_of(UnslothTrainer, tmp_path, rows.to_iterable_dataset() if streamed else rows)
    message = "train_dataset: got no response after response_part='<unk> w2' in 4 rows, the first of which begins 'w1"
    with pytest.raises(ValueError, match=message):
        train_on_responses_only(trainer, "w1", "<unk> w2")


@pytest.mark.parametrize("streamed", [False, True])
def test_an_instruction_part_that_does_not_occur(
    streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: Any = Dataset.from_dict({"text": texts(4)})
    trainer = trainer_of(UnslothTrainer, tmp_path, rows.to_iterable_dataset() if streamed else rows)
    train_on_responses_only(trainer, "<unk> w1", "w2")
    assert "train_dataset: instruction_part='<unk> w1' does not occur: each response extends to the next" in caplog.text


def test_a_data_set_that_is_not_tokenized() -> None:
    class Trainer:
        processing_class = words()
        train_dataset = Dataset.from_dict({"text": ["w1"]})
        eval_dataset = None

    message = "train_dataset: got only the columns 'text'; allowed: rows of tokens in 'input_ids'"
    with pytest.raises(ValueError, match=message):
        train_on_responses_only(Trainer())


def test_a_collator_that_keeps_labels(tmp_path: Path) -> None:
    collator = DataCollatorForSeq2Seq(words())
    trainer = trainer_of(UnslothTrainer, tmp_path, Dataset.from_dict({"text": texts()}), data_collator=collator)
    train_on_responses_only(trainer)
    assert trainer.data_collator is collator


def test_a_collator_that_makes_labels_of_all_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collator = DataCollatorForLanguageModeling(words(), mlm=False)
    trainer = trainer_of(UnslothTrainer, tmp_path, Dataset.from_dict({"text": texts()}), data_collator=collator)
    train_on_responses_only(trainer)
    assert "DataCollatorForLanguageModeling makes labels of all tokens and is replaced" in caplog.text
    rows = [trainer.train_dataset[index] for index in range(2)]
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    labels = trainer.data_collator(rows)["labels"]
    assert (labels != -100).sum() == sum(label != -100 for row in rows for label in row["labels"])


def test_another_collator_that_does(tmp_path: Path) -> None:
    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([row["input_ids"][:3] for row in rows])
        return {"input_ids": ids, "labels": ids.expand(20, -1)}

    trainer = trainer_of(UnslothTrainer, tmp_path, Dataset.from_dict({"text": texts()}), data_collator=collator)
    with pytest.raises(
        ValueError, match="data_collator: got function, which makes labels of other tokens than the row"
    ):
        train_on_responses_only(trainer)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_documents_that_are_cut(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are those of documents masked by hand before packing: with w0 as begin token, and shuffled."""
    monkeypatch.setattr(responses, "COPIED_TOKENS", 50)
    rows, settings = [f"w0 {text}" for text in texts()], {"packing_strategy": strategy, "max_length": 16}
    ours, by_hand = (
        trainer_of(UnslothTrainer, tmp_path, data, settings=settings | {"packing": True}, eval_dataset=data)
        for data in (Dataset.from_dict({"text": rows}), tokenized(rows))
    )
    ours.train_dataset = ours.train_dataset.shuffle(seed=1)
    train_on_responses_only(ours)
    for name in ("train_dataset", "eval_dataset"):
        found, wanted = (
            sorted((row["input_ids"], row["labels"]) for row in getattr(trainer, name) if has_target(row))
            for trainer in (ours, by_hand)
        )
        assert found == wanted
    assert ours.train().global_step == 6


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_documents_that_trl_cuts(strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where they begin is not known in "wrapped"; a warning says that "bfd_split" loses targets."""
    if TRL_DROPS_LABELS and strategy == "bfd_split":
        pytest.skip("the installed trl packs the tokens of a stream without their labels")
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 16}
    data = Dataset.from_dict({"text": texts()}).to_iterable_dataset()
    trainer = trainer_of(UnslothTrainer, tmp_path, data, settings=settings)
    if strategy == "wrapped":
        with pytest.raises(ValueError, match="packing_strategy: got 'wrapped', and train_dataset does not show where"):
            train_on_responses_only(trainer)
        return
    with pytest.raises(ValueError, match="last_response_only: got True, and packing_strategy='bfd_split' cut the doc"):
        train_on_responses_only(trainer, last_response_only=True)
    train_on_responses_only(trainer)
    assert "packing_strategy: got 'bfd_split', which cuts documents" in caplog.text
    for ids, labels in documents(trainer.train_dataset):
        assert labels == masked_by_hand(ids)


def test_several_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    trainer = trainer_of(UnslothTrainer, tmp_path, Dataset.from_dict({"text": texts()}))
    train_on_responses_only(trainer, *PARTS, num_proc=2)
    for ids, labels in documents(trainer.train_dataset):
        assert labels == masked_by_hand(ids)
