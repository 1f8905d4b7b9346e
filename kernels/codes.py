"""Integer codes of 2, 4 or 8 bits and where they lie: the kernel's planes, the CPU's rows, and the way from a word to
exact floats.

Planes (GPU), int16 [ceil(K/128), N, 8 * bits]: a tile of 128 k of every output row, then the next. Code k = 32 j + i
of a tile, j in 0..3 and i in 0..31, lies in

    8 bits    word 32 (j / 2) + i    from bit 8 (j % 2)
    4 bits    word i                 from bit 4 j
    2 bits    word i % 16            from bit 2 j + 8 (i / 16)

so a word lies where a 16-bit element (n, k = i) would, and loading packed words as matrix fragments already gives
the fragments of all planes of 32 k (with 2 bits: of 16). K is padded to a multiple of 128 with the middle code
2^(bits - 1), the symmetric zero point.

Rows (CPU), uint8: code k from bit bits * k % 8 of byte bits * k / 8, then a scale 1 and a bias -2^(bits - 1), float16
each (float32 with 8 bits): the layout of torch.ops.quantized.embedding_bag_{2bit,4bit,byte}_unpack, which then yields
code - 2^(bits - 1) exactly.

Terms (codes, plane): docs/glossary.md.
"""
import functools
import itertools

import torch
import triton
import triton.language as tl

TILE_K = 128
BITS = (2, 4, 8)
_SPLIT = {8: (2, 2, 1, 32), 4: (1, 4, 1, 32), 2: (1, 4, 2, 16)}     # a tile's k as [runs of words, j, byte, word]
_UNPACKERS = {2: "embedding_bag_2bit_unpack", 4: "embedding_bag_4bit_unpack", 8: "embedding_bag_byte_unpack"}


def middle(bits):
    """The symmetric zero point, which is also the code that padding holds."""
    return 1 << bits - 1


# ------------------------------------------------------------------------------------------------ packing

def plane_shape(n, k, bits):
    """[T, N, words]: the planes of an [n, k] matrix."""
    return [-(-k // TILE_K), n, 8 * bits]


def row_shape(n, k, bits):
    """[N, bytes]: the rows of an [n, k] matrix."""
    return [n, -(-k * bits // 8) + len(_row_tail(bits))]


def pack_planes(codes, bits=4):
    """uint8 codes [N, K] in 0 .. 2^bits - 1 -> int16 planes [ceil(K/128), N, 8 * bits]."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % TILE_K), value=middle(bits))
    c = padded.to(torch.int32).view(n, -1, *_SPLIT[bits])
    words = functools.reduce(torch.bitwise_or, [c[:, :, :, j, s] << bits * j + 8 * s for j, s in _fields(bits)])
    return words.to(torch.int16).flatten(2).permute(1, 0, 2).contiguous()   # the conversion wraps: it keeps the 16 bits


def unpack_planes(planes, k, bits=4):
    """Inverse of pack_planes: -> uint8 codes [N, K]."""
    tiles, n, _ = planes.shape
    runs, _, _, width = split = _SPLIT[bits]
    words = planes.view(tiles, n, runs, width)
    codes = torch.stack([(words >> bits * j + 8 * s) & (1 << bits) - 1 for j, s in _fields(bits)], 3).to(torch.uint8)
    return codes.view(tiles, n, *split).transpose(0, 1).reshape(n, tiles * TILE_K)[:, :k]


def _fields(bits):
    """(j, byte) of the codes of a word, in the order of k."""
    return itertools.product(range(_SPLIT[bits][1]), range(_SPLIT[bits][2]))


def _row_tail(bits):
    """The bytes of scale and bias that end each row."""
    values = torch.tensor([1.0, -middle(bits)], dtype=torch.float32 if bits == 8 else torch.float16)
    return values.view(torch.uint8)


def pack_rows(codes, bits=4):
    """uint8 codes [N, K] -> uint8 rows [N, ceil(K * bits / 8) + bytes of scale and bias]."""
    n, k = codes.shape
    per = 8 // bits
    parts = torch.nn.functional.pad(codes, (0, -k % per), value=middle(bits)).view(n, -1, per)
    body = functools.reduce(torch.bitwise_or, [parts[:, :, j] << bits * j for j in range(per)])
    return torch.cat([body, _row_tail(bits).to(codes.device).expand(n, -1)], 1)


def unpack_rows(rows, k, bits=4):
    """Inverse of pack_rows: -> uint8 codes [N, K]."""
    body = rows[:, :-len(_row_tail(bits))]
    return torch.stack([(body >> bits * j) & (1 << bits) - 1 for j in range(8 // bits)], 2).flatten(1)[:, :k]


@functools.cache
def _row_unpacker(bits):
    """torch's unpacker of rows, or None where this build lacks it or it fails any byte."""
    try:
        op = getattr(torch.ops.quantized, _UNPACKERS[bits])
        every = torch.arange(256, dtype=torch.uint8)
        codes = torch.stack([(every >> bits * j) & (1 << bits) - 1 for j in range(8 // bits)], 1).view(16, -1)
        exact = torch.equal(op(pack_rows(codes, bits)), codes.float() - middle(bits))
    except (AttributeError, RuntimeError):
        return None
    return op if exact else None


def centred_codes(codes, k, start, stop, bits=4):
    """float32 (code - 2^(bits - 1)) [stop - start, K] of output rows start..stop, from planes or rows, on their
    device."""
    if codes.dtype == torch.uint8:
        part = codes[start:stop]
        unpack = _row_unpacker(bits) if codes.device.type == "cpu" else None
        if unpack is not None and k * bits % 8 == 0:
            return unpack(part)
        return unpack_rows(part, k, bits).to(torch.float32).sub_(middle(bits))
    return unpack_planes(codes[:, start:stop], k, bits).to(torch.float32).sub_(middle(bits))


# ------------------------------------------------------------------------------------------------ word -> floats
# Each code is or-ed into the low mantissa bits of a constant whose spacing there is 1 (or 16), then the constant is
# taken off: exact, no integer-to-float conversion. test_codes.py runs every 16-bit word through each formula.
#   4 bits
#   bf16: 0x4300 = 128, spacing 1; code c gives 128 + c; fma(., 1, -136) = c - 8        0x3f80 = 1, 0xc308 = -136
#   fp16: 0x6400 = 1024, spacing 1; bits 3..0 give 1024 + c; - 1032 = c - 8             0x6408 = 1032
#         bits 7..4 in place give 1024 + 16 c; fma(., 1/16, -72) = c - 8                0x2c00 = 1/16, 0xd480 = -72
#   8 bits
#   bf16: bits 6..0 give 128 + r; bit 7 turns the constant -256 (0xc380) into -128 (0xc300); their sum is c - 128
#   fp16: a byte under 0x64 is 1024 + c; - 1152 = c - 128                               0x6480 = 1152
#   2 bits
#   bf16: 128 + c; fma(., 1, -130) = c - 2                                              0xc302 = -130
#   fp16: in place 1024 + c, 1024 + 4 c, 1024 + 16 c, 1024 + 64 c; -1026; then 1/4, -258; 1/16, -66; 1/64, -18
#         0x6402 = 1026; 0x3400 = 1/4, 0xdc08 = -258; 0x2c00 = 1/16, 0xd420 = -66; 0x2400 = 1/64, 0xcc80 = -18
# lop3 0xea is (a & b) | c, 0x6a (a & b) ^ c; pack=2 hands two int16 words to a 32-bit register, so every line does
# two codes.

@triton.jit
def _asm4_bf16(q):
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
def _asm4_fp16(q):
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
def _asm8_bf16(q):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t1, u1, u2, one;
        shr.u32 t1, $2, 8;
        mov.b32 one, 0x3f803f80;
        lop3.b32 u1, $2, 0x007f007f, 0x43004300, 0xea;
        lop3.b32 u2, t1, 0x007f007f, 0x43004300, 0xea;
        lop3.b32 $0, $2, 0x00800080, 0xc380c380, 0x6a;
        lop3.b32 $1, t1, 0x00800080, 0xc380c380, 0x6a;
        fma.rn.bf16x2 $0, u1, one, $0;
        fma.rn.bf16x2 $1, u2, one, $1;
        }""", "=&r,=&r,r", [q], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)


@triton.jit
def _asm8_fp16(q):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t1, off;
        shr.u32 t1, $2, 8;
        mov.b32 off, 0x64806480;
        lop3.b32 $0, $2, 0x00ff00ff, 0x64006400, 0xea;
        lop3.b32 $1, t1, 0x00ff00ff, 0x64006400, 0xea;
        sub.f16x2 $0, $0, off;
        sub.f16x2 $1, $1, off;
        }""", "=&r,=&r,r", [q], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)


@triton.jit
def _asm2_bf16(q):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t1, t2, t3, t4, t5, t6, t7, one, off;
        shr.u32 t1, $8, 8; shr.u32 t2, $8, 2; shr.u32 t3, $8, 10;
        shr.u32 t4, $8, 4; shr.u32 t5, $8, 12; shr.u32 t6, $8, 6; shr.u32 t7, $8, 14;
        lop3.b32 $0, $8, 0x00030003, 0x43004300, 0xea;
        lop3.b32 $1, t1, 0x00030003, 0x43004300, 0xea;
        lop3.b32 $2, t2, 0x00030003, 0x43004300, 0xea;
        lop3.b32 $3, t3, 0x00030003, 0x43004300, 0xea;
        lop3.b32 $4, t4, 0x00030003, 0x43004300, 0xea;
        lop3.b32 $5, t5, 0x00030003, 0x43004300, 0xea;
        lop3.b32 $6, t6, 0x00030003, 0x43004300, 0xea;
        lop3.b32 $7, t7, 0x00030003, 0x43004300, 0xea;
        mov.b32 one, 0x3f803f80; mov.b32 off, 0xc302c302;
        fma.rn.bf16x2 $0, $0, one, off;
        fma.rn.bf16x2 $1, $1, one, off;
        fma.rn.bf16x2 $2, $2, one, off;
        fma.rn.bf16x2 $3, $3, one, off;
        fma.rn.bf16x2 $4, $4, one, off;
        fma.rn.bf16x2 $5, $5, one, off;
        fma.rn.bf16x2 $6, $6, one, off;
        fma.rn.bf16x2 $7, $7, one, off;
        }""", "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [q],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True, pack=2)


@triton.jit
def _asm2_fp16(q):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t1, c0, c1, c2, c3, f1, f2, f3;
        shr.u32 t1, $8, 8;
        lop3.b32 $0, $8, 0x00030003, 0x64006400, 0xea;
        lop3.b32 $1, t1, 0x00030003, 0x64006400, 0xea;
        lop3.b32 $2, $8, 0x000c000c, 0x64006400, 0xea;
        lop3.b32 $3, t1, 0x000c000c, 0x64006400, 0xea;
        lop3.b32 $4, $8, 0x00300030, 0x64006400, 0xea;
        lop3.b32 $5, t1, 0x00300030, 0x64006400, 0xea;
        lop3.b32 $6, $8, 0x00c000c0, 0x64006400, 0xea;
        lop3.b32 $7, t1, 0x00c000c0, 0x64006400, 0xea;
        mov.b32 c0, 0x64026402; mov.b32 c1, 0xdc08dc08; mov.b32 c2, 0xd420d420; mov.b32 c3, 0xcc80cc80;
        mov.b32 f1, 0x34003400; mov.b32 f2, 0x2c002c00; mov.b32 f3, 0x24002400;
        sub.f16x2 $0, $0, c0;
        sub.f16x2 $1, $1, c0;
        fma.rn.f16x2 $2, $2, f1, c1;
        fma.rn.f16x2 $3, $3, f1, c1;
        fma.rn.f16x2 $4, $4, f2, c2;
        fma.rn.f16x2 $5, $5, f2, c2;
        fma.rn.f16x2 $6, $6, f3, c3;
        fma.rn.f16x2 $7, $7, f3, c3;
        }""", "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [q],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True, pack=2)


@triton.jit
def _plain(q, at: tl.constexpr, BITS: tl.constexpr, DT: tl.constexpr):
    """The code that begins at bit `at` of words q, less 2^(BITS - 1): what the assembly computes, for the
    interpreter, AMD and float32."""
    c = (q >> at) & ((1 << BITS) - 1)
    if BITS == 8 or DT == tl.float32:
        return (c - (1 << BITS - 1)).to(tl.float32).to(DT)
    elif DT == tl.bfloat16:
        u = (c | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return u - tl.full((1, 1), 128.0 + (1 << BITS - 1), DT)
    else:
        u = (c | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        return u - tl.full((1, 1), 1024.0 + (1 << BITS - 1), DT)


@triton.jit
def unpack2(q, DT: tl.constexpr, ASM: tl.constexpr):
    """int16 words [n, 16] -> eight [n, 16] of code - 2, exact in DT (bf16, fp16 or fp32); two make a plane of 32 k."""
    if not ASM:
        return (_plain(q, 0, 2, DT), _plain(q, 8, 2, DT), _plain(q, 2, 2, DT), _plain(q, 10, 2, DT),
                _plain(q, 4, 2, DT), _plain(q, 12, 2, DT), _plain(q, 6, 2, DT), _plain(q, 14, 2, DT))
    elif DT == tl.bfloat16:
        return _asm2_bf16(q)
    else:
        return _asm2_fp16(q)


@triton.jit
def unpack4(q, DT: tl.constexpr, ASM: tl.constexpr):
    """int16 words [n, 32] -> the four planes [n, 32] of code - 8, exact in DT."""
    if not ASM:
        return _plain(q, 0, 4, DT), _plain(q, 4, 4, DT), _plain(q, 8, 4, DT), _plain(q, 12, 4, DT)
    elif DT == tl.bfloat16:
        return _asm4_bf16(q)
    else:
        return _asm4_fp16(q)


@triton.jit
def unpack8(q, DT: tl.constexpr, ASM: tl.constexpr):
    """int16 words [n, 32] -> two planes [n, 32] of code - 128, exact in DT."""
    if not ASM:
        return _plain(q, 0, 8, DT), _plain(q, 8, 8, DT)
    elif DT == tl.bfloat16:
        return _asm8_bf16(q)
    else:
        return _asm8_fp16(q)


@triton.jit
def word_pointers(codes_ptr, t, N, n, WORDS: tl.constexpr, FIRST: tl.constexpr):
    """Pointers to the first words, [n, FIRST], of tile t of 128 k and output rows n, WORDS in all."""
    return codes_ptr + t.to(tl.int64) * N * WORDS + n[:, None] * WORDS + tl.arange(0, FIRST)[None, :]


@triton.jit
def load_tile(cp, BN: tl.constexpr, BITS: tl.constexpr, DT: tl.constexpr, ASM: tl.constexpr):
    """The four planes [BN, 32] of code - 2^(BITS - 1) of the tile whose `word_pointers` are cp, exact in DT."""
    q = tl.load(cp)
    if BITS == 2:
        a, b, c, d, e, f, g, h = unpack2(q, DT, ASM)
        return join_planes2(a, b, BN), join_planes2(c, d, BN), join_planes2(e, f, BN), join_planes2(g, h, BN)
    elif BITS == 4:
        return unpack4(q, DT, ASM)
    else:
        w0, w1 = unpack8(q, DT, ASM)
        w2, w3 = unpack8(tl.load(cp + 32), DT, ASM)
        return w0, w1, w2, w3


@triton.jit
def join_planes2(a, b, BN: tl.constexpr):
    """[BN, k] x 2 -> [BN, 2 k], b after a: a renaming of registers where the layouts allow it."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BN, 2 * a.shape[1]))


@triton.jit
def join_planes4(a, b, c, d, BN: tl.constexpr):
    """[BN, 32] x 4 -> [BN, 128] in order a, b, c, d."""
    t = tl.join(tl.join(a, c), tl.join(b, d))                    # [BN, 32, plane bit 1, plane bit 0]
    return tl.reshape(tl.permute(t, (0, 2, 3, 1)), (BN, 128))
