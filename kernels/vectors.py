"""Codes that stand for vectors of eight weights, sums of codebook entries (AQLM, arXiv 2401.06118, section 3).

    W[n, 8j + i] = p[n] * sum over c of codebooks[c, code[n, j, c], i]

One scale to an output row: the perturbation is a factor of the finished sum, and a step of the loop knows nothing of
it. With codebooks of 256 entries the 8 KB of two stay in the L1 cache, which is the memory that "shared" is cut from;
the 1 MB of one with 65536 stays in L2. A vector is read by one 16-byte load, into the registers it is multiplied from.

Words, int16 [ceil(K/128), N, 16 * words]: the word w of vector j of a tile of 128 k lies at 16 w + j; it holds the
codes 2w (low byte) and 2w + 1 where indices have up to 8 bits, else the code w. K is padded to a multiple of 128 with
code 0, and x with zeros. A CPU keeps the same words.

Arithmetic: the entries in the type of the activations; those of a word are added and rounded to it once; the sums of
different words meet in the float32 accumulator.

Terms (codebook): docs/glossary.md.
"""
import functools

import torch
import triton
import triton.language as tl

from .codes import TILE_K, join_planes2

LENGTH = 8                    # weights of a vector
PER_TILE = TILE_K // LENGTH
MOST_BITS = 16


def words_of(books, bits):
    """16-bit words that hold the codes of a vector."""
    return -(-books // 2) if bits <= 8 else books


def vector_shape(n, k, books, bits):
    """[T, N, 16 * words]: the words of an [n, k] matrix."""
    return [-(-k // TILE_K), n, PER_TILE * words_of(books, bits)]


def pack_vectors(codes, bits):
    """Integer codes [N, K/8, C] in 0 .. 2^bits - 1 -> int16 words."""
    n, vectors, books = codes.shape
    wide = codes.to(torch.int32)
    if bits <= 8:
        wide = torch.nn.functional.pad(wide, (0, books % 2))
        wide = wide[:, :, 0::2] | wide[:, :, 1::2] << 8
    padded = torch.nn.functional.pad(wide, (0, 0, 0, -vectors % PER_TILE)).to(torch.int16)      # the 16 bits are kept
    return padded.view(n, -1, PER_TILE, wide.shape[2]).permute(1, 0, 3, 2).flatten(2).contiguous()


def unpack_vectors(words, k, books, bits):
    """Inverse of pack_vectors: -> int32 codes [N, K/8, C]."""
    tiles, n, _ = words.shape
    wide = words.view(tiles, n, -1, PER_TILE).permute(1, 0, 3, 2).reshape(n, tiles * PER_TILE, -1)[:, :k // LENGTH]
    wide = wide.to(torch.int32) & 0xFFFF
    if bits <= 8:
        wide = torch.stack([wide & 0xFF, wide >> 8], 3).flatten(2)[:, :, :books]
    return wide


def in_range(words, books, bits):
    """Whether every code in the words is an entry of its codebook: what the kernels rely on, and do not look at."""
    if bits == 16 or (bits == 8 and books % 2 == 0):
        return True
    wide = words.unflatten(2, (-1, PER_TILE)).to(torch.int32) & 0xFFFF
    if bits <= 8:
        pairs = wide[:, :, :books // 2]
        wide = torch.cat([pairs & 0xFF, pairs >> 8, wide[:, :, books // 2:]], 2)
    return not bool((wide >> bits).any())


def vector_rows(words, k, start, stop, codebooks, dtype):
    """float32 [stop - start, K]: the sums of entries, rounded as the kernel in `dtype` has them, of some output rows.

    codebooks: float32 [C, 2^bits, 8], whose entries are exact in dtype
    """
    books, entries, _ = codebooks.shape
    codes = unpack_vectors(words[:, start:stop], k, books, entries.bit_length() - 1).flatten(0, 1)
    flat = codebooks.flatten(0, 1)
    codes += torch.arange(0, books * entries, entries, dtype=torch.int32, device=codes.device)
    each = 2 if entries <= 256 else 1
    sums = None
    for some in codes.split(each, 1):
        part = torch.nn.functional.embedding_bag(some, flat, mode="sum")
        part = part.to(dtype).to(torch.float32) if dtype != torch.float32 else part
        sums = part if sums is None else sums.add_(part)
    return sums.view(stop - start, k)


def decoding_bytes(rows, k, books, bits):
    """Bytes that `vector_rows` holds for a while beside its result: codes and offsets of bags; where there are several
    words, one's codes and sums."""
    vectors, each = rows * k // LENGTH, 2 if bits <= 8 else 1
    return vectors * (4 * books + 12 + (4 * each + 4 * LENGTH if words_of(books, bits) > 1 else 0))


# ------------------------------------------------------------------------------------------------ in the kernel
# A register holds the words of two neighbouring vectors, a and b. Each is read by 16-byte loads into four registers of
# two weights: eight planes of 16 k, plane r having the weights 2r and 2r + 1 of every 16 k, since b follows a. So
# k goes through the dots in an order of its own (`order`), and x is read in it.

# The codebooks' address comes from the kernel's own parameter, by its name in PTX: Triton keeps only assembly of one
# operand in the layout of the tensor core's registers, and sends the planes through shared memory where there are two.

# A word's text is HEAD, STEP once for every word before it, then ONE or TWO, for as many codes as it holds.

_HEAD = """{{
.reg .b32 i, x<4>, y<4>, one; .reg .b64 p, base;
ld.param.u64 base, [{parameter}];
"""
_STEP = "add.u64 base, base, {size};\n"
_ONE = """
and.b32 i, $8, 0xffff; mad.wide.u32 p, i, 16, base; ld.global.nc.v4.b32 {$0, $1, $2, $3}, [p];
shr.u32 i, $8, 16; mad.wide.u32 p, i, 16, base; ld.global.nc.v4.b32 {$4, $5, $6, $7}, [p];
}"""
_TWO = """
mov.b32 one, 0x3f803f80;
and.b32 i, $8, 0xff; mad.wide.u32 p, i, 16, base; ld.global.nc.v4.b32 {{$0, $1, $2, $3}}, [p];
bfe.u32 i, $8, 8, 8; mad.wide.u32 p, i, 16, base; ld.global.nc.v4.b32 {{x0, x1, x2, x3}}, [p + {second}];
bfe.u32 i, $8, 16, 8; mad.wide.u32 p, i, 16, base; ld.global.nc.v4.b32 {{$4, $5, $6, $7}}, [p];
shr.u32 i, $8, 24; mad.wide.u32 p, i, 16, base; ld.global.nc.v4.b32 {{y0, y1, y2, y3}}, [p + {second}];
{add}
}}"""
_ADD = {torch.float16: "add.rn.f16x2 ${0}, ${0}, {1};", torch.bfloat16: "fma.rn.bf16x2 ${0}, ${0}, one, {1};"}


@functools.cache
def vector_texts(books, bits, dtype, parameter):
    """For each word of a vector, inline PTX from a register of two words to eight of two weights.

    parameter: the kernel's that points to the codebooks, in `dtype`. In float32, without assembly: marks.
    """
    count = words_of(books, bits)
    if dtype == torch.float32:
        return ("read",) * count
    add = "".join(_ADD[dtype].format(i, f"{'xy'[i // 4]}{i % 4}") for i in range(8))
    two = _TWO.format(second=16 << bits, add=add)
    head, step = _HEAD.format(parameter=parameter), _STEP.format(size=(2 if bits <= 8 else 1) * 16 << bits)
    return tuple(head + step * w + (two if bits <= 8 and 2 * w + 1 < books else _ONE) for w in range(count))


@triton.jit
def order(i):
    """The input, of the tile's first, that position i of the joined planes belongs to; 16 positions on it is 2 more."""
    return tl.max_contiguous(tl.multiple_of(16 * (i % 16 // 2) + 2 * (i // 16) + i % 2, 2), 2)


@triton.jit
def _by_assembly(q, PTX: tl.constexpr, DT: tl.constexpr):
    if DT == tl.bfloat16:
        return tl.inline_asm_elementwise(PTX, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [q], is_pure=True, pack=2,
                                         dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                                                tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16))
    else:
        return tl.inline_asm_elementwise(PTX, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [q], is_pure=True, pack=2,
                                         dtype=(tl.float16, tl.float16, tl.float16, tl.float16,
                                                tl.float16, tl.float16, tl.float16, tl.float16))


@triton.jit
def _plane(wp, r: tl.constexpr, books_ptr, BITS: tl.constexpr, TWO: tl.constexpr, DT: tl.constexpr):
    """Plane r as the assembly has it, element by element: for the interpreter, AMD and float32."""
    i = tl.arange(0, 16)
    q = tl.load(wp + (i // 2 * 2 + r // 4 - i)[None, :]).to(tl.int32) & 0xFFFF
    within = (r % 4 * 2 + i % 2)[None, :]
    if TWO:
        one = tl.load(books_ptr + (q & 255) * 8 + within).to(tl.float32)
        return (one + tl.load(books_ptr + ((q >> 8) + (1 << BITS)) * 8 + within).to(tl.float32)).to(DT)
    else:
        return tl.load(books_ptr + q * 8 + within)


@triton.jit
def vector_planes(wp, books_ptr, w: tl.constexpr, BITS: tl.constexpr, BOOKS: tl.constexpr, DT: tl.constexpr,
                  PTX: tl.constexpr, ASM: tl.constexpr):
    """The eight planes [n, 16] of word w of the tile whose `word_pointers` are wp.

    books_ptr: the codebooks in DT; PTX: the word's text of `vector_texts`.
    """
    both: tl.constexpr = BITS <= 8 and 2 * w + 1 < BOOKS
    at = wp + 16 * w
    if ASM:
        return _by_assembly(tl.load(at), PTX, DT)
    else:
        book = books_ptr + (2 * w if BITS <= 8 else w) * (8 << BITS)
        return (_plane(at, 0, book, BITS, both, DT), _plane(at, 1, book, BITS, both, DT),
                _plane(at, 2, book, BITS, both, DT), _plane(at, 3, book, BITS, both, DT),
                _plane(at, 4, book, BITS, both, DT), _plane(at, 5, book, BITS, both, DT),
                _plane(at, 6, book, BITS, both, DT), _plane(at, 7, book, BITS, both, DT))


@triton.jit
def join_eight(p, BN: tl.constexpr):
    """Eight planes [BN, 16] -> four [BN, 32]."""
    return (join_planes2(p[0], p[1], BN), join_planes2(p[2], p[3], BN), join_planes2(p[4], p[5], BN),
            join_planes2(p[6], p[7], BN))
