"""The flow-matching objective: what a transformer of Stable Diffusion 3's kind is asked, and how wrong it is.

    x_t = (1 - s) x0 + s n        target n - x0        loss: mean squared error, float32, one number a row

x0 is a latent, n standard normal noise, s in (0, 1) a time. s is drawn continuously: a density over u in (0, 1), then
the shift a of the model's own sampler, s = a u / (1 + (a - 1) u). What a step draws depends on the run's seed and the
step's number alone, so all evaluations of a step see the same rows, and a run that is resumed draws what an unbroken
one does.

Densities: logit-normal, u = sigmoid(mean + std N(0, 1)) (arXiv 2403.03206, section 3.1, as is "mode"); mode, heavy in
the middle; uniform.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..kernels.noise import step_seed

DENSITIES = ("logit-normal", "mode", "uniform")
WEIGHTINGS = ("none", "cosmap")
MODE_SCALE = 1.29  # of "mode": the paper's best
_STREAM = 1 << 16  # in the place of a direction's number, of which a step has fewer: seeds of rows meet none of noise
_EDGE = 1e-7  # times keep this distance from 0 and 1: float32 has no number nearer to 1


@dataclasses.dataclass(frozen=True)
class FlowLaw:
    """What decides the rows of a step beside the data. ValueError names the field, what it was given, and its range.

    density : one of DENSITIES, of u
    shift : a of the model's sampler, above 0 (schedulers.py reads it); 1: none
    mean, std : of the logit-normal density
    weighting : what a row's loss is multiplied by: "none", or "cosmap", 2 / (pi (1 - 2 s + 2 s^2))
    draws : rows (n, s) of each image in a step. As many rows of as many images have less variance (docs/diffusion.md)
    stratified : the times of a step are spread: one in each of as many equally likely intervals as there are times,
        and one of each image's in each of as many as it has. Each alone still has the law's density
    dropout : the share of rows that get the empty prompt in the place of their caption, in [0, 1)
    """

    density: str = "logit-normal"
    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    weighting: str = "none"
    draws: int = 1
    stratified: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_weighting(self.weighting)
        finite = math.isfinite
        for name, good, wanted in (
            ("density", self.density in DENSITIES, f"one of {', '.join(DENSITIES)}"),
            ("shift", finite(self.shift) and self.shift > 0, "a finite number > 0 (1: no shift)"),
            ("mean", finite(self.mean), "a finite number"),
            ("std", finite(self.std) and self.std > 0, "a finite number > 0"),
            ("draws", type(self.draws) is int and self.draws >= 1, "an int >= 1"),
            ("dropout", 0 <= self.dropout < 1, "a share from 0 to below 1"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {wanted}")

    def times(self, u: torch.Tensor) -> torch.Tensor:
        """Times s of probabilities u in [0, 1], both float64 of any shape: the law's quantile function, ascending."""
        if self.density == "logit-normal":
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        elif self.density == "mode":
            v = 1 - u
            u = 1 - v - MODE_SCALE * (torch.cos(math.pi / 2 * v) ** 2 - 1 + v)
        return (self.shift * u / (1 + (self.shift - 1) * u)).clamp(_EDGE, 1 - _EDGE)

    def weights(self, times: torch.Tensor) -> torch.Tensor:
        """What the loss of a row at each time is multiplied by, float32 as the times."""
        if self.weighting == "none":
            return torch.ones_like(times)
        return 2 / (math.pi * (1 - 2 * times + 2 * times**2))


def check_weighting(name: str) -> None:
    """ValueError, with the reason, for a weighting that is not one of WEIGHTINGS."""
    if name == "sigma_sqrt":
        raise ValueError(
            "weighting 'sigma_sqrt' multiplies a row's loss by s^-2, a million at s = 0.001: a few rows would decide a "
            f"two-point estimate whose difference is clipped; use {' or '.join(WEIGHTINGS)}"
        )
    if name not in WEIGHTINGS:
        raise ValueError(f"weighting {name!r}: known are {', '.join(WEIGHTINGS)}")


class Rows(NamedTuple):
    """What is drawn for B images of K draws, row b * K + k being draw k of image b.

    times : float32 [B K]
    noise : float32 [B K, *shape]
    dropped : bool [B K], rows that get the empty prompt
    """

    times: torch.Tensor
    noise: torch.Tensor
    dropped: torch.Tensor


def draw(law: FlowLaw, seed: int, step: int, images: int, shape: Sequence[int]) -> Rows:
    """The Rows of a step of the run with this seed, on the CPU; shape: of a latent.

    Nothing but the arguments enters: no device, no step before, no other state.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, step, _STREAM))
    u = torch.rand(images, law.draws, dtype=torch.float64, generator=generator)
    if law.stratified:
        order = torch.stack([torch.randperm(images, generator=generator) for _ in range(law.draws)], 1)
        u = (torch.arange(law.draws) * images + order + u) / (images * law.draws)
    noise = torch.randn(images, law.draws, *shape, generator=generator)
    dropped = torch.rand(images, law.draws, generator=generator) < law.dropout
    return Rows(law.times(u).float().flatten(), noise.flatten(0, 1), dropped.flatten())


def mixed(x0: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, target), float32 as x0 and noise [R, ...]; times float32 [R]."""
    x0, noise = x0.float(), noise.float()
    s = times.view(-1, *[1] * (x0.dim() - 1))
    return (1 - s) * x0 + s * noise, noise - x0


def row_losses(predicted: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [R]: the mean squared error of each row of [R, ...], times its weight [R] if there are weights."""
    each = (predicted.float() - target.float()).square().flatten(1).mean(1)
    return each if weights is None else each * weights


def derivative_error(rows: torch.Tensor, eps: float, draws: int = 1) -> torch.Tensor:
    """float32 [J]: the standard error of each direction's derivative (L+ - L-) / (2 eps), as the choice of rows has it.

    rows : float32 [2 J, R], the loss of each row under +eps and -eps of each direction in turn
    draws : K, rows of each image, which are side by side and alike: an image's mean is one number of R / K that are
        taken as independent. NaN for one image.
    """
    each = ((rows[0::2] - rows[1::2]) / (2 * eps)).unflatten(1, (-1, draws)).mean(2)
    return each.std(1) / each.shape[1] ** 0.5
