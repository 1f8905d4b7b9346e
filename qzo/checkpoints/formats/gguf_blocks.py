"""GGUF's block layouts: bytes to codes for the types that train, to floats for all.

Every formula keeps the order of operations of gguf's own quants.py, so the floats have its bits. What a block
holds, in order, and what it means (d, m and e are float16; s and t scale and minimum of a run of weights):

    Q4_0, Q4_1   d, (m,) nibbles                              d (c - 8), d c + m
    Q5_0, Q5_1   d, (m,) 32 high bits, nibbles                d (c - 16), d c + m
    Q8_0         d, int8                                      d c
    IQ4_NL       d, nibbles                                   d LEVELS[c]
    Q2_K         16 bytes of s and t, 64 of pairs, d, e                  d s c - e t
    Q3_K         32 bytes of high bits, 64 of low pairs, 12 of s, d      d (s - 32) (c - 4)
    Q4_K, Q5_K   d, e, 12 bytes of s and t, (32 of high bits,) nibbles   d s c - e t
    Q6_K         128 bytes of nibbles, 64 of high pairs, 16 int8 s, d    d s (c - 32)
"""

import torch

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = 0, 1, 2, 3, 6, 7, 8
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, BF16 = 10, 11, 12, 13, 14, 20, 30
# type -> weights and bytes of a block
BLOCKS = {
    F32: (1, 4),
    F16: (1, 2),
    BF16: (1, 2),
    Q4_0: (32, 18),
    Q4_1: (32, 20),
    Q5_0: (32, 22),
    Q5_1: (32, 24),
    Q8_0: (32, 34),
    IQ4_NL: (32, 18),
    Q2_K: (256, 84),
    Q3_K: (256, 110),
    Q4_K: (256, 144),
    Q5_K: (256, 176),
    Q6_K: (256, 210),
}
NAMES = {
    F32: "F32",
    F16: "F16",
    Q4_0: "Q4_0",
    Q4_1: "Q4_1",
    Q5_0: "Q5_0",
    Q5_1: "Q5_1",
    Q8_0: "Q8_0",
    Q2_K: "Q2_K",
    Q3_K: "Q3_K",
    Q4_K: "Q4_K",
    Q5_K: "Q5_K",
    Q6_K: "Q6_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    IQ4_NL: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    BF16: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
_FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4_NL


def halves(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 that begins at byte `at` of every block: [rows, blocks of a row]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def codes(blocks: torch.Tensor, kind: int) -> torch.Tensor:
    """uint8 [N, K] of Q4_0, Q4_1 or Q8_0 blocks [N, blocks of a row, bytes of a block]."""
    if kind == Q8_0:
        return blocks[..., 2:].bitwise_xor(128).flatten(1)  # int8 plus 128 is its top bit turned
    return _fields(blocks[..., 2 if kind == Q4_0 else 4 :], 16, 4).flatten(1)


def values(data: torch.Tensor, kind: int) -> torch.Tensor:
    """float32 (or the type's own floats) [rows, K] of rows' bytes, uint8 [rows, bytes of a row].

    ValueError for a quantized type's NaN or infinity.
    """
    if kind in _FLOATS:
        return data.view(_FLOATS[kind])
    found = _VALUES[kind](data.unflatten(1, (-1, BLOCKS[kind][1]))).flatten(1)
    if not bool(torch.isfinite(found).all()):
        raise ValueError("a block holds NaN or infinity: the file is damaged")
    return found


# ---------------------------------------------------------------------------------------------- type by type


def _fields(data: torch.Tensor, run: int, bits: int) -> torch.Tensor:
    """Bytes [..., B] as fields of `bits` bits [..., B * 8 / bits]: of each `run` bytes the lowest fields
    first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(-1)
    return (data.unflatten(-1, (-1, 1, run)) >> shifts & (1 << bits) - 1).flatten(-3)


def _d(blocks: torch.Tensor, at: int = 0) -> torch.Tensor:
    return halves(blocks, at).float().unsqueeze(-1)


def _runs(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """scales [..., R] times codes [..., W], scale r for the r-th of R equal runs."""
    return (scales.unsqueeze(-1) * codes.float().unflatten(-1, (scales.shape[-1], -1))).flatten(-2)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _d(blocks) * (_fields(blocks[..., 2:], 16, 4).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _d(blocks) * _fields(blocks[..., 4:], 16, 4).float() + _d(blocks, 2)


def _codes5(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return _fields(low, 16, 4) | _fields(high, 1, 1) << 4


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    return _d(blocks) * (_codes5(blocks[..., 2:6], blocks[..., 6:]).float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    return _d(blocks) * _codes5(blocks[..., 4:8], blocks[..., 8:]).float() + _d(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _d(blocks) * blocks[..., 2:].contiguous().view(torch.int8).float()


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _d(blocks) * torch.tensor(_LEVELS, dtype=torch.float32)[_fields(blocks[..., 2:], 16, 4).int()]


def _with_minima(
    d: torch.Tensor, scales: torch.Tensor, e: torch.Tensor, minima: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    offsets = (e * minima.float()).repeat_interleave(codes.shape[-1] // minima.shape[-1], -1)
    return _runs(d * scales.float(), codes) - offsets


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = blocks[..., :16]
    codes = _fields(blocks[..., 16:80], 32, 2)
    return _with_minima(_d(blocks, 80), scales & 15, _d(blocks, 82), scales >> 4, codes)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = _fields(blocks[..., 96:104], 8, 4) | _fields(blocks[..., 104:108], 4, 2) << 4
    codes = _fields(blocks[..., 32:96], 32, 2) | _fields(blocks[..., :32], 32, 1) << 2
    return _runs(_d(blocks, 108) * (scales.float() - 32), codes.float() - 4)


def _scales_minima(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight 6-bit scales and eight 6-bit minima out of 12 bytes: the nibbles of the last four bytes and the
    top pairs of the first eight make the upper four of each."""
    first, second, nibbles = data.split(4, -1)
    scales = torch.cat([first & 63, nibbles & 15 | first >> 6 << 4], -1)
    return scales, torch.cat([second & 63, nibbles >> 4 | second >> 6 << 4], -1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _scales_minima(blocks[..., 4:16])
    return _with_minima(_d(blocks), scales, _d(blocks, 2), minima, _fields(blocks[..., 16:], 32, 4))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _scales_minima(blocks[..., 4:16])
    codes = _fields(blocks[..., 48:], 32, 4) | _fields(blocks[..., 16:48], 32, 1) << 4
    return _with_minima(_d(blocks), scales, _d(blocks, 2), minima, codes)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    codes = _fields(blocks[..., :128], 64, 4) | _fields(blocks[..., 128:192], 32, 2) << 4
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    return _runs(_d(blocks, 208) * scales.float(), codes.float() - 32)


_VALUES = {
    Q4_0: _q4_0,
    Q4_1: _q4_1,
    Q5_0: _q5_0,
    Q5_1: _q5_1,
    Q8_0: _q8_0,
    IQ4_NL: _iq4_nl,
    Q2_K: _q2_k,
    Q3_K: _q3_k,
    Q4_K: _q4_k,
    Q5_K: _q5_k,
    Q6_K: _q6_k,
}
