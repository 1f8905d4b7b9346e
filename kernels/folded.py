"""Many rows: y = x . W(evaluation)^T + bias with the perturbed scale folded into the tensor core's 16-bit operand.

    W_e[n, k] = p_e[g(k), n] * c[n, k]      c = code - zero, or a table's entry; p_e as in qmm.py, in float32

qmm.py multiplies by p in the accumulator, exactly, and waits for the tensor cores once a group to do so. Here every
weight is rounded once to x's type, one accumulator runs through all of K, and nothing in the loop reads it: the
unpacking of one tile runs beside the products of the one before. It pays from about 128 rows per evaluation.

The arithmetic, bit for bit that of the reference implementation (high and low in x's type, of H significant bits, 11
or 8):

    P = round(256 p) to B bits, half away from zero        B = H + 1 + max(1, H - bits of c)
    high = P in x's type,  low = P - high in x's type
    w = c * high + (c * low), the inner product and the sum each rounded to x's type;  y = (x . w^T) / 256 + bias

so two packed instructions (a product, a fused multiply-add) for two weights, where one multiplication in float32 and a
conversion take five. B (19 for 4 bits, 15 for 8, 21 for 2, 13 for a table; in bfloat16 13, 10, 15, 10) is the largest
for which c * low is exact and c * high + c * low fits in float32: then w is c * P rounded once, and float32 arithmetic
finds the same bits.

Errors, relative to a weight. Rounding it: at most 2^-11 in float16 (2^-8 in bfloat16), RMS 2^-12.2 (2^-9.2). P: at
most 2^-B, common to its group; 2^-13 for a table is the largest in float16, 1/4 of the former. The first reaches the
derivative: (W+ - W-) / 2 eps is z W to 2^-12.2 / (sqrt(2) eps), 1.5 % RMS at eps 0.01 in float16, 12 % in bfloat16.
Range: 256, exactly undone, lifts small scales. In float16 a weight keeps its precision from 2^-22 to 255; below, w has
an absolute error of at most 2^-33; above, it is infinite. P is a multiple of 2^-24: of p that is 2^-32, or 2^-19 for
p = 2^-13. A table's c * low may lie below 2^-24 too, and is then itself rounded, by at most 2^-33 of a weight.

What stays with qmm.py: float32 x, float32 zero points, one scale to an output (there is nothing to fold), exact tables
and codebooks. With row-shared noise the scales are folded unperturbed, 1 + coef * k multiplies the sum as there.

Coefficient 0 has the bits of no noise. No splits, no scratch; shapes and the order of additions as in qmm.py.
"""
import torch
import triton
import triton.language as tl

from . import tiles
from .codes import TILE_K, middle
from .constants import INTEGER_ZEROS, Constants, of_operands
from .forms import join_dots, load_planes
from .noise import NO_NOISE, NONE, quad_noise, raw_noise
from .plan import lanes
from .qmm_torch import chunk_rows, perturb_torch
from .scales import factor, load_pair, next_quad, perturb

LIFT = 256.0
_LIFT = tl.constexpr(LIFT)
SIGNIFICANT = {torch.float16: 11, torch.bfloat16: 8}


# ------------------------------------------------------------------------------------------------ a quad of groups

@triton.jit
def _load_quad(scales_ptr, quad, N, n, C: tl.constexpr):
    """The four scales of each output n in a quad of groups."""
    at = scales_ptr + quad.to(tl.int64) * 4 * next_quad(N, C) + 4 * n
    s0, s1 = load_pair(at)
    s2, s3 = load_pair(at + 2)
    return s0, s1, s2, s3


@triton.jit
def _load_zeros(zeros_ptr, quad, G, N, n, C: tl.constexpr):
    """Their zero points, a byte each in one word; 0 where there are none."""
    word = tl.zeros(n.shape, tl.int32)
    if C.ZERO == INTEGER_ZEROS:
        for i in tl.static_range(4):
            g = tl.minimum(4 * quad + i, G - 1).to(tl.int64)
            word |= tl.load(zeros_ptr + g * N + n).to(tl.int32) << 8 * i
    return word


@triton.jit
def _perturb_quad(scales, seed, quad, coef, C: tl.constexpr):
    """The four scales under the noise of their quad."""
    if C.NOISE == NO_NOISE:
        return scales
    else:
        k0, k1, k2, k3 = quad_noise(seed, quad, C.NOISE, C.WIDE)
        return (perturb(scales[0], k0, coef, C.RELATIVE), perturb(scales[1], k1, coef, C.RELATIVE),
                perturb(scales[2], k2, coef, C.RELATIVE), perturb(scales[3], k3, coef, C.RELATIVE))


@triton.jit
def _drop_scales(scales, count: tl.constexpr):
    """The scales without the first `count`, those of the tile before."""
    if count == 1:
        return scales[1], scales[2], scales[3], scales[3]
    else:
        return scales[2], scales[3], scales[2], scales[3]


# --------------------------------------------------------------------------------------------------- one tile of 128 k

@triton.jit
def _halves(p, z, i, DT: tl.constexpr, C: tl.constexpr):
    """[BN, 1] words, from a number per lane: high in the lowest 16 bits, low in the next, and in a third 16 the zero
    point that is byte i of z, less the middle code. Lanes 2 n and 2 n + 1 hold the same where there are 2 BN."""
    BN: tl.constexpr = C.BN
    bits = (p * _LIFT).to(tl.int32, bitcast=True) + (1 << 23 - C.KEPT)
    p = (bits & -(1 << 24 - C.KEPT)).to(tl.float32, bitcast=True)
    high = p.to(DT)
    low = (p - high.to(tl.float32)).to(DT)
    word = high.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    word |= low.to(tl.int16, bitcast=True).to(tl.int32) << 16
    if C.ZERO == INTEGER_ZEROS:
        zero = (((z >> 8 * i) & 255) - C.MIDDLE).to(DT).to(tl.int16, bitcast=True)
        word = (word.to(tl.int64) & 0xFFFFFFFF) | (zero.to(tl.int64) << 32)
    if word.shape[0] == 2 * BN:
        word, _ = tl.split(tl.reshape(word, (BN, 2)))
    return word[:, None]


@triton.jit
def _halves_of_planes(scales, zeros, t, DT: tl.constexpr, C: tl.constexpr):
    """The words of `_halves` for each of the four planes of 32 k of tile t, whose groups' scales come first."""
    PER_TILE: tl.constexpr = C.PER_TILE
    group = t % C.PERIOD * PER_TILE       # the first, within the quad
    halves = ()
    for i in tl.static_range(PER_TILE):
        halves += (_halves(scales[i], zeros, group + i, DT, C),)
    return halves[0], halves[PER_TILE // 4], halves[PER_TILE // 2], halves[3 * PER_TILE // 4]


@triton.jit
def _fold(c, halves, DT: tl.constexpr, C: tl.constexpr):
    """w of the module's docstring, from codes less the middle one [BN, 32] and the words of its scales [BN, 1]."""
    if C.ZERO == INTEGER_ZEROS:
        c = c - (halves >> 32).to(tl.int16).to(DT, bitcast=True)
        halves = halves.to(tl.int32)
    if not C.ASM:
        high = halves.to(tl.int16).to(DT, bitcast=True).to(tl.float32)
        low = (halves >> 16).to(tl.int16).to(DT, bitcast=True).to(tl.float32)
        c = c.to(tl.float32)
        return (c * high + (c * low).to(DT).to(tl.float32)).to(DT)
    halves = tl.broadcast_to(halves, c.shape)
    if DT == tl.bfloat16:       # a product is a multiply-add of -0: sm_80 has no other
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 high, low, none;
            prmt.b32 high, $2, 0, 0x1010; prmt.b32 low, $2, 0, 0x3232; mov.b32 none, 0x80008000;
            fma.rn.bf16x2 low, $1, low, none;
            fma.rn.bf16x2 $0, $1, high, low;
            }""", "=r,r,r,r", [c, halves], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 high, low;
            prmt.b32 high, $2, 0, 0x1010; prmt.b32 low, $2, 0, 0x3232;
            mul.rn.f16x2 low, $1, low;
            fma.rn.f16x2 $0, $1, high, low;
            }""", "=r,r,r,r", [c, halves], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _load_x(xp, xk_at, k, t, h: tl.constexpr, K, C: tl.constexpr):
    """x of dot h of tile t, [DEPTH, BM]."""
    at: tl.constexpr = h * C.DEPTH
    if C.MASK_K:
        return tl.load(xp + (xk_at + at), mask=(t * 128 + at + k < K)[:, None], other=0.0)
    else:
        return tl.load(xp + (xk_at + at))


@triton.jit(do_not_specialize=["base4", "R", "G", "tiles"],
            do_not_specialize_on_alignment=["seeds_ptr", "coefs_ptr"])
def _folded_kernel(x_ptr, codes_ptr, scales_ptr, zeros_ptr, entries_ptr, bias_ptr, y_ptr, seeds_ptr, coefs_ptr,
                   base4: tl.int64, R: tl.int32, N: tl.int32, K: tl.int32, G: tl.int32, stride_x: tl.int32,
                   tiles: tl.int32, C: tl.constexpr):
    """grid = (cdiv(N, BN), row blocks); a tile holds rows of one evaluation. C: constants.Constants.

    LANES: BN or twice that, as many as the program has threads: scales and zero points are loaded, perturbed and cut
    into words by one thread a lane, and only the words pass to the weights' threads through shared memory. Of loads
    of fewer numbers than threads Triton thinks that every thread may repeat them where the weights are unpacked, and
    then passes the folded weights themselves through shared memory.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    blocks = tl.cdiv(R, BM)
    e = tl.program_id(1) // blocks
    first = (tl.program_id(1) % blocks) * BM
    local = tl.minimum(tl.arange(0, BM), R - 1 - first)         # surplus rows and outputs repeat the last one
    out_n = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(out_n, N - 1)
    lane_n = tl.minimum(tl.program_id(0) * BN + tl.arange(0, C.LANES) // (C.LANES // BN), N - 1)
    seed = tl.load(seeds_ptr + e)
    coef = tl.load(coefs_ptr + e)

    # 32-bit distances from a base that moves: pointers would be 64 bits and an addition each, in every tile
    k = tl.arange(0, C.DEPTH)
    xp = x_ptr + (e * R + first).to(tl.int64) * stride_x
    xk_at = local[None, :] * stride_x + k[:, None]
    cp = codes_ptr
    words_at = n[:, None] * C.WORDS + tl.arange(0, C.FIRST_WORDS)[None, :]
    # the next quad's scales and zero points are under way while this one's are used
    scales_ahead = _load_quad(scales_ptr, tiles * 0, N, lane_n, C)
    zeros_ahead = _load_zeros(zeros_ptr, tiles * 0, G, N, lane_n, C)
    scales = scales_ahead
    zeros = zeros_ahead
    acc = tl.zeros((BN, BM), tl.float32)
    tl.assume(tiles > 0)        # else ptxas sees zeros join the accumulator after the loop, and waits for every wgmma
    for t in range(0, tiles):
        if t % C.PERIOD == 0:
            quad = t // C.PERIOD
            scales = scales_ahead
            zeros = zeros_ahead
            after = tl.minimum(quad + 1, (G - 1) // 4)
            scales_ahead = _load_quad(scales_ptr, after, N, lane_n, C)
            zeros_ahead = _load_zeros(zeros_ptr, after, G, N, lane_n, C)
            scales = _perturb_quad(scales, seed, base4 + quad.to(tl.int64) * next_quad(N, C) + lane_n, coef, C)
        else:
            scales = _drop_scales(scales, C.PER_TILE)
        c = load_planes(cp + words_at, entries_ptr, 0, DT, C)
        p = _halves_of_planes(scales, zeros, t, DT, C)
        w = (_fold(c[0], p[0], DT, C), _fold(c[1], p[1], DT, C), _fold(c[2], p[2], DT, C), _fold(c[3], p[3], DT, C))
        dots = join_dots(w, C)
        for h in tl.static_range(128 // C.DEPTH):
            acc = tl.dot(dots[h], _load_x(xp, xk_at, k, t, h, K, C), acc)
        xp += 128
        cp += N * C.WORDS

    last = tl.full((BN,), 1 / _LIFT, tl.float32)
    if C.SHARED and C.LAW != NO_NOISE:
        k0, _, _, _ = quad_noise(seed, base4 + n, C.LAW, C.WIDE)
        last = last * factor(k0, coef)
    acc = acc * last[:, None]
    if C.BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    live = (first + tl.arange(0, BM) < R)[None, :] & (out_n < N)[:, None]
    to = (e * R + first + local)[None, :].to(tl.int64) * N + out_n[:, None]
    tl.store(y_ptr + to, acc.to(y_ptr.dtype.element_ty), mask=live)


def supports(weight, dtype, exact=False):
    """Whether a Weight's scales can be folded, for x of dtype; exact: as plan.Plan takes it."""
    return (dtype in SIGNIFICANT and weight.group in tiles.GROUPS and weight.group != weight.in_features
            and weight.zero_type in (None, torch.uint8) and not exact and weight.codebooks is None)


def kept(dtype, form):
    """B of the module's docstring."""
    significant = SIGNIFICANT[dtype]
    return significant + 1 + max(1, significant - form.significant(significant))


def launch(x, weight, perturbation, y, *, tile, asm):
    """Run the kernel on checked arguments, as plan.launch takes them; y [E*R, N] is filled.

    x is float16, or bfloat16 where its loss of signal is wanted: the caller asks its user. No scratch is held.
    Raises ValueError for a form that `supports` says no to.
    """
    m, k = x.shape
    n, law = weight.out_features, perturbation.law
    if not supports(weight, x.dtype):
        raise ValueError(f"{x.dtype} x [{m}, {k}], groups of {weight.group}, zero points {weight.zero_type or 'none'}: "
                         f"the folded form takes float16 or bfloat16 x, groups of {tiles.GROUPS} below K, and uint8 "
                         "zero points or none; use plan.launch")
    rows = m if law == NONE else m // len(perturbation)       # without noise all rows are one block
    entries, lookup = weight.form.lookup(_folded_kernel, x.dtype, False, weight.scales)
    constants = Constants(
        BM=tile.rows, BN=tile.outputs, LANES=lanes(tile), DEEP=tile.deep, DEPTH=TILE_K if tile.deep else 32,
        MASK_K=k % TILE_K != 0, BIAS=weight.bias is not None, KEPT=kept(x.dtype, weight.form),
        **of_operands(weight, perturbation, lookup, asm))
    limit = {"maxnreg": tile.registers} if tile.registers else {}       # an option that AMD's compiler lacks
    _folded_kernel[(triton.cdiv(n, tile.outputs), m // rows * triton.cdiv(rows, tile.rows))](
        x_ptr=x, codes_ptr=weight.codes, scales_ptr=weight.scales,
        zeros_ptr=weight.scales if weight.zeros is None else weight.zeros, entries_ptr=entries,
        bias_ptr=weight.scales if weight.bias is None else weight.bias, y_ptr=y, seeds_ptr=perturbation.seeds,
        coefs_ptr=perturbation.coefs, base4=weight.base4, R=rows, N=n, K=k, G=weight.groups, stride_x=x.stride(0),
        tiles=triton.cdiv(k, TILE_K), C=constants, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=False, **limit)


# ------------------------------------------------------------------------------------------ reference implementation

def folded_weight(c, p, dtype, form):
    """w of the module's docstring: `dtype` [N, K], from float32 c [N, G, group] and p [N, G]; 256 times the weight."""
    drop = 24 - kept(dtype, form)
    word = (p * LIFT).view(torch.int32) + (1 << drop - 1)
    p = (word & -(1 << drop)).view(torch.float32).unsqueeze(2)
    high = p.to(dtype).float()
    low = (p - high).to(dtype).float()
    return (c * high + (c * low).to(dtype).float()).to(dtype).flatten(1)


def folded_torch(x, weight, perturbation, y):
    """Fill y [E*R, N] as launch does, on any device, codes in planes or rows: the same weights, sums in float32."""
    k, law, scales = x.shape[1], perturbation.law, weight.scales
    n, count = y.shape[1], 1 if law == NONE else len(perturbation)
    step = chunk_rows(n, k)
    quads = torch.arange(scales.shape[0], device=x.device)[:, None] * weight.next_quad
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        c = weight.form.decode(weight.codes, k, part.start, part.stop, x.dtype)
        c = c.view(len(c), -1, weight.group)
        if weight.zeros is not None:
            c = c - (weight.zeros[:, part].to(torch.float32) - middle(weight.bits)).T.unsqueeze(2)
        at = weight.base4 + quads + torch.arange(part.start, part.stop, device=x.device)
        for e, (rows, out) in enumerate(zip(x.chunk(count), y.chunk(count), strict=True)):
            p, factor, coef = scales[:, part], 1 / LIFT, perturbation.coefs[e]
            if law != NONE and perturbation.shared:
                raw = raw_noise(law, perturbation.seeds[e], at[0])[:, 0]
                factor = factor * perturb_torch(1.0, raw, coef, True)
            elif law != NONE:
                p = perturb_torch(p, raw_noise(law, perturbation.seeds[e], at), coef, perturbation.relative)
            p = p.permute(1, 0, 2).reshape(len(c), -1)[:, :weight.groups]
            product = rows.float() @ folded_weight(c, p, x.dtype, weight.form).float().T * factor
            out[:, part] = product if weight.bias is None else product + weight.bias[part]
