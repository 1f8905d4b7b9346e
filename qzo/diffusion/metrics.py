"""How good a flow-matching model is, with nothing from a hub: losses on fixed rows, KID, pictures side by side.

The irreducible part of the loss dwarfs what training changes, so two models are compared on the same rows (x0, n, s),
by the differences of their losses; the standard error is that of independent images, whose own rows may be alike.

KID is the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, unbiased (Binkowski et al., arXiv
1801.01401, section 4), in the features of any network. It is no FID, and two KIDs compare only in the same network's
features: whoever prints one names the network.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL import Image

STRATA = 8  # equally likely intervals of the times; each image has rows in each of them
_BLOCK = 1 << 22  # entries of a kernel matrix held at a time


class FixedRows(NamedTuple):
    """Rows to measure on: row b * K + k is draw k of image b, its time in stratum k % STRATA.

    times : float32 [B K]
    noise : float32 [B K, *shape]
    """

    times: torch.Tensor
    noise: torch.Tensor


def fixed_rows(
    times: Callable[[torch.Tensor], torch.Tensor], images: int, draws: int, shape: tuple[int, ...], seed: int = 0
) -> FixedRows:
    """The same rows for the same arguments, on the CPU.

    times : the quantile function of the law of times, float64 [..] of probabilities -> times (`FlowLaw.times`)
    images : B
    draws : K, rows of each image; ValueError unless STRATA divides it
    shape : of a latent
    """
    if draws < 1 or draws % STRATA:
        raise ValueError(f"draws={draws}: each image has as many rows in each of {STRATA} strata; give a multiple")
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(images, draws, dtype=torch.float64, generator=generator)
    u = (torch.arange(draws) % STRATA + u) / STRATA
    noise = torch.randn(images * draws, *shape, generator=generator)
    return FixedRows(times(u).flatten().float(), noise)


class Difference(NamedTuple):
    """Losses after less losses before, on the same rows: negative is better.

    mean, error : over images, and its standard error
    strata, strata_errors : the same for each stratum of times, the first the least noisy
    """

    mean: float
    error: float
    strata: list[float]
    strata_errors: list[float]

    @property
    def z(self) -> float:
        """The mean in standard errors."""
        return self.mean / self.error if self.error else 0.0


def paired_difference(before: torch.Tensor, after: torch.Tensor, draws: int) -> Difference:
    """Compare two models on the rows of `fixed_rows`.

    before, after : [B K], losses of each row in its order
    draws : K

    ValueError: other shapes, or fewer than two images, which leave no standard error.
    """
    if before.shape != after.shape or before.dim() != 1 or draws % STRATA or len(before) % draws:
        raise ValueError(
            f"losses {list(before.shape)} and {list(after.shape)} are not those of {draws} rows of each image; give "
            "one number a row, of the same rows"
        )
    if len(before) < 2 * draws:
        raise ValueError(f"{len(before)} rows are those of one image: a standard error takes two or more")
    each = (after.double() - before.double()).view(-1, draws // STRATA, STRATA).mean(1)  # [B, STRATA]
    root = len(each) ** 0.5
    whole = each.mean(1)
    return Difference(
        float(whole.mean()), float(whole.std()) / root, each.mean(0).tolist(), (each.std(0) / root).tolist()
    )


class Discrepancy(NamedTuple):
    """An estimate, and its standard error (jackknife)."""

    value: float
    error: float


def features_of(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, rows: int = 64) -> torch.Tensor:
    """float32 [N, D]: what the network makes of images [N, C, H, W], `rows` at a time, flattened."""
    with torch.no_grad():
        return torch.cat([network(part).float().flatten(1) for part in images.split(rows)])


def kid(generated: torch.Tensor, real: torch.Tensor) -> Discrepancy:
    """Kernel distance of two sets of features, float [N, D] and [M, D]: 0 on average where they have one distribution.

    Computed from all pairs at once. Averages over random subsets, as other tools report it, have the same expectation
    and more variance. The error leaves one image out at a time.

    ValueError: features of different widths or of fewer than three images.
    """
    n, m = len(generated), len(real)
    if generated.dim() != 2 or real.shape[1:] != generated.shape[1:] or min(n, m) < 3:
        raise ValueError(
            f"features {list(generated.shape)} and {list(real.shape)}: give [N, D] and [M, D] of one network, of at "
            "least 3 images each"
        )
    x, y = generated.double(), real.double()
    of_x = _kernel_sums(x, x) - _kernel(x, x)  # of each image, over the others
    of_y = _kernel_sums(y, y) - _kernel(y, y)
    x_to_y, y_to_x = _kernel_sums(x, y), _kernel_sums(y, x)

    def combine(within_x: torch.Tensor, within_y: torch.Tensor, between: torch.Tensor, n: int, m: int) -> torch.Tensor:
        return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)

    total_x, total_y, total = of_x.sum(), of_y.sum(), x_to_y.sum()
    without_x = combine(total_x - 2 * of_x, total_y, total - x_to_y, n - 1, m)
    without_y = combine(total_x, total_y - 2 * of_y, total - y_to_x, n, m - 1)
    variance = sum((len(w) - 1) * w.var(correction=0) for w in (without_x, without_y))
    return Discrepancy(float(combine(total_x, total_y, total, n, m)), float(variance**0.5))


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[N]: the kernel of each row of x with that of y."""
    return ((x * y).mean(1) + 1) ** 3


def _kernel_sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[N]: the kernel of each row of x with all of y, summed."""
    width = x.shape[1]
    return torch.cat([((part @ y.T / width + 1) ** 3).sum(1) for part in x.split(max(1, _BLOCK // len(y)))])


def side_by_side(before: torch.Tensor, after: torch.Tensor, columns: int, zoom: int = 1) -> Image.Image:
    """One picture of samples before (left) and after (right), `columns` in each line of each, first samples first.

    before, after : [N, C, H, W] in [-1, 1], what lies outside cut off; C is 1 or 3, N a multiple of columns
    zoom : how many pixels a pixel becomes, each way
    """
    if before.shape != after.shape or before.dim() != 4 or before.shape[1] not in (1, 3) or len(before) % columns:
        raise ValueError(
            f"samples {list(before.shape)} and {list(after.shape)} in lines of {columns}: give as many before as "
            "after, [N, C, H, W] of 1 or 3 channels, N a multiple of the columns"
        )
    halves = [_tiled(samples, columns) for samples in (before, after)]
    gap = torch.ones(*halves[0].shape[:2], 2)
    joined = torch.cat([halves[0], gap, halves[1]], 2).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    levels = (joined * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.squeeze(2).numpy())


def _tiled(samples: torch.Tensor, columns: int) -> torch.Tensor:
    """[C, lines * H, columns * W] in [0, 1] of samples [N, C, H, W] in [-1, 1]."""
    lines = samples.detach().float().cpu().unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)
    return (lines.flatten(3).flatten(1, 2).clamp(-1, 1) + 1) / 2
