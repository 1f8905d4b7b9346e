"""The arithmetic of a step: losses -> directional derivative -> clip (DDC) -> coefficients -> scales.

Two-point SPSA on the quantization scales, arXiv 2505.13430, algorithm 1 and equation 5 (directional derivative
clipping), with J directions per step over one batch:

    d_j = (L_j+ - L_j-) / (2 eps);   d_j <- clip(d_j, -C, C);   a_j = -(lr / J) d_j

and the scales move along every z(seed_j) by a_j (kernels/update.py).

One-sided, each direction has one evaluation, and what it is compared with are the other directions' losses:

    d_j = (L_j+ - mean of L_k+, k != j) / eps

which estimates the same gradient, without bias but for terms of the order of eps: as z_j is independent of the others,
their mean is a baseline that adds nothing in expectation (leave-one-out). J evaluations make J - 1 independent
comparisons, where pairs make J / 2.

Terms (clip): docs/glossary.md.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..kernels.noise import kernel_coefs, law_number, step_seed
from ..nn import ops
from ..nn.arena import ScaleArena
from .journal import Record

LARGEST = torch.finfo(torch.float32).max
AT_ONCE = 64  # steps of a replay that are one pass over the scales


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step saw and did: losses [E] in the order +, - of each direction, derivatives before clipping and
    coefficients applied to the raw noise, one per direction, and whether the step was skipped."""

    losses: list[float]
    derivatives: list[float]
    applied: list[float]
    skipped: bool


def evaluation_count(group: Mapping[str, Any]) -> int:
    """E, of a step with these settings of an optimizer."""
    return group["directions"] * (1 if group["one_sided"] else 2)


def perturbations(group: Mapping[str, Any], step: int) -> tuple[list[int], list[float]]:
    """(seeds, coefficients) of a step's evaluations: +eps and -eps of each direction in turn, one-sided +eps alone."""
    signs = (1,) if group["one_sided"] else (1, -1)
    made = [
        (step_seed(group["seed"], step, j), sign * group["eps"]) for j in range(group["directions"]) for sign in signs
    ]
    return [seed for seed, _ in made], [coef for _, coef in made]


def sides(losses: torch.Tensor, one_sided: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [E] -> the loss of each direction, and what it is compared with: that of -eps, or one-sided the mean of
    the other directions'; float64 [J] both."""
    if not one_sided:
        return losses[0::2], losses[1::2]
    losses = losses.float().double()  # so that their sum is exact, in any order
    return losses, (losses.sum() - losses) / (len(losses) - 1)


def project(
    losses: torch.Tensor, rates: torch.Tensor | Sequence[float], law: int, one_sided: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a step -> derivatives, and what is applied along the raw noise; on any device, the same bits on all.

    losses float64 [2 J] in the order +, -, one-sided [J]; rates: lr / J, 2 eps (one-sided eps), clip (numbers, or a
    float64 tensor [3] for a graph, which is captured once and has to see new ones). Returns derivatives before
    clipping, float64 [J], and applied, float32 [J], all NaN when a loss or one of them is not finite in float32: an
    update by NaN moves nothing.
    """
    rate, span, clip = torch.as_tensor(rates, dtype=torch.float64)
    loss, other = sides(losses, one_sided)
    derivatives = (loss - other) / span
    applied = kernel_coefs(-rate * derivatives.clamp(-clip, clip), law)
    return derivatives, torch.where((losses.abs() <= LARGEST).all() & applied.isfinite().all(), applied, math.nan)


def update(arena: ScaleArena, seeds: torch.Tensor, coefs: torch.Tensor, recipe: Mapping[str, Any]) -> None:
    """Update the arena in place with the (seed, coefficient) pairs of one step, [J], or of several, [S, J]; recipe
    names noise, relative, sharing and floor."""
    ops.update_op(
        arena.data,
        seeds,
        coefs,
        0,
        law_number(recipe["noise"]),
        recipe["relative"],
        recipe["floor"],
        arena.layers() if recipe["sharing"] == "row" else None,
    )


def apply_steps(arena: ScaleArena, steps: Iterable[Sequence[Record]], recipe: Mapping[str, Any]) -> None:
    """Update the arena with the records of each step in turn: what a step and a replay do.

    AT_ONCE steps are a pass over the scales, with the bits of one after another; those that were skipped are left out.
    """
    made, device = (records for records in steps if not records[0].skipped), arena.data.device
    while some := list(itertools.islice(made, AT_ONCE)):
        seeds = torch.tensor([[r.seed for r in records] for records in some], dtype=torch.int64, device=device)
        coefs = torch.tensor([[r.applied for r in records] for records in some], dtype=torch.float32, device=device)
        update(arena, seeds, coefs, recipe)
