"""Float zero points rounded to integers, for formats that hold no others, and what that costs."""

import dataclasses
from collections.abc import Mapping

import torch

from ..kernels.codes import middle
from ..nn.quantize import BLOCK
from ..nn.weights import PackedWeight
from ..system.progress import tracked
from .formats.rounding import new_scales


def with_integer_zeros(packed: Mapping[str, PackedWeight]) -> tuple[dict[str, PackedWeight], dict[str, float]]:
    """(layers, {name: error} of those whose zero points were floats): each zero point becomes the nearest integer that
    a code can be, and each scale the least-squares one for it, rounded to float16. Codes stay.

    error: the norm of what the weights changed by, over their own
    """
    shown = tracked(packed.items(), "rounding zero points", "layers")
    found = {name: _rounded(name, weight) for name, weight in shown if _is_float(weight)}
    return {name: found[name][0] if name in found else weight for name, weight in packed.items()}, {
        name: error for name, (_, error) in found.items()
    }


def _is_float(weight: PackedWeight) -> bool:
    return weight.zeros is not None and weight.zeros.is_floating_point()


def _rounded(name: str, weight: PackedWeight) -> tuple[PackedWeight, float]:
    assert weight.zeros is not None, name
    zeros = weight.zeros.round().clamp(0, (1 << weight.bits) - 1)
    step = max(1, BLOCK // weight.in_features)
    parts = (weight.unpacked(), zeros.T, weight.zeros.T, weight.scales.T)
    scales, changed, size = [], 0.0, 0.0
    for codes, zero, old, scale in zip(*(part.split(step) for part in parts), strict=True):
        columns = codes.to(torch.float32).unflatten(1, (-1, weight.group_size))
        now, was = columns - zero.unsqueeze(2), columns - old.unsqueeze(2)
        norm = now.square().sum(2)
        refit = torch.where(norm > 0, scale * (now * was).sum(2) / norm, scale)
        scales.append(new_scales(refit, torch.float16, name).float())
        wanted = was * scale.unsqueeze(2)
        changed += float((now * scales[-1].unsqueeze(2) - wanted).square().sum())
        size += float(wanted.square().sum())
    integers = None if bool((zeros == middle(weight.bits)).all()) else zeros.to(torch.uint8)
    made = dataclasses.replace(weight, scales=torch.cat(scales).T.contiguous(), zeros=integers)
    return made, (changed / size) ** 0.5 if size else 0.0
