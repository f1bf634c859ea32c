"""An adapter that is saved and loaded by peft has every tensor, with the same bits."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from conformance.laws._law import Law
from conformance.laws.saved import demand_none_lost, differing
from conformance.property import of_file

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial


def check(trial: ModelTrial) -> None:
    """LoRA, and what is trained in full beside it; without what the untouched model loses too."""
    from peft import PeftModel

    def lost(model: Any) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(trial.untouched(), folder, is_trainable=True)
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return differing(trained, {name: p.detach() for name, p in loaded.named_parameters()})

    demand_none_lost(lost, trial.placed(adapted=True), lambda: trial.untouched(adapted=True))


LAW = Law(*of_file(check))
