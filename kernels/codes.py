"""Integer codes and where they lie: the kernel's planes, the CPU's rows, and the way from a word to exact floats.

Planes (GPU), int16 [ceil(K/128), N, 32]; word (t, n, i) of output row n holds four codes, 32 apart along k:

    bits      15..12         11..8          7..4          3..0
    k =    128t+96+i      128t+64+i      128t+32+i      128t+i

so a word lies where a 16-bit element (n, k = i) would, and loading packed words as matrix fragments already gives
the fragments of all four planes. K is padded to a multiple of 128 with code 8, the symmetric zero point.

Rows (CPU), uint8 [N, ceil(K/2) + 4]: code k in nibble k % 2 (low first) of byte k // 2, then float16 scale 1.0 and
float16 bias -8.0: the layout of torch.ops.quantized.embedding_bag_4bit_unpack, which then yields code - 8 exactly.
"""
import functools

import torch
import triton
import triton.language as tl

TILE_K = 128
ZERO = 8               # the symmetric zero point, and the code that padding holds

ROW_TAIL = (0x00, 0x3C, 0x00, 0xC8)   # float16 1.0, float16 -8.0, little-endian


# ------------------------------------------------------------------------------------------------ packing

def pack_planes(codes):
    """uint8 codes [N, K] in 0..15 -> int16 planes [ceil(K/128), N, 32]."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % TILE_K), value=ZERO)
    c = padded.to(torch.int32).view(n, -1, 4, 32)
    words = c[:, :, 0] | c[:, :, 1] << 4 | c[:, :, 2] << 8 | c[:, :, 3] << 12
    return words.to(torch.int16).permute(1, 0, 2).contiguous()     # the conversion wraps: it keeps the 16 bits


def unpack_planes(planes, k):
    """Inverse of pack_planes: -> uint8 codes [N, K]."""
    tiles, n, _ = planes.shape
    codes = torch.stack([(planes >> 4 * j) & 15 for j in range(4)], 2).to(torch.uint8)    # [T, N, 4, 32]
    return codes.permute(1, 0, 2, 3).reshape(n, tiles * TILE_K)[:, :k]


def pack_rows(codes):
    """uint8 codes [N, K] -> uint8 rows [N, ceil(K/2) + 4]."""
    n, k = codes.shape
    even = torch.nn.functional.pad(codes, (0, k % 2), value=ZERO)
    tail = torch.tensor(ROW_TAIL, dtype=torch.uint8, device=codes.device).expand(n, 4)
    return torch.cat([even[:, 0::2] | even[:, 1::2] << 4, tail], 1)


def unpack_rows(rows, k):
    """Inverse of pack_rows: -> uint8 codes [N, K]."""
    body = rows[:, :-4]
    return torch.stack([body & 15, body >> 4], 2).flatten(1)[:, :k]


@functools.cache
def _row_unpacker():
    """embedding_bag_4bit_unpack, or None where this build of torch lacks it or it fails all 256 bytes."""
    try:
        op = torch.ops.quantized.embedding_bag_4bit_unpack
        codes = torch.arange(256).view(16, 16).div(16, rounding_mode="floor").to(torch.uint8)
        codes = torch.cat([codes, codes.T], 1)
        exact = torch.equal(op(pack_rows(codes)), codes.float() - ZERO)
    except (AttributeError, RuntimeError):
        return None
    return op if exact else None


def centred_codes(codes, k, start, stop):
    """float32 (code - 8) [stop - start, K] of output rows start..stop, from planes or rows, on their device."""
    if codes.dtype == torch.uint8:
        part = codes[start:stop]
        unpack = _row_unpacker() if codes.device.type == "cpu" else None
        if unpack is not None and k % 2 == 0:
            return unpack(part)
        return unpack_rows(part, k).to(torch.float32).sub_(ZERO)
    return unpack_planes(codes[:, start:stop], k).to(torch.float32).sub_(ZERO)


# ------------------------------------------------------------------------------------------------ word -> floats
# Each code is or-ed into the low mantissa bits of a constant whose spacing there is 1 (or 16), then the constant is
# taken off: exact, no integer-to-float conversion. test_codes.py runs every 16-bit word through each formula.
#   bf16: 0x4300 = 128, spacing 1; code c gives 128 + c; fma(., 1, -136) = c - 8        0x3f80 = 1, 0xc308 = -136
#   fp16: 0x6400 = 1024, spacing 1; bits 3..0 give 1024 + c; - 1032 = c - 8             0x6408 = 1032
#         bits 7..4 in place give 1024 + 16 c; fma(., 1/16, -72) = c - 8                0x2c00 = 1/16, 0xd480 = -72
# lop3 0xea is (a & b) | c; pack=2 hands two int16 words to a 32-bit register, so every line does two codes.

@triton.jit
def _asm_bf16(q):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t1, t2, t3, one, off;
        shr.u32 t1, $4, 4; shr.u32 t2, $4, 8; shr.u32 t3, $4, 12;
        lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 $1, t1, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 $2, t2, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 $3, t3, 0x000f000f, 0x43004300, 0xea;
        mov.b32 one, 0x3f803f80; mov.b32 off, 0xc308c308;
        fma.rn.bf16x2 $0, $0, one, off;
        fma.rn.bf16x2 $1, $1, one, off;
        fma.rn.bf16x2 $2, $2, one, off;
        fma.rn.bf16x2 $3, $3, one, off;
        }""", "=&r,=&r,=&r,=&r,r", [q],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)


@triton.jit
def _asm_fp16(q):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t1, off, rcp, low;
        shr.u32 t1, $4, 8;
        lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 $2, t1, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $3, t1, 0x00f000f0, 0x64006400, 0xea;
        mov.b32 off, 0x64086408; mov.b32 rcp, 0x2c002c00; mov.b32 low, 0xd480d480;
        sub.f16x2 $0, $0, off;
        fma.rn.f16x2 $1, $1, rcp, low;
        sub.f16x2 $2, $2, off;
        fma.rn.f16x2 $3, $3, rcp, low;
        }""", "=&r,=&r,=&r,=&r,r", [q],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2)


@triton.jit
def _plain(q, j: tl.constexpr, DT: tl.constexpr):
    """Plane j of words q as code - 8: the asm's twin for the interpreter, AMD and float32."""
    c = (q >> (4 * j)) & 15
    if DT == tl.bfloat16:
        u = (c | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return u - tl.full((1, 1), 136.0, DT)
    elif DT == tl.float16:
        u = (c | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        return u - tl.full((1, 1), 1032.0, DT)
    else:
        return (c - 8).to(tl.float32)


@triton.jit
def unpack4(q, DT: tl.constexpr, ASM: tl.constexpr):
    """int16 words [n, 32] -> the four planes [n, 32] of code - 8, exact in DT (bf16, fp16 or fp32)."""
    if ASM:
        if DT == tl.bfloat16:
            return _asm_bf16(q)
        else:
            return _asm_fp16(q)
    else:
        return _plain(q, 0, DT), _plain(q, 1, DT), _plain(q, 2, DT), _plain(q, 3, DT)


@triton.jit
def join_planes2(a, b, BN: tl.constexpr):
    """[BN, 32] x 2 -> [BN, 64], b after a: a renaming of registers where the layouts allow it."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BN, 64))


@triton.jit
def join_planes4(a, b, c, d, BN: tl.constexpr):
    """[BN, 32] x 4 -> [BN, 128] in order a, b, c, d."""
    t = tl.join(tl.join(a, c), tl.join(b, d))                    # [BN, 32, plane bit 1, plane bit 0]
    return tl.reshape(tl.permute(t, (0, 2, 3, 1)), (BN, 128))
