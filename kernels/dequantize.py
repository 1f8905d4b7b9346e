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

from .codes import TILE_K, middle, word_pointers
from .constants import Constants, of_operands
from .forms import load_planes
from .noise import NO_NOISE, NONE, quad_noise, raw_noise
from .qmm_torch import perturb_torch
from .scales import load_pair, next_quad, perturb
from .vectors import order

SCRATCH_BYTES = 32 << 20
BLOCK = 32                   # output rows of a program


@triton.jit
def _perturbed_quad(scales_ptr, seeds_ptr, coefs_ptr, e, base4, quad, N, n, C: tl.constexpr):
    """The four scales of each output n in a quad of groups under evaluation e: of a whole row, one in all places."""
    here = n.to(tl.int64) if C.WHOLE_ROW else quad.to(tl.int64) * next_quad(N, C) + n
    p0, p1 = load_pair(scales_ptr + 4 * here)
    p2, p3 = load_pair(scales_ptr + 4 * here + 2)
    if C.WHOLE_ROW:
        p1 = p0
        p2 = p0
        p3 = p0
    if C.LAW != NO_NOISE:
        coef = tl.load(coefs_ptr + e)
        at = base4 + (n.to(tl.int64) if C.SHARED else here)
        k0, k1, k2, k3 = quad_noise(tl.load(seeds_ptr + e), at, C.LAW, C.WIDE)
        if C.SHARED or C.WHOLE_ROW:
            k1 = k0
            k2 = k0
            k3 = k0
        p0 = perturb(p0, k0, coef, C.RELATIVE)
        p1 = perturb(p1, k1, coef, C.RELATIVE)
        p2 = perturb(p2, k2, coef, C.RELATIVE)
        p3 = perturb(p3, k3, coef, C.RELATIVE)
    return p0, p1, p2, p3


@triton.jit
def _sum_of_passes(words, entries_ptr, DT: tl.constexpr, C: tl.constexpr):
    """float32 planes of what a tile's codes stand for, all passes together."""
    PASSES: tl.constexpr = C.PASSES
    w = load_planes(words, entries_ptr, 0, DT, C)
    planes = (w[0].to(tl.float32), w[1].to(tl.float32), w[2].to(tl.float32), w[3].to(tl.float32))
    for turn in tl.static_range(1, PASSES):
        w = load_planes(words, entries_ptr, turn, DT, C)
        planes = (planes[0] + w[0], planes[1] + w[1], planes[2] + w[2], planes[3] + w[3])
    return planes


@triton.jit
def _zero(zeros_ptr, g, G, N, n, C: tl.constexpr):
    """Zero points of group g less the middle code, [BN, 1]."""
    zp = zeros_ptr + n
    if not C.WHOLE_ROW:
        zp += tl.minimum(g, G - 1).to(tl.int64) * N
    return (tl.load(zp).to(tl.float32) - C.MIDDLE)[:, None]


@triton.jit(do_not_specialize=["e", "base4", "start", "G"])
def _dequantize_kernel(codes_ptr, scales_ptr, zeros_ptr, entries_ptr, w_ptr, seeds_ptr, coefs_ptr, e: tl.int32,
                       base4: tl.int64, start: tl.int32, rows: tl.int32, N: tl.int32, K: tl.int32, G: tl.int32,
                       tiles: tl.int32, C: tl.constexpr):
    """w [rows, K] = output rows start .. start + rows under evaluation e; grid = (cdiv(rows, BN), quads of groups)."""
    DT: tl.constexpr = w_ptr.dtype.element_ty
    PERIOD: tl.constexpr = C.PERIOD
    row = tl.program_id(0) * C.BN + tl.arange(0, C.BN)
    n = tl.minimum(start + row, N - 1)
    quad = tl.program_id(1)
    scales = _perturbed_quad(scales_ptr, seeds_ptr, coefs_ptr, e, base4, quad, N, n, C)
    i = order(tl.arange(0, 32)) if C.BOOKS else tl.arange(0, 32)
    for tt in tl.static_range(PERIOD):
        t = quad * PERIOD + tt
        words = word_pointers(codes_ptr, tl.minimum(t, tiles - 1), N, n, C.WORDS, C.FIRST_WORDS)
        planes = _sum_of_passes(words, entries_ptr, DT, C)
        for j in tl.static_range(4):
            w = planes[j]
            if C.ZERO:
                w = w - _zero(zeros_ptr, quad * 4 + tt * C.PER_TILE + j * C.PER_TILE // 4, G, N, n, C)
            w = w * scales[tt * C.PER_TILE + (0 if C.BOOKS else j * C.PER_TILE // 4)][:, None]
            k = t * 128 + j * (4 if C.BOOKS else 32) + i
            to = w_ptr + row[:, None].to(tl.int64) * K + k[None, :]
            tl.store(to, w.to(DT), mask=(row < rows)[:, None] & (k < K)[None, :])


def launch(weight, perturbation, w, *, e, start, asm, exact=False):
    """Fill w [rows, K] with output rows start .. start + rows under evaluation e. exact: as in plan.Options."""
    rows, k = w.shape
    count = triton.cdiv(k, TILE_K)
    entries, lookup = weight.form.lookup(_dequantize_kernel, w.dtype, exact, weight.scales)
    constants = Constants(BN=BLOCK, **of_operands(weight, perturbation, lookup, asm and w.dtype != torch.float32))
    _dequantize_kernel[(triton.cdiv(rows, BLOCK), triton.cdiv(count, constants.PERIOD))](
        codes_ptr=weight.codes, scales_ptr=weight.scales,
        zeros_ptr=weight.scales if weight.zeros is None else weight.zeros, entries_ptr=entries, w_ptr=w,
        seeds_ptr=perturbation.seeds, coefs_ptr=perturbation.coefs, e=e, base4=weight.base4, start=start, rows=rows,
        N=weight.out_features, K=k, G=weight.groups, tiles=count, C=constants, num_warps=4, enable_fp_fusion=False)


def dequantize_torch(weight, perturbation, w, *, e, start, exact=False):
    """Reference implementation of launch, on any device; the same bits for the integer laws."""
    rows, k = w.shape
    part = slice(start, start + rows)
    codes, n, shared = weight.codes, weight.out_features, perturbation.shared
    apart = 0 if shared else weight.next_quad
    quads = torch.arange(weight.scales.shape[0], device=codes.device)[:, None] * apart
    p = weight.scales[:, part]
    if perturbation.law != NONE:
        raw = raw_noise(perturbation.law, perturbation.seeds[e],
                        weight.base4 + quads + torch.arange(n, device=codes.device)[part])
        if shared:
            raw = raw[:, :, :1].expand_as(raw)
        p = perturb_torch(p, raw, perturbation.coefs[e], perturbation.relative)
    p = p.permute(1, 0, 2).reshape(rows, -1)[:, :weight.groups]
    units = weight.form.decode(codes, k, start, start + rows, w.dtype, exact)
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
