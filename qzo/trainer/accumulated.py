"""The optimizer of a trainer: losses arrive in parts, from micro-batches and ranks, and are added up before a step."""

import functools
from typing import Any

import torch

from ..kernels.noise import law_number
from ..nn.evaluations import Evaluations
from ..optim.graph import Batch, Closure, graphs_of
from ..optim.optimizer import QZO
from ..optim.step import project, sides

UNMOVED = 5  # steps in a row in which the losses that are compared are the same, before a run is ended


class AccumulatedQZO(QZO):
    """QZO whose `step` takes no closure: it uses the losses that `accumulate` was given since the last one.

    Losses are added in float64, micro-batch after micro-batch, then over the ranks in their order, and divided by the
    number of ranks: so every rank gets the same bits, and for a power of two of ranks those of one process that takes
    the ranks' batches as micro-batches. Parameters are those of `QZO`.
    """

    def __init__(self, module: torch.nn.Module, lr: float, **settings: Any) -> None:
        if settings.get("staleness"):
            raise ValueError(f"staleness={settings['staleness']}: steps of a trainer are taken at once; leave it out")
        super().__init__(module, lr, **settings)
        self._sum: torch.Tensor | None = None
        self._reduced: torch.Tensor | None = None
        self._coming: Evaluations | None = None
        self._unmoved = 0

    def evaluations(self) -> Evaluations:
        """As in `QZO`; one object for all micro-batches of a step."""
        if self._coming is None:
            self._coming = super().evaluations()
        return self._coming

    def evaluate(self, closure: Closure, batch: Batch) -> torch.Tensor:
        """The losses of a micro-batch under the coming evaluations, float64 [E], by a closure of it as `QZO.step` takes
        one; from a CUDA graph where `cuda_graph` has it and the batch is static (`static_batch`)."""
        if batch.get("static") and self.ranks.count == 1 and self.cuda_graph is not False:
            self.graphs = graphs_of(self)
            losses = None if self.graphs is None else self.graphs.losses(closure, batch, self.paired)
            if losses is not None:
                return losses
        return self.losses(functools.partial(closure, batch), self.evaluations(), self.paired).double()

    def accumulate(self, losses: torch.Tensor) -> None:
        """Add the losses [E] of a micro-batch, already scaled by its share of the step."""
        losses = losses.detach().double()
        self._sum = losses if self._sum is None else self._sum + losses

    def reduce(self) -> torch.Tensor:
        """The derivatives of the coming step before clipping, float64 [J] on the CPU. All ranks have to ask."""
        if self._reduced is None:
            if self._sum is None:
                raise RuntimeError("a step has no losses: accumulate() comes before reduce() and step()")
            self._reduced = self.share.combine(self._sum)
        loss, other = sides(self._reduced, self.param_groups[0]["one_sided"])
        return (loss - other) / self.rates()[1]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget losses that no step has used: those of a run that was interrupted."""
        self._sum = self._reduced = None

    @torch.no_grad()
    def step(self, closure: None = None) -> float:  # type: ignore[override]
        """One step by the losses that were added up; returns their mean.

        Raises
        ------
        ValueError
            The losses of UNMOVED steps in a row were the same under all perturbations; a closure was given.
        FloatingPointError, OSError
            As in `QZO`.
        """
        if closure is not None:
            raise ValueError("this optimizer takes its losses by accumulate(), not from a closure")
        self.reduce()
        assert self._reduced is not None
        losses, group = self._reduced, self.param_groups[0]
        derivatives, applied = project(losses, self.rates(), law_number(group["noise"]), group["one_sided"])
        self._sum = self._reduced = self._coming = None
        mean = self._finish(losses.tolist(), derivatives.tolist(), applied.tolist())
        unmoved = torch.equal(*sides(losses, group["one_sided"])) and bool(losses.isfinite().all())
        self._unmoved = self._unmoved + 1 if unmoved else 0
        if self._unmoved >= UNMOVED:
            raise ValueError(
                f"the objective ignores the perturbation: in {UNMOVED} steps in a row its losses under "
                f"{'all directions' if group['one_sided'] else '+eps and -eps'} were the same bit for bit "
                f"(last: {losses.tolist()}). Nothing is learned from such a loss: it is "
                "constant, is made of values that were detached or computed beforehand, or eps is too small for the "
                f"dtype of the activations (eps={group['eps']:g})"
            )
        return mean
