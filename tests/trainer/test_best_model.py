"""`metric_for_best_model`: TRL's accuracy and entropy, counted in evaluations that are asked for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig

from tests import tiny
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments, compat
from unsloth_fast.hooks.evaluation import Scores
from unsloth_fast.models.scores import CHUNK_ROWS, score

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHINGS: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False},
    "padding-free": {},
    "packed": {"packing": True, "max_length": 24},
}
BEST = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}


def texts(count: int = 7) -> Dataset:
    """Texts of 1 to 20 words."""
    return Dataset.from_dict({"text": tiny.texts(count, seed=1)})


def by_hand(model: Any, data: Dataset) -> dict[str, Any]:
    """The share of right predictions and their mean entropy, over all targets: by torch, one document at a time."""
    right, entropy, targets = 0, 0.0, 0
    for text in data["text"]:
        tokens = torch.tensor([tiny.tokenizer()(text + "<eos>")["input_ids"]])
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0, :-1]
        right += (logits.argmax(-1) == tokens[0, 1:]).sum().item()
        entropy += torch.distributions.Categorical(logits=logits).entropy().sum().item()
        targets += tokens.shape[1] - 1
    return {
        "mean_token_accuracy": pytest.approx(right / targets),
        "entropy": pytest.approx(entropy / targets, rel=1e-9),
    }


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # with a cap on the logits
@pytest.mark.parametrize("batching", BATCHINGS)
def test_an_evaluation_counts_what_it_is_asked_for(tmp_path: Path, batching: str, family: str) -> None:
    """A metric has two names; its values in evaluations and predictions are those by hand in float64."""
    more = {"final_logit_softcapping": 0.3} if family == "gemma2" else {}
    with tiny.KeepFloat64():
        model = tiny.model(family, dtype=torch.float64, **more)
        expected = by_hand(model, texts())
        options = BATCHINGS[batching] | {"per_device_eval_batch_size": 3, "metric_for_best_model": "entropy"}
        trainer = build(UnslothTrainer, arguments(tmp_path, **options), model=model, eval_dataset=texts())
        logged = trainer.evaluate()
        assert {name: logged[f"eval_{name}"] for name in expected} == expected
        assert {name: trainer.state.log_history[-1][f"eval_{name}"] for name in expected} == expected
        assert "eval_num_tokens" in logged
        predicted = trainer.predict(trainer.eval_dataset).metrics
        assert {name: predicted[f"test_{name}"] for name in expected} == expected
        args = arguments(tmp_path, **options | {"metric_for_best_model": "eval_mean_token_accuracy"})
        of_stream = build(UnslothTrainer, args, model=model, eval_dataset=texts().to_iterable_dataset()).evaluate()
        assert {name: of_stream[f"eval_{name}"] for name in expected} == expected
        trainer.args.metric_for_best_model = "loss"
        assert not {"eval_entropy", "eval_mean_token_accuracy"} & trainer.evaluate().keys()


def test_each_data_set_has_its_scores(tmp_path: Path) -> None:
    """They have the data set's own name, and the last one's also TRL's, which has no names of data sets."""
    data = {"a": texts(), "b_c": texts(3)}
    with tiny.KeepFloat64():
        expected = {name: by_hand(tiny.model(dtype=torch.float64), part) for name, part in data.items()}
        args = arguments(tmp_path, metric_for_best_model="eval_a_mean_token_accuracy")
        logged = build(UnslothTrainer, args, eval_dataset=data).evaluate()
    for name, scores in expected.items():
        assert {score: logged[f"eval_{name}_{score}"] for score in scores} == scores
    assert logged["eval_entropy"] == expected["b_c"]["entropy"]


@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        (UnslothTrainingArguments, "eval_mean_token_accuracy"),
        (UnslothTrainingArguments, "num_tokens"),
        (SFTConfig, "entropy"),
    ],
)
def test_the_best_model_is_chosen(tmp_path: Path, kind: type, metric: str) -> None:
    args = arguments(tmp_path, kind, metric_for_best_model=metric, load_best_model_at_end=True, **BEST)
    stop = EarlyStoppingCallback(early_stopping_patience=5)
    trainer = build(UnslothTrainer, args, dtype=torch.float32, texts=4, eval_dataset=texts(), callbacks=[stop])
    trainer.train()
    values = [log[f"eval_{metric.removeprefix('eval_')}"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(values) == 2 and trainer.state.best_metric == max(values)


def trainer_without_hooks(folder: Path, metric: str, **options: Any) -> UnslothTrainer:
    """A trainer of the class itself, whose metrics are known before it trains."""
    given = {"eval_dataset": texts(3), "args": arguments(folder, metric_for_best_model=metric, **BEST)} | options
    return UnslothTrainer(tiny.model(), train_dataset=texts(4), processing_class=tiny.tokenizer(), **given)


@pytest.mark.parametrize(
    ("metric", "data", "allowed"),
    [
        ("eval_banana", texts(3), "loss, mean_token_accuracy, entropy, num_tokens, or"),
        ("lossy", texts(3), "loss, mean_token_accuracy, entropy, num_tokens, or"),
        (
            "loss",
            {"a": texts(3)},
            "a_loss, a_mean_token_accuracy, a_entropy, mean_token_accuracy, entropy, num_tokens, or",
        ),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused_before_training(
    tmp_path: Path, metric: str, data: Any, allowed: str
) -> None:
    trainer = trainer_without_hooks(tmp_path, metric, eval_dataset=data)
    with pytest.raises(ValueError, match=f"^metric_for_best_model: got '{metric}'; allowed: {allowed}"):
        trainer.train()
    assert trainer.state.global_step == 0


class AddsBanana(TrainerCallback):
    """Adds a metric to every evaluation."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Add it."""
        metrics["eval_banana"] = 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"compute_metrics": lambda prediction: {"banana": 1.0}},
        {"compute_metrics": lambda prediction: {"eval_banana": 1.0, "entropy": -1.0}},
        {"callbacks": [AddsBanana()]},
    ],
)
def test_a_metric_of_the_users_is_used(tmp_path: Path, options: dict[str, Any]) -> None:
    """The user's value stays, also under a name of TRL's."""
    trainer = trainer_without_hooks(tmp_path, "eval_banana", **options)
    trainer.train()
    assert trainer.state.best_metric == 1.0
    found = {log.get("eval_entropy") for log in trainer.state.log_history if "eval_loss" in log}
    assert (found == {-1.0}) == ("entropy" in options.get("compute_metrics", lambda _: {})(None))


def test_metrics_are_known_without_an_evaluation(tmp_path: Path) -> None:
    """No metric is refused where no evaluation takes place."""
    trainer_without_hooks(
        tmp_path, "banana", args=arguments(tmp_path, metric_for_best_model="banana", max_steps=1)
    ).train()


def test_a_script_for_trl_finds_trls_metric(tmp_path: Path) -> None:
    from trl import SFTTrainer

    compat.patch_trl()
    args = arguments(tmp_path, SFTConfig, metric_for_best_model="mean_token_accuracy", **BEST)
    trainer = SFTTrainer(
        tiny.model(), args, train_dataset=texts(4), eval_dataset=texts(3), processing_class=tiny.tokenizer()
    )
    trainer.train()
    assert type(trainer) is UnslothTrainer and trainer.state.best_metric is not None


def reference(logits: Tensor, targets: Tensor) -> list[float]:
    """The scores by torch's distribution."""
    logits, targets = logits[targets != -100].double(), targets[targets != -100]
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum().item() if len(targets) else 0.0
    return [(logits.argmax(-1) == targets).sum().item(), pytest.approx(entropy), len(targets)]


@pytest.mark.parametrize("rows", [1, 5, CHUNK_ROWS, CHUNK_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_of_logits_and_of_hidden_states(rows: int, dtype: torch.dtype) -> None:
    """They are computed in chunks, without rows that are no targets, whatever these hold, and without a gradient."""
    torch.manual_seed(rows)
    logits = torch.randn(rows, 11).to(dtype).requires_grad_()
    targets = torch.where(torch.rand(rows) < 0.3, -100, torch.randint(11, (rows,)))
    found = score(logits, targets)
    assert found.tolist() == reference(logits.detach(), targets) and not found.requires_grad
    poisoned = torch.where((targets == -100)[:, None], torch.nan, logits)
    assert score(poisoned, targets).tolist() == reference(logits.detach(), targets)
    hidden, weight = torch.randn(rows, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    assert score(hidden, targets, lambda chunk: chunk @ weight.T).tolist() == reference(hidden @ weight.T, targets)


def test_an_impossible_token_has_no_entropy() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    assert score(logits, torch.tensor([0])).tolist() == [1, pytest.approx(0.6931472), 1]


@pytest.mark.parametrize("processes", [1, 2])
def test_scores_are_means_over_all_targets_and_processes(processes: int) -> None:
    scores = Scores()
    assert scores.take(lambda total: total) == {}
    for sums in ([3.0, 8.0, 4.0], [1.0, 2.0, 6.0]):
        scores.add(torch.tensor(sums, dtype=torch.float64))
    assert scores.take(lambda total: total * processes) == {"mean_token_accuracy": 0.4, "entropy": 1.0}
    scores.add(torch.zeros(3))
    assert scores.take(lambda total: total) == {"mean_token_accuracy": 0.0, "entropy": 0.0}
