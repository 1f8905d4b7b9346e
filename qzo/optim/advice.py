"""What is said to a run whose losses mean little: they are not finite, not as many as evaluations, or
their difference is rounded away."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.arena import ScaleArena
from ..nn.layers import layers

ROUNDOFF = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9, torch.float32: 2.0**-24}


def against_nan(module: nn.Module, group: Mapping[str, Any]) -> str:
    """What to do about losses that are not finite; many models of bfloat16 leave float16's range."""
    first = ""
    if any(p.dtype == torch.float16 for p in module.parameters()):
        first = (
            f"float16 activations end at {torch.finfo(torch.float16).max:g}: load the model in bfloat16 or "
            "float32 (--dtype bfloat16 or float32); else "
        )
    rates = f"lower lr ({group['lr']:g}) or eps ({group['eps']:g})"
    return f"{first}{rates}, or check the data and what the closure computes"


def against_alike(steps: int, group: Mapping[str, Any]) -> str:
    """What to do where the losses of +eps and -eps never differed in the first `steps` steps."""
    return (
        f"the losses of +eps and -eps had the same bits in all of the first {steps} steps: the objective does not see "
        "the perturbation. Compute it inside the closure, with the module that this optimizer was made for, from "
        "nothing kept between calls; a metric that ties (accuracy or a reward over few rows) needs more rows or "
        f"directions, a larger eps ({group['eps']:g}), or finer values"
    )


def against_shape(losses: Any, count: int | None = None) -> str:
    """What a closure has to return instead: the losses of `count` evaluations, or (None) of the one it runs under."""
    got = list(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
    if count is None:
        return (
            f"with paired=False the closure must return one number, the loss of the evaluation it runs under; got {got}"
        )
    return (
        f"the closure must return a tensor [{count}], the loss of each evaluation; got {got}. Stack the batch with "
        "qzo.pair and use qzo.losses, or step(closure, paired=False)"
    )


def warn_if_rounded_away(module: nn.Module, arena: ScaleArena, eps: float, relative: bool) -> None:
    """Warn when the activations' rounding drowns L+ - L-.

    The rms error of L+ - L- over its rms size was measured near 1.25 * u / eps_relative, u the roundoff of the
    activations (4-layer network, eps 1e-3 and 1e-2, float16 and bfloat16).
    """
    dtypes = {p.dtype for p in module.parameters() if p.dtype in ROUNDOFF}
    if not dtypes or arena.data.is_meta:
        return
    dtype = max(dtypes, key=ROUNDOFF.__getitem__)
    size = 1.0
    if not relative:
        read = [layer.read_scales() for layer in layers(module).values()]
        size = sum(float(s.abs().sum()) for s in read) / sum(s.numel() for s in read)
    wanted = 5 * ROUNDOFF[dtype] * size
    if eps < wanted / 2:
        warnings.warn(
            f"eps={eps:g} is too small for {str(dtype).removeprefix('torch.')} activations: their rounding "
            f"is larger than the signal; use eps >= {wanted:.1g}, or float32/float16 activations",
            stacklevel=3,
        )
