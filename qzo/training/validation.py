"""Validation while a run goes: held-out data measured every few steps, the best step, and an early end.

The best step is a number, not a copy of the model: the base and the journal up to that step are the model
(optim/replay.py).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..nn.layers import arena_of
from ..optim.replay import replay
from ..system.ranks import Ranks
from .task import Measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = 10  # validations of a run that does not say how often


class Measured(NamedTuple):
    """Held-out data after so many steps; accuracy is None where the data have no options."""

    step: int
    loss: float
    accuracy: float | None


class Validation:
    """What held-out data said after which step.

    measure : () -> {"loss", "accuracy"} of the model as it is
    every : steps between two measurements; the last step is measured too
    patience : measurements in a row without a lower loss after which the run ends; None: it does not
    """

    def __init__(self, measure: Callable[[], Measure], every: int, patience: int | None = None):
        self.measure, self.every, self.patience = measure, every, patience
        self.history: list[Measured] = []

    def recall(self, lines: Iterable[dict[str, Any]]) -> None:
        """Take up the measurements in the metrics of a run that goes on."""
        self.history = [Measured(line["step"] + 1, **line["valid"]) for line in lines if _whole(line.get("valid"))]

    def after(self, step: int, last: bool) -> Measure | None:
        """Measure if it is time to, `step` steps being done; `last`: there are no more. All ranks measure, so that none
        waits for long, and go by what the first one found."""
        if step % self.every and not last:
            return None
        own = self.measure()
        found: Measure = Ranks().from_first(lambda: own)
        assert found["loss"] is not None
        self.history.append(Measured(step, found["loss"], found["accuracy"]))
        return found

    def catch_up(self, step: int, last: bool) -> Measure | None:
        """Measure the step that a run goes on from, if it was time to and the run ended before its line was written."""
        if step == 0 or any(one.step == step for one in self.history):
            return None
        return self.after(step, last)

    @property
    def best(self) -> Measured | None:
        """The measurement with the lowest loss, the first of equal ones; None before there is one. NaN is no loss."""
        return min((one for one in self.history if one.loss == one.loss), key=lambda one: one.loss, default=None)

    @property
    def exhausted(self) -> bool:
        """Whether the run should end: `patience` measurements since the best."""
        if self.patience is None or self.best is None:
            return False
        return len(self.history) - 1 - self.history.index(self.best) >= self.patience


def _whole(found: Any) -> bool:
    return isinstance(found, dict) and found.keys() == {"loss", "accuracy"} and found["loss"] is not None


class Base:
    """The scales (and codebooks) of a model before its run, in host memory: 4 bytes each."""

    def __init__(self, model: "PreTrainedModel"):
        self.model = model
        self.values = arena_of(model, exact=True).data.to("cpu", copy=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model the base again, bit for bit."""
        arena_of(self.model, exact=True).data.copy_(self.values)

    def rebuild(self, journal: Path, step: int | None = None) -> None:
        """Make the model what it was after so many steps of the journal, bit for bit; None: after all."""
        self.restore()
        replay(self.model, journal, until=step)
