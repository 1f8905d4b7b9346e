"""PackedWeight: the one in-memory form of a quantized matrix, whatever file it came from.

    W[n, k] = scales[g, n] * (code[n, k] - zero[g, n]),   g = k // group_size

Readers (formats/) and the quantizer (quantize.py) make it, QZOLinear runs it, writers take it back.
"""
import dataclasses

import torch

from .kernels.codes import ZERO, pack_planes, pack_rows, unpack_planes, unpack_rows
from .kernels.tiles import GROUPS


def check_group_size(group_size, in_features):
    """The number of inputs that share a scale: `group_size`, or in_features for -1. ValueError if it does not fit."""
    if group_size in (-1, in_features):
        return in_features
    if group_size not in GROUPS:
        raise ValueError(f"group_size={group_size}: use one of {', '.join(map(str, GROUPS))}, or -1 for the whole row")
    if in_features % group_size:
        fits = [g for g in GROUPS if in_features % g == 0]
        raise ValueError(f"group_size={group_size} does not divide in_features={in_features}; "
                         f"use {', '.join(map(str, [*fits, -1]))} (-1: the whole row)")
    return group_size


@dataclasses.dataclass
class PackedWeight:
    """A 4-bit matrix [N, K] in groups along K.

    codes : uint8 rows [N, ceil(K/2) + 4] (CPU) or int16 planes [ceil(K/128), N, 32] (GPU); see kernels/codes.py
    scales : float32 [G, N], in the sign of the file
    zeros : None (every zero point is 8), uint8 [G, N], or float32 [G, N] (a float minimum m is zero = -m / scale)
    in_features : K, which the padded codes do not tell
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    in_features: int

    def __post_init__(self):
        groups, n = self.scales.shape
        if self.scales.dtype != torch.float32 or groups == 0 or self.in_features % groups:
            raise ValueError(f"scales must be float32 [G, N] with G dividing in_features={self.in_features}, got "
                             f"{self.scales.dtype} {list(self.scales.shape)}")
        check_group_size(self.group_size, self.in_features)
        if self.zeros is not None and (self.zeros.shape != self.scales.shape
                                       or self.zeros.dtype not in (torch.uint8, torch.float32)):
            raise ValueError(f"zeros must be uint8 or float32 {list(self.scales.shape)}, got {self.zeros.dtype} "
                             f"{list(self.zeros.shape)}")
        if self.out_features != n:
            raise ValueError(f"codes hold {self.out_features} output rows, scales {n}")
        if not bool(torch.isfinite(self.scales).all()):
            raise ValueError("scales hold NaN or infinity: the checkpoint is damaged")

    @classmethod
    def from_codes(cls, codes, scales, zeros=None):
        """From plain codes: uint8 [N, K] in 0..15, scales [G, N], zeros None or [G, N] (integer or float tensor)."""
        if codes.dtype != torch.uint8 or codes.dim() != 2 or (codes.numel() and int(codes.max()) > 15):
            raise ValueError(f"codes must be uint8 [N, K] in 0..15, got {codes.dtype} {list(codes.shape)}")
        if zeros is not None:
            zeros = zeros.to(torch.float32 if zeros.is_floating_point() else torch.uint8).contiguous()
            if zeros.dtype == torch.uint8 and bool((zeros == ZERO).all()):
                zeros = None
        pack = pack_rows if codes.device.type == "cpu" else pack_planes
        return cls(pack(codes), scales.to(torch.float32).contiguous(), zeros, codes.shape[1])

    @property
    def out_features(self):
        return self.codes.shape[0] if self.codes.dtype == torch.uint8 else self.codes.shape[1]

    @property
    def group_size(self):
        return self.in_features // self.scales.shape[0]

    def unpacked(self):
        """The codes as uint8 [N, K]."""
        return unpack_codes(self.codes, self.in_features)

    def dequantize(self):
        """float32 [N, K]: scale * (code - zero), the subtraction first."""
        g = self.group_size
        codes = self.unpacked().to(torch.float32).unflatten(1, (-1, g))
        zeros = ZERO if self.zeros is None else self.zeros.to(torch.float32).T.unsqueeze(2)
        return ((codes - zeros) * self.scales.T.unsqueeze(2)).flatten(1)


def unpack_codes(codes, k):
    """uint8 [N, K] from rows or planes."""
    return unpack_rows(codes, k) if codes.dtype == torch.uint8 else unpack_planes(codes, k)


def to_planes(codes, k):
    """Codes as int16 planes; the same tensor if they are already."""
    return pack_planes(unpack_rows(codes, k)) if codes.dtype == torch.uint8 else codes


def to_rows(codes, k):
    """Codes as uint8 rows; the same tensor if they are already."""
    return codes if codes.dtype == torch.uint8 else pack_rows(unpack_planes(codes, k))
