"""The learning rate of each step of a run, and over how many steps it falls."""

from pathlib import Path

from torch.optim.lr_scheduler import LambdaLR

from ..optim.journal import read
from ..optim.optimizer import QZO
from .settings import Settings


def planned_steps(settings: Settings, journal: Path | None) -> int:
    """The steps that a run began with: settings.max_steps, or fewer where the journal of one that goes on says so.

    A run may be extended: the steps beyond those it began with have its last learning rate.
    """
    found = read(journal) if journal is not None and journal.exists() else None
    began = settings.max_steps if found is None else found[0].get("recipe", {}).get("max_steps", settings.max_steps)
    if found is not None and len(found[1]) > settings.max_steps:
        raise ValueError(
            f"max_steps={settings.max_steps}: {journal} has {len(found[1])} steps already; give as many or more "
            "(qzo replay --until rebuilds the model as it was before)"
        )
    return min(began, settings.max_steps)  # fewer than those are another run's, which the journal's header says


def schedule(optimizer: QZO, settings: Settings, planned: int | None = None) -> LambdaLR:
    """The learning rates of a run: linear from learning_rate to decay times it, from the optimizer's step on.

    planned: steps until the last rate is reached, which stays; None: all of settings.max_steps.

    LambdaLR, as its rate at a step is one product, whatever steps came before in this process: a resumed run has the
    unbroken one's bits. LinearLR multiplies the rate of the step before, which rounds otherwise.
    """
    group = optimizer.param_groups[0]
    group.setdefault("initial_lr", settings.learning_rate)
    steps = planned or settings.max_steps

    def factor(step: int) -> float:
        return 1 - (1 - settings.decay) * min(step, steps) / steps

    return LambdaLR(optimizer, factor, last_epoch=optimizer.evaluated - 1)
