"""Scales back into a file's own dtype."""

import torch


def stored_scales(scales: torch.Tensor, stored: torch.Tensor, name: str) -> torch.Tensor:
    """float32 `scales` in the dtype of `stored` (the file's tensor of the same shape), rounded once.

    A scale that equals the stored one keeps its bits. One too small for the dtype becomes its smallest value
    of the same sign (2^-24 in float16), never zero: a zero would freeze the group for good. Raises ValueError
    for a scale that is not finite or too large for the dtype.
    """
    rounded = scales.to(stored.dtype)
    limits = torch.finfo(stored.dtype)
    smallest = torch.full_like(scales, limits.smallest_normal * limits.eps).copysign(scales).to(stored.dtype)
    rounded = torch.where((rounded == 0) & (scales != 0), smallest, rounded)
    if not bool(torch.isfinite(rounded).all()):
        worst = float(scales[~torch.isfinite(rounded)].abs().max())
        raise ValueError(
            f"{name}: a scale of {worst:g} does not fit "
            f"{str(stored.dtype).removeprefix('torch.')} (largest {limits.max:g}); the run has "
            "diverged, nothing was written"
        )
    return torch.where(scales == stored.to(torch.float32), stored, rounded)


def new_scales(scales: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """float32 `scales` in the dtype of a file that is written anew; as `stored_scales`."""
    return stored_scales(scales, torch.zeros_like(scales, dtype=dtype), name)
