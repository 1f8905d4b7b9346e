"""The learning rate of a classification that was given none: from how far perturbations move its options' scores.

With D_i = (scores_i(+eps z) - scores_i(-eps z)) / (2 eps), which is what a unit of a direction z does to the scores of
row i, and p_i = softmax(scores_i), the sensitivity s is

    s^2 = mean over directions z and rows i of Var_{o ~ p_i}(D_io - mean_i D_io)

the curvature of the loss along a random direction (the Gauss-Newton matrix of the cross entropy), without the push on
all rows' scores, which the steps leave out (loss/label_bias.py). The noise of the estimates makes the scales walk at
random: n directions of a derivative of 1 at a rate r each move the scores by about s r sqrt(n). So the rate is

    r = WALK / (s sqrt(n)) per direction, for the n = steps x J directions of the run

but no larger than the shortest runs that were measured had it, and over fewer than EXAMPLES a step smaller in
proportion, as the noise of an estimate is that of so many examples.

A quadratic loss alone would allow a rate of the order of 1 / s^2 in runs of any length; but the more a scale has
drifted, the less that loss is one. docs/learning.md has what was measured.
"""

import math
import statistics

import torch

from ..kernels.noise import step_seed
from ..nn.evaluations import Evaluations
from ..nn.layers import evaluating
from .data import Batch
from .settings import Settings
from .task import Task

WALK = 1.1  # how far the scores may walk, in nats
SHORTEST = 184  # directions of a run
EXAMPLES = 16
DIRECTIONS = 4  # that are measured, each over the batch of another step
LARGEST = 1.0  # of a rate per direction: with it a derivative of 1 moves every scale by its own size


def measured_rate(task: Task, settings: Settings) -> float:
    """The learning rate of a run, its sum over a step's directions, rounded to two digits; for perturbations relative
    to the scales. It costs two evaluations of each of DIRECTIONS batches."""
    walk = sensitivity(task, settings) * math.sqrt(max(SHORTEST, settings.max_steps * settings.directions))
    rate = min(WALK / walk, LARGEST) if walk else LARGEST
    return float(f"{rate * min(1, settings.batch_size / EXAMPLES):.2g}") * settings.directions


@torch.no_grad()
def sensitivity(task: Task, settings: Settings) -> float:
    """s as above, in nats per unit of a direction; directions and batches are those of the first steps."""
    squares = []
    for step in range(DIRECTIONS):
        batch = task.batch(task.indices(step, settings.batch_size, settings.seed), 1)
        plus, minus = (_scores(task, batch, step, settings, coef) for coef in (settings.eps, -settings.eps))
        squares.append(variance((plus + minus) / 2, (plus - minus) / (2 * settings.eps)))
    return math.sqrt(statistics.fmean(squares))


def variance(scores: torch.Tensor, moved: torch.Tensor) -> float:
    """Mean over rows of Var_{o ~ softmax(scores_i)}(moved_io - mean_i moved_io), of float32 [B, O] both."""
    parts, own = scores.softmax(1), moved - moved.mean(0)
    return float((parts * (own - (parts * own).sum(1, keepdim=True)).square()).sum(1).mean())


def _scores(task: Task, batch: Batch, step: int, settings: Settings, coef: float) -> torch.Tensor:
    """float32 [B, O] under one evaluation of a step's first direction."""
    seed = torch.tensor([step_seed(settings.seed, step, 0)])
    one = Evaluations(seed, torch.tensor([coef]), settings.noise, settings.relative, settings.sharing)
    with evaluating(task.model, one):
        return task.scores_of(batch)
