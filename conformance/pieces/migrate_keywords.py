"""Keywords of any age, sorted into those of the trainer and those of its config."""

from dataclasses import dataclass

from hypothesis import strategies as st

from conformance.gates import Failure
from conformance.piece import Mistake, Piece, PieceCase, PieceTrial
from conformance.pieces._shared import Arguments, equal, inputs_untouched
from conformance.trial import Raised

TRAINER = ("model", "args", "train_dataset", "processing_class", "tokenizer")
CONFIG = ("packing", "max_length", "max_seq_length", "dataset_text_field")
OLD = {"tokenizer": "processing_class", "max_seq_length": "max_length"}


@dataclass(frozen=True)
class KeywordsCase(PieceCase):
    """Names, and keywords with a number each."""

    trainer: tuple[str, ...]
    config: tuple[str, ...]
    keywords: tuple[tuple[str, int], ...]


def draw(elements: int) -> st.SearchStrategy[KeywordsCase]:
    """Trainers and configs of any age; mostly known keywords."""

    def some(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
        return st.lists(st.sampled_from(names), unique=True, max_size=len(names)).map(tuple)

    keyword = st.tuples(st.sampled_from((*TRAINER, *CONFIG, "packin")), st.integers(0, 1))
    keywords = st.lists(keyword, unique_by=lambda pair: pair[0], max_size=5).map(tuple)
    now = st.just(TRAINER[:-1]), st.just(("packing", "max_length", "dataset_text_field"))
    return st.builds(
        KeywordsCase,
        trainer=st.one_of(now[0], some(TRAINER)),
        config=st.one_of(now[1], some(CONFIG)),
        keywords=keywords,
    )


def arguments(case: KeywordsCase, device: str) -> Arguments:
    """As drawn."""
    return (list(case.trainer), set(case.config), dict(case.keywords)), {}


def nothing_lost(trial: PieceTrial, case: KeywordsCase) -> None:
    """Every keyword arrives with its value where it is known, or there is an error that names one."""
    positional, _ = arguments(case, trial.device)
    with Raised() as raised:
        trainer, config = trial.function(*positional)
    if raised.error is not None:
        if not any(name in str(raised.error) for name, _ in case.keywords):
            raise Failure(f"the error names no keyword: {raised.error}")
        return
    strange = [*(trainer.keys() - set(case.trainer)), *(config.keys() - set(case.config))]
    if strange:
        raise Failure(f"{strange} are not known to whom they are given: {trainer}, {config}")
    for name, value in case.keywords:
        known = {*case.trainer, *case.config}
        arrived = name if name in known else OLD.get(name, name)
        if {**config, **trainer}.get(arrived) != value:
            raise Failure(f"{name}={value} is lost: {trainer}, {config}")


def idempotent(trial: PieceTrial, case: KeywordsCase) -> None:
    """What was sorted stays where it is."""
    positional, _ = arguments(case, trial.device)
    with Raised() as raised:
        trainer, config = trial.function(*positional)
        again = trial.function(*positional[:2], {**trainer, **config})
        if again != (trainer, config):
            raise Failure(f"{(trainer, config)} becomes {again}")
    del raised  # an error is the other laws' finding


def _call(**keywords: int) -> Arguments:
    return (("processing_class",), ("max_length",), keywords), {}


piece = Piece(
    op="migrate_keywords",
    draw=draw,
    laws=(nothing_lost, idempotent, equal(arguments), inputs_untouched(arguments)),
    plain=KeywordsCase(TRAINER[:-1], ("packing",), (("packing", 1),)),
    mistakes=(
        Mistake("a misspelt keyword", lambda: _call(max_lenght=1), TypeError, "max_lenght"),
        Mistake("two values for one", lambda: _call(tokenizer=1, processing_class=2), ValueError, "tokenizer"),
        Mistake("two values, the new name first", lambda: _call(max_length=1, max_seq_length=2), ValueError, "max"),
    ),
)
