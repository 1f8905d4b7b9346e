"""Round-to-nearest quantization with a least-squares refit of the scales.

Calibrated methods (GPTQ, AWQ, auto-round) start from better codes; this is the quantizer that needs no data.
"""

from collections.abc import Sequence

import torch

from ..kernels.codes import middle
from ..kernels.table import check_table
from .weights import PackedWeight, check_bits, check_group_size

ROUNDS = 3  # of rounding and refitting in turn; the error stops falling after two or three
BLOCK = 1 << 19  # weights quantized at a time: temporaries stay a few megabytes, in the cache


def quantize_weight(
    weight: torch.Tensor,
    group_size: int = 128,
    symmetric: bool = True,
    bits: int = 4,
    table: Sequence[float] | None = None,
) -> PackedWeight:
    """Quantize a float matrix [N, K] to 2, 4 or 8 bits in groups along K.

    symmetric: w ~ s * (code - 2^(bits - 1)), the widest magnitude on the first or the last code; else
    w ~ s * (code - zero), integer zero. Codes are rounded to nearest; the scale is then the least-squares one for these
    codes, sum(w c) / sum(c c), and the two alternate. Scales are rounded to float16, so that a checkpoint can hold them
    as they are.

    table: sixteen numbers that 4-bit codes stand for (kernels/table.py has NF4 and FP4). Then w ~ s * table[code] with
    the widest magnitude of a group on the table's, in float32, as bitsandbytes has it.

    Returns a PackedWeight on the weight's device. Raises ValueError for other bits, a table beside other bits than 4 or
    zero points, a group size that does not divide K and weights that are not finite.
    """
    check_form(bits, symmetric, table)
    table = None if table is None else check_table(table)
    group = check_group_size(group_size, weight.shape[1])
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity: it cannot be quantized")
    if table is not None:
        return _on_table(weight, group, table)
    parts = [
        _quantize_block(block.to(torch.float32).unflatten(1, (-1, group)), symmetric, bits)
        for block in weight.split(max(1, BLOCK // weight.shape[1]))
    ]
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return PackedWeight.from_codes(codes, scales.T, None if symmetric else zeros.T, bits)


def check_form(bits: int, symmetric: bool, table: Sequence[float] | None) -> None:
    """ValueError unless weights can be quantized so."""
    check_bits(bits)
    if table is not None and (bits != 4 or not symmetric):
        raise ValueError(
            "a table's codes have 4 bits and no zero points, got "
            + (f"bits={bits}" if bits != 4 else f"symmetric={symmetric}")
            + "; leave that out"
        )


def _on_table(weight: torch.Tensor, group: int, table: Sequence[float]) -> PackedWeight:
    """Each weight's nearest entry, the lower code of two alike."""
    entries = torch.tensor(table, device=weight.device)
    ordered, order = entries.sort(stable=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    codes, scales = [], []
    for block in weight.split(max(1, BLOCK // weight.shape[1])):
        w = block.to(torch.float32).unflatten(1, (-1, group))
        scale = w.abs().amax(2) / entries.abs().max()
        unit = w / torch.where(scale == 0, torch.ones_like(scale), scale).unsqueeze(2)
        codes.append(order[torch.bucketize(unit, middles)].flatten(1).to(torch.uint8))
        scales.append(scale)
    return PackedWeight.from_codes(torch.cat(codes), torch.cat(scales).T, table=table)


def _quantize_block(w: torch.Tensor, symmetric: bool, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w [N, G, g] -> codes uint8 [N, G*g], scales [N, G], zeros uint8 [N, G]."""
    low, high, most = w.amin(2), w.amax(2), (1 << bits) - 1
    if symmetric:
        zero = torch.full_like(low, middle(bits))
        scale = torch.maximum(low.abs(), high.abs()) / (most / 2)
    else:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / most
        zero = torch.where(scale > 0, (-low / scale).round().clamp(0, most), torch.zeros_like(low))
    scale = _representable(scale)
    codes = _round(w, scale, zero, most)
    for _ in range(ROUNDS):
        centred = codes - zero.unsqueeze(2)
        norm = (centred * centred).sum(2)
        refit = torch.where(norm > 0, (w * centred).sum(2) / norm, scale)
        scale = _representable(torch.where(refit > 0, refit, scale))
        codes = _round(w, scale, zero, most)
    return codes.flatten(1).to(torch.uint8), scale, zero.to(torch.uint8)


def _round(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, most: int) -> torch.Tensor:
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((w / safe.unsqueeze(2)).round() + zero.unsqueeze(2)).clamp(0, most)


def _representable(scale: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, kept in its finite range."""
    return scale.clamp(max=65504.0).to(torch.float16).to(torch.float32)
