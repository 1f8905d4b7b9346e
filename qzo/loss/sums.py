"""Losses as exact sums: parts of a batch, on several ranks or one after another, add up to the bits of the whole.

Numbers are rounded to multiples of 2**-30 before they are added; sums of such below 2**23 are exact in float64, so no
order or division changes a bit. What is no sum (a mean, its part that a label bias does) is made of the sums of all.
"""

import torch

from .label_bias import centred

GRAIN = 2.0**30


def exact_sums(columns: torch.Tensor) -> torch.Tensor:
    """float [E, n, S] -> float64 [E, S], added over n."""
    return ((columns.double() * GRAIN).round() / GRAIN).sum(1)


def means(losses: torch.Tensor) -> torch.Tensor:
    """The loss of each evaluation of a step, float64 [E] where they lie, from what a closure returns of it.

    losses: of any float dtype; [E], which are themselves, or float64 [E, S], what `loss_sums` gives, added over all
    parts of the batch: a sum and a count, of which the mean is rounded to float32, and perhaps what `centred` takes.
    """
    if losses.dim() == 1:
        return losses.double()
    each = losses / losses[:, 1:2]
    return centred(each[:, 0], each[:, 2:]).float().double()


def fits(losses: torch.Tensor, count: int) -> bool:
    """Whether these are losses [count], or sums [count, S] of them."""
    return losses.shape[:1] == (count,) and (losses.dim() == 1 or (losses.dim() == 2 and losses.shape[1] > 1))
