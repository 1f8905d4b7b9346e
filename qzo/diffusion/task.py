"""A run's data and model where a picture is what is learned: rows drawn of cached latents, and their losses."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..loss.losses import pair
from ..loss.sums import exact_sums, means
from ..system.progress import tracked
from ..training.data import Batch, batch_indices
from ..training.task import Measure
from .cache import Latents
from .families import Family
from .metrics import STRATA
from .objective import FlowLaw, Rows, derivative_error, draw, mixed, row_losses

_PROMPT = "prompt."  # before the names of its tensors in a batch


class Drawn(NamedTuple):
    """What a step's batch is made of: pictures by their places, and what seeds their rows."""

    step: int
    seed: int
    pictures: tuple[int, ...]


class DiffusionTask:
    """Pictures on a flow-matching transformer; a training.loop.Trainable.

    evaluations : of a step, 2 * directions; the loss of each of a step's rows is kept under each of them
    """

    bucketed = False  # all batches of a run have one shape
    classes: tuple[int, ...] | None = None  # no classification

    def __init__(self, model: Any, family: Family, latents: Latents, law: FlowLaw, evaluations: int) -> None:
        self.model, self.family, self.examples, self.law = model, family, latents, law
        self.device, self.dtype = next(model.parameters()).device, model.dtype
        self.evaluations = evaluations
        self.kept = torch.empty(evaluations, 0)  # [evaluations, R] of the last step, written where graphs find it
        self.times = torch.empty(0)
        self._at = 0

    def check(self) -> None:
        """Nothing is open: the pipeline's parts were held against each other when it was opened."""

    def settle(self) -> None:
        """Nothing to decide."""

    def fingerprint(self) -> str:
        """A text that differs where pictures, captions, what encoded them or the law do."""
        return repr((self.examples, self.law))

    def indices(self, step: int, batch_size: int, seed: int) -> Drawn:
        """The pictures of a step, each as often as any other over the passes."""
        count = len(self.examples)
        return Drawn(step, seed, tuple(batch_indices(step, [1] * count, batch_size, seed, [None] * count)))

    def batch(self, indices: Drawn, count: int, among: Drawn | None = None) -> Batch:
        """The rows of a step for `count` evaluations, stacked: {"noisy", "times", "target", "weights", "prompt.X"}.
        ValueError for a rank's part of them (`among`), as rows are drawn for the pictures of a step together."""
        if among is not None:
            raise ValueError("the pictures of a step are not divided among ranks: give parallel='directions'")
        x0 = torch.stack([self.examples.latent(i) for i in indices.pictures])
        rows = draw(self.law, indices.seed, indices.step, len(x0), x0.shape[1:])
        self.times, self._at = rows.times, 0
        if self.kept.shape[1] != len(rows.times):
            self.kept = torch.empty(self.evaluations, len(rows.times), device=self.device)
        return pair(self._rows(x0, rows, indices.pictures, self.law), count)

    def _rows(self, x0: torch.Tensor, rows: Rows, pictures: tuple[int, ...], law: FlowLaw) -> Batch:
        """The batch of the rows of pictures x0 [B, C, H, W], once."""
        owners = [i for i in pictures for _ in range(law.draws)]
        shown = [None if dropped else i for i, dropped in zip(owners, rows.dropped.tolist(), strict=True)]
        held = {i: self.examples.prompt(i) for i in set(shown)}
        prompts = {
            name: torch.stack([held[i][name] for i in shown]).to(self.device) for name in next(iter(held.values()))
        }
        times = rows.times.to(self.device)
        noisy, target = mixed(x0.repeat_interleave(law.draws, 0).to(self.device), rows.noise.to(self.device), times)
        return {
            "noisy": noisy.to(self.dtype),
            "times": times,
            "target": target,
            "weights": law.weights(times),
            **{
                _PROMPT + name: value.to(self.dtype) if value.is_floating_point() else value
                for name, value in prompts.items()
            },
        }

    def compiled_losses(self, batch: Batch, count: int) -> torch.Tensor:
        """The loss of each of `count` evaluations over a batch, float32 [count]."""
        return means(self.compiled_sums(batch, count)).float()

    def compiled_sums(self, batch: Batch, count: int, centred: bool = False) -> torch.Tensor:
        """Sums of the rows' losses and how many they are, float64 [count, 2] (loss/sums.py); the losses are kept."""
        rows = self.row_losses(batch).view(count, -1)
        if rows.shape[1] == self.kept.shape[1] and count <= self.evaluations:
            self.kept[self._at : self._at + count].copy_(rows)
            self._at = (self._at + count) % self.evaluations
        return exact_sums(torch.stack([rows, torch.ones_like(rows)], 2))

    @torch.no_grad()
    def row_losses(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """float32 [rows]: what the model has of each row of a batch."""
        prompts = {name.removeprefix(_PROMPT): batch[name] for name in batch if name.startswith(_PROMPT)}
        predicted = self.family.predict(self.model, batch["noisy"], batch["times"], prompts)
        return row_losses(predicted, batch["target"], batch["weights"])

    def notes(self) -> dict[str, Any]:
        """{"times" [R], "row_losses" [2 J, R]} of the step just made: what a standard error of its derivatives, an
        importance of times, or a mean that outliers move less is made of."""
        return {
            "times": [round(value, 5) for value in self.times.tolist()],
            "row_losses": [[_finite(value) for value in rows] for rows in self.kept.tolist()],
        }

    def derivative_error(self, eps: float) -> torch.Tensor:
        """float32 [J]: objective.derivative_error of the step just made."""
        return derivative_error(self.kept, eps, self.law.draws)

    def evaluate(self, batch_size: int = 32, fitted: bool = False) -> Measure:
        """{"loss", "accuracy"}: the mean of `measure`, that many rows at once; None, there are no options."""
        return {"loss": float(self.measure(batch_size).mean()), "accuracy": None}

    def measure(self, rows: int = 32) -> torch.Tensor:
        """float32 [pictures, STRATA] on the CPU: the loss of each picture at a time in each of as many equally likely
        intervals. Times and noise are a picture's own, the same in every run, so that differences are paired."""
        law = FlowLaw(self.law.density, self.law.shift, self.law.mean, self.law.std, draws=STRATA)
        at_once = max(1, rows // STRATA)
        found: list[torch.Tensor] = []
        for first in tracked(range(0, len(self.examples), at_once), "evaluating", "batches"):
            pictures = tuple(range(first, min(first + at_once, len(self.examples))))
            x0 = torch.stack([self.examples.latent(i) for i in pictures])
            each = [draw(law, 0, i, 1, x0.shape[1:]) for i in pictures]
            drawn = Rows(*(torch.cat(part) for part in zip(*each, strict=True)))
            found.append(self.row_losses(self._rows(x0, drawn, pictures, law)).cpu())
        return torch.cat(found).view(-1, STRATA)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 6) if abs(value) < float("inf") else None
