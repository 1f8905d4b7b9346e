"""What large_rows="auto" stands for in a run: weights rounded once to 16 bits, if the signal is measured to survive it.

With many rows the tensor cores are the limit, and rounding each perturbed weight once lets them run alone
(kernels/folded.py, kernels/dequantize.py). What that costs is measured before the first step: the derivatives of the
run's own first batch along a few directions, exact and rounded, everything else being equal.
"""

from collections.abc import Callable

import torch

from ..kernels.noise import step_seed
from ..kernels.tiles import BLAS_WINS_FROM, FOLDED_FROM
from ..nn import ops
from ..nn.evaluations import Evaluations
from ..nn.layers import evaluating

MOST_LOST = 0.02  # of the RMS of L+ - L-
DIRECTIONS = 8
NAMES = {"auto": f"auto: folded from {FOLDED_FROM} rows, blas from {BLAS_WINS_FROM}"}  # what a journal says


@torch.no_grad()
def lost(
    module: torch.nn.Module,
    losses: Callable[[], torch.Tensor],
    eps: float,
    noise: str = "rademacher",
    relative: bool = True,
    sharing: str = "group",
    seed: int = 0,
    large_rows: str = "auto",
) -> float:
    """How much of L+ - L- rounding loses: the RMS of what it changes over the RMS of the exact, over 8 directions.

    losses() -> float32 [2], the losses of a batch stacked twice. 0.0 where nothing is rounded: bfloat16, few rows, a
    CPU, layers in forms that stay exact.
    """
    found: list[torch.Tensor] = []
    for form in ("fused", large_rows):
        differences = []
        for direction in range(DIRECTIONS):
            one = step_seed(seed, 0, direction)
            pair = Evaluations(torch.tensor([one, one]), torch.tensor([eps, -eps]), noise, relative, sharing)
            with ops.backend(large_rows=form), evaluating(module, pair):
                plus, minus = losses().double().tolist()
            differences.append(plus - minus)
        found.append(torch.tensor(differences, dtype=torch.float64))
    exact, in_16_bits = found
    change = float((in_16_bits - exact).norm())
    return change / float(exact.norm()) if change else 0.0


def settle(device: torch.device, measure: Callable[[], float], recorded: str | None = None) -> tuple[str, float | None]:
    """("auto" or "fused", what was measured or None) for a run whose large_rows is "auto".

    measure() -> what `lost` returns, asked on a device with Triton kernels only; recorded: what the journal of a run
    that goes on says: it goes on as it began, whatever would be measured now.
    """
    if recorded is not None:
        return next((asked for asked, name in NAMES.items() if name == recorded), "fused"), None
    if not ops.uses_triton(device):
        return "fused", None
    part = measure()
    return ("auto" if 0 < part < MOST_LOST else "fused"), part


def said(value: str, part: float | None) -> str:
    """A line for the user, or "" where there was nothing to choose."""
    if not part:
        return ""
    cost = f"rounding the perturbed weights to 16 bits changes {100 * part:.2g} % of L+ - L-"
    return (
        f"many rows: {cost}, so they are (--large-rows fused: exact)"
        if value == "auto"
        else f"many rows: {cost}, {100 * MOST_LOST:g} % at the most is allowed, so they stay exact (--large-rows auto)"
    )
