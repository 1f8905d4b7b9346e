"""Many rows, opt-in: a bounded chunk of the perturbed weight in x's own type, for a library's matmul.

    W_e[n, k] = p_e[g(k), n] * (code[n, k] - zero[g(k), n]),   p_e as in qmm.py, rounded once to 16 bits

This is the one place where perturbed weights are written down: at most SCRATCH_BYTES of them, a chunk of output rows
under one evaluation at a time. The rounding of a weight (2^-9 of it in bfloat16, 2^-12 in float16) is of the size of
what a small eps does to it; the fused kernel has none. Never the default: `large_rows="blas"` asks for it.

Shapes and arguments as in qmm.py and operands.py.
"""
import torch
import triton
import triton.language as tl

from . import tiles
from .codes import TILE_K, middle, unpack_planes, word_pointers
from .lookup import load_planes, lookups
from .noise import NONE, ROUNDS, quad_noise, raw_noise
from .plan import ZEROS, is_wide
from .qmm_torch import perturb_torch
from .scales import load_pair, perturb
from .table import table_entries
from .vectors import order, vector_rows

SCRATCH_BYTES = 32 << 20
BLOCK = 32                   # output rows of a program


@triton.jit(do_not_specialize=["e", "base4", "start", "G"])
def _dequantize_kernel(codes_ptr, scales_ptr, zeros_ptr, entries_ptr, w_ptr, seeds_ptr, coefs_ptr, e: tl.int32,
                       base4: tl.int64, start: tl.int32, rows: tl.int32, N: tl.int32, K: tl.int32, G: tl.int32,
                       tiles: tl.int32,
                       BN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, WHOLE_ROW: tl.constexpr,
                       LAW: tl.constexpr, RELATIVE: tl.constexpr, SHARED: tl.constexpr, WIDE: tl.constexpr,
                       ZERO_: tl.constexpr, ASM: tl.constexpr, BOOKS: tl.constexpr, PASSES: tl.constexpr,
                       HEAD: tl.constexpr, STEP: tl.constexpr, TABLE: tl.constexpr, LAST: tl.constexpr,
                       ROUNDS_: tl.constexpr):
    """w [rows, K] = output rows start .. start + rows under evaluation e; grid = (cdiv(rows, BN), quads of groups)."""
    DT: tl.constexpr = w_ptr.dtype.element_ty
    PER_TILE: tl.constexpr = 128 // GROUP           # groups in a tile of 128 k
    PERIOD: tl.constexpr = 4 // PER_TILE            # tiles in a quad of groups
    WORDS: tl.constexpr = 16 * PASSES if BOOKS else 8 * BITS
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(start + row, N - 1)
    quad = tl.program_id(1)
    here = n.to(tl.int64) if WHOLE_ROW else quad.to(tl.int64) * N + n
    p0, p1 = load_pair(scales_ptr + 4 * here)
    p2, p3 = load_pair(scales_ptr + 4 * here + 2)
    if WHOLE_ROW:
        p1 = p0
        p2 = p0
        p3 = p0
    if LAW != 0:
        seed = tl.load(seeds_ptr + e)
        coef = tl.load(coefs_ptr + e)
        k0, k1, k2, k3 = quad_noise(seed, base4 + (n.to(tl.int64) if SHARED else here), LAW, WIDE, ROUNDS_)
        if SHARED or WHOLE_ROW:
            k1 = k0
            k2 = k0
            k3 = k0
        p0 = perturb(p0, k0, coef, RELATIVE)
        p1 = perturb(p1, k1, coef, RELATIVE)
        p2 = perturb(p2, k2, coef, RELATIVE)
        p3 = perturb(p3, k3, coef, RELATIVE)
    scales = (p0, p1, p2, p3)
    i = order(tl.arange(0, 32)) if BOOKS else tl.arange(0, 32)
    for tt in tl.static_range(PERIOD):
        t = quad * PERIOD + tt
        words = word_pointers(codes_ptr, tl.minimum(t, tiles - 1), N, n, WORDS, 16 if BOOKS or BITS == 2 else 32)
        w0, w1, w2, w3 = load_planes(words, entries_ptr, 0, BN, BITS, BOOKS, DT,
                                     HEAD + (TABLE if PASSES > 1 else LAST), ASM)
        planes = (w0.to(tl.float32), w1.to(tl.float32), w2.to(tl.float32), w3.to(tl.float32))
        for turn in tl.static_range(1, PASSES):
            w0, w1, w2, w3 = load_planes(words, entries_ptr, turn, BN, BITS, BOOKS, DT,
                                         HEAD + STEP * turn + (TABLE if turn < PASSES - 1 else LAST), ASM)
            planes = (planes[0] + w0, planes[1] + w1, planes[2] + w2, planes[3] + w3)
        for j in tl.static_range(4):
            w = planes[j]
            if ZERO_ != 0:
                zp = zeros_ptr + n
                if not WHOLE_ROW:
                    zp += tl.minimum(quad * 4 + tt * PER_TILE + j * PER_TILE // 4, G - 1).to(tl.int64) * N
                w = w - (tl.load(zp).to(tl.float32) - (1 << BITS - 1))[:, None]
            w = w * scales[tt * PER_TILE + (0 if BOOKS else j * PER_TILE // 4)][:, None]
            k = t * 128 + j * (4 if BOOKS else 32) + i
            to = w_ptr + row[:, None].to(tl.int64) * K + k[None, :]
            tl.store(to, w.to(DT), mask=(row < rows)[:, None] & (k < K)[None, :])


def launch(weight, perturbation, w, *, e, start, asm, exact=False):
    """Fill w [rows, K] with output rows start .. start + rows under evaluation e. exact: as in plan.Plan."""
    rows, k = w.shape
    n, group, count = weight.out_features, weight.group, triton.cdiv(k, TILE_K)
    whole_row = group not in tiles.GROUPS or group == k
    period = 4 * (128 if whole_row else group) // TILE_K
    entries, lookup = lookups(_dequantize_kernel, weight.scales, w.dtype, weight.table, exact, weight.codebooks)
    _dequantize_kernel[(triton.cdiv(rows, BLOCK), triton.cdiv(count, period))](
        weight.codes, weight.scales, weight.scales if weight.zeros is None else weight.zeros, entries, w,
        perturbation.seeds, perturbation.coefs, e, weight.base4, start, rows, n, k, weight.groups, count,
        BN=BLOCK, BITS=weight.bits, GROUP=128 if whole_row else group, WHOLE_ROW=whole_row, LAW=perturbation.law,
        RELATIVE=bool(perturbation.relative), SHARED=bool(perturbation.shared), WIDE=is_wide(weight),
        ZERO_=ZEROS[weight.zero_type], ASM=bool(asm) and w.dtype != torch.float32, ROUNDS_=ROUNDS, **lookup,
        num_warps=4, enable_fp_fusion=False)


def dequantize_torch(weight, perturbation, w, *, e, start, exact=False):
    """Twin of launch, on any device; the same bits for the integer laws."""
    rows, k = w.shape
    part = slice(start, start + rows)
    codes, n, shared = weight.codes, weight.out_features, perturbation.shared
    quads = torch.arange(weight.scales.shape[0], device=codes.device)[:, None] * (0 if shared else n)
    p = weight.scales[:, part]
    if perturbation.law != NONE:
        raw = raw_noise(perturbation.law, perturbation.seeds[e],
                        weight.base4 + quads + torch.arange(n, device=codes.device)[part])
        if shared:
            raw = raw[:, :, :1].expand_as(raw)
        p = perturb_torch(p, raw, perturbation.coefs[e], perturbation.relative)
    p = p.permute(1, 0, 2).reshape(rows, -1)[:, :weight.groups]
    if weight.codebooks is not None:
        units = vector_rows(codes, k, start, start + rows, weight.codebooks.float(), w.dtype)
    elif weight.table is not None:
        units = table_entries(codes, k, start, start + rows, weight.table, w.dtype, exact)
    else:
        units = unpack_planes(codes[:, part], k, weight.bits).to(torch.float32).sub_(middle(weight.bits))
    units = units.view(rows, -1, weight.group)
    if weight.zeros is not None:
        units = units - (weight.zeros[:, part].to(torch.float32) - middle(weight.bits)).T.unsqueeze(2)
    w.copy_((units * p.unsqueeze(2)).view(rows, k))


def chunk_rows(k, dtype):
    """Output rows of a chunk: as many as SCRATCH_BYTES hold, in whole blocks of 128."""
    return max(128, SCRATCH_BYTES // (k * dtype.itemsize) // 128 * 128)


def matmul(x, weight, perturbation, y, *, asm, exact=False):
    """Fill y [E*R, N] as plan.launch does, chunk by chunk and evaluation by evaluation through a library's matmul.

    The evaluations' products have one shape, so that what the library rounds is common to both signs.
    """
    k, n, count = x.shape[1], y.shape[1], len(perturbation)
    step = min(n, chunk_rows(k, x.dtype))
    scratch = torch.empty(step, k, dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        w = scratch[:min(step, n - start)]
        part = slice(start, start + len(w))
        for e, (rows, out) in enumerate(zip(x.chunk(count), y.chunk(count), strict=True)):
            if e == 0 or perturbation.law != NONE:
                launch(weight, perturbation, w, e=e, start=start, asm=asm, exact=exact)
            if y.dtype == x.dtype:
                torch.mm(rows, w.T, out=out[:, part])
            else:
                out[:, part] = torch.mm(rows, w.T)
    if weight.bias is not None:
        y += weight.bias


def scratch_bytes(n, k, dtype):
    """Bytes that `matmul` holds for a while beside x and y."""
    return min(n, chunk_rows(k, dtype)) * k * dtype.itemsize
