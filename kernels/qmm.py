"""y = x . W(evaluation)^T + bias, the weights never leaving their few bits.

    W_e[n, k] = p_e[g(k), n] * (code[n, k] - zero[g(k), n])
    p_e = s * (1 + c_e * k(seed_e))   (relative)    or    s + c_e * k(seed_e)   (absolute)

x holds E row blocks, block e runs under evaluation e. Codes go from packed words to tensor-core registers, the noise
comes from its seed, the scale meets the float32 accumulator once per group: neither the noise nor a perturbed weight
is ever stored. Paper: QZO, arXiv 2505.13430, section 3; the arithmetic is ours, one rounding per written operation.

With a table (table.py) the code stands for an entry, W_e[n, k] = p_e[g(k), n] * table[code[n, k]]. With codebooks
(vectors.py) codes stand for eight weights, W_e[n, 8j + i] = p_e[n] * sum over c of codebooks[c, code[n, j, c], i].

With one z per output row (row-shared noise) the perturbation leaves the sum, y = (x . W^T) * (1 + c_e * k[n]) + bias,
with k[n] that of the row's first scale.

The reference implementation, in plain torch and fast enough to train with on a CPU, is qmm_torch.py beside this file.

Shapes: x [E*R, K], y [E*R, N]; W is a Weight whose codes are planes, the evaluations a Perturbation (operands.py). One
launch may multiply x by up to three weights, which differ in what has a 1 or a 2 in its name, and in nothing else.
Which tile, constants and scratch a launch has, plan.py tells; what the constants mean, constants.py.

A program makes one tile of y, of rows of one evaluation, or of a pair that has one seed: the pair's rows alternate in
the tile, so that which coefficient a column has is known from the accumulator's register and costs no instruction. All
outputs of a row block run side by side: x is then read from memory once, and the codes, a quarter of its bytes per
element, stay in the L2 cache from one row block to the next.

Operands are swapped, y^T = W x^T, so that the codes are the tensor core's register operand and never pass through
shared memory once unpacked. Each step of the loop is one tile of 128 k. Float zero points need no subtraction for each
code: sums_ptr [G, M] holds each group's sum of x, and a group's part of y is s * (sum (q-m) x - (zero-m) sum x), with m
the middle code. A launch that begins before the one ahead of it has ended waits for it before it reads anything that is
not its weight's; codes and scales are by then on their way.

Order of additions, which makes results reproducible: within a dot as the hardware has it, groups in order of k,
splits in order 0, 1, ...; no float atomics. Programs that share K leave their parts in partials_ptr, float32
[splits, M, N] of one weight after another.

Terms (split): docs/glossary.md.
"""
import inspect

import triton
import triton.language as tl

from .codes import word_pointers
from .constants import FLOAT_ZEROS, INTEGER_ZEROS
from .forms import join_dots, load_planes
from .noise import NO_NOISE, drop_noise, hold_none, quad_noise
from .scales import (
    coefs_of_lanes,
    columns,
    factor,
    group_factors,
    load_scales,
    next_quad,
    next_tile,
    noise_of_tile,
    outputs_of_lanes,
    perturb,
)
from .vectors import order

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None
if gdc_wait is not None and "_semantic" not in inspect.signature(gdc_wait).parameters:
    gdc_launch_dependents = gdc_wait = None     # Triton 3.4 cannot call its own: launches follow one another


# ------------------------------------------------------------------------------- which weight, which rows, read ahead

@triton.jit
def _member(second, third, a, b, c, C: tl.constexpr):
    """Of a, b and c that which belongs to this program's member; scalars, chosen without a jump."""
    chosen = tl.where(second, b, a)
    if C.MEMBERS == 3:
        chosen = tl.where(third, c, chosen)
    return chosen


@triton.jit
def _own_weight(y_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, base4, N,
                y1_ptr, codes1_ptr, scales1_ptr, zeros1_ptr, bias1_ptr, base4_1, N1,
                y2_ptr, codes2_ptr, scales2_ptr, zeros2_ptr, bias2_ptr, base4_2, N2, C: tl.constexpr):
    """(tile of the weight's outputs, outputs of the weights ahead of it, of all weights, and what is the weight's own)
    of the weight that this program multiplies by."""
    tile_n = tl.program_id(0)
    if C.MEMBERS == 1:
        return tile_n, 0, N, y_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, base4, N
    else:
        end = tl.cdiv(N, C.BN)
        end1 = end + tl.cdiv(N1, C.BN)
        second = tile_n >= end
        third = tile_n >= end1
        tile_n -= _member(second, third, 0, end, end1, C)
        outputs = N + N1
        if C.MEMBERS == 3:
            outputs += N2
        before = _member(second, third, 0, N, N + N1, C)
        if C.ZERO:
            zeros_ptr = _member(second, third, zeros_ptr, zeros1_ptr, zeros2_ptr, C)
        if C.BIAS:
            bias_ptr = _member(second, third, bias_ptr, bias1_ptr, bias2_ptr, C)
        return (tile_n, before, outputs, _member(second, third, y_ptr, y1_ptr, y2_ptr, C),
                _member(second, third, codes_ptr, codes1_ptr, codes2_ptr, C),
                _member(second, third, scales_ptr, scales1_ptr, scales2_ptr, C), zeros_ptr, bias_ptr,
                _member(second, third, base4, base4_1, base4_2, C), _member(second, third, N, N1, N2, C))


@triton.jit
def _own_rows(R, C: tl.constexpr):
    """(first evaluation, row of x of each column, whether it belongs to a pair's second evaluation, whether it is one
    that is stored): surplus columns repeat the last row."""
    blocks = tl.cdiv(R * C.EACH, C.BM)
    e = tl.program_id(1) // blocks * C.EACH
    column = (tl.program_id(1) % blocks) * C.BM + tl.arange(0, C.BM)
    local = column // C.EACH
    minus = column % 2 == 1
    row = e * R + tl.minimum(local, R - 1)
    if C.PAIR:
        row += tl.where(minus, R, 0)
    return e, row, minus, local < R


@triton.jit
def _to_l2(at):
    """Ask for the lines at these addresses to be in L2 once they are loaded: nothing is read."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False,
                              pack=1)


@triton.jit
def _fetch_ahead(codes_ptr, scales_ptr, first, last, tile_n, N, C: tl.constexpr):
    """The program's first two tiles of codes and its first quad of scales, in lines of 128 bytes."""
    BN: tl.constexpr = C.BN
    WORDS: tl.constexpr = C.WORDS
    quad = 0 if C.WHOLE_ROW else first // C.PERIOD
    scale = tl.minimum(tile_n * BN + 8 * tl.arange(0, BN // 8), N - 1)
    _to_l2(scales_ptr + 4 * (quad * next_quad(N, C) + scale))
    if WORDS & (WORDS - 1) == 0:
        line = tl.minimum(tile_n * BN * WORDS + 64 * tl.arange(0, BN * WORDS // 64), (N - 1) * WORDS)
        for t in tl.static_range(2):
            tile = tl.minimum(first + t, last - 1).to(tl.int64)
            _to_l2(codes_ptr + tile * N * WORDS + line)


# --------------------------------------------------------------------------------------------------- one tile of 128 k

@triton.jit
def _centred_zero(zeros_ptr, g, N, n, DT: tl.constexpr, C: tl.constexpr):
    """Integer zero point minus the middle code, exact in DT."""
    return (tl.load(zeros_ptr + g.to(tl.int64) * N + n).to(tl.int32) - C.MIDDLE).to(DT)[:, None]


@triton.jit
def _subtract_zeros(planes, zeros_ptr, t, G, N, n, DT: tl.constexpr, C: tl.constexpr):
    """The four planes of tile t less the integer zero points of their groups."""
    PER_TILE: tl.constexpr = C.PER_TILE
    zeros = ()
    for i in tl.static_range(PER_TILE):
        g = tl.minimum(t * PER_TILE + i, G - 1)
        if C.WHOLE_ROW:
            g = g * 0
        zeros += (_centred_zero(zeros_ptr, g, N, n, DT, C),)
    return (planes[0] - zeros[0], planes[1] - zeros[PER_TILE // 4], planes[2] - zeros[PER_TILE // 2],
            planes[3] - zeros[3 * PER_TILE // 4])


@triton.jit
def _load_x(xp, k, t, h: tl.constexpr, K, C: tl.constexpr):
    """x of dot h of tile t, [DEPTH, BM]."""
    at: tl.constexpr = h * C.NEXT
    if C.MASK_K:
        return tl.load(xp + at, mask=(t * 128 + at + k < K)[:, None], other=0.0)
    else:
        return tl.load(xp + at)


@triton.jit
def _rescale(acc, prev, s, C: tl.constexpr):
    """Ratio form: bring the accumulator from units of `prev` to units of s. |s| < 1e-20 counts as 1e-20 here.

    ASM: one reciprocal instruction, within one unit in the last place, in place of a division that guards against
    denormal and huge divisors: 15 instructions a step less, and no scale is either (< 8e37, where it would be 0).
    """
    s = tl.where(tl.abs(s) < 1e-20, 1e-20, s)
    if C.ASM:
        inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [s], dtype=tl.float32, is_pure=True,
                                            pack=1)
    else:
        inverse = 1.0 / s
    return acc * columns(prev * inverse, C.BN, C.BM), s


@triton.jit
def _begin_group(acc, prev, scales, held, h: tl.constexpr, coef, coef1, C: tl.constexpr):
    """(accumulator, its units, where the products of the group that begins with dot h are added)."""
    BN: tl.constexpr = C.BN
    BM: tl.constexpr = C.BM
    if C.RATIO:
        acc, prev = _rescale(acc, prev, group_factors(scales, held, h, coef, coef1, C), C)
        return acc, prev, acc
    else:
        return acc, prev, tl.zeros((BN, BM), tl.float32)


@triton.jit
def _end_group(acc, partial, scales, held, h: tl.constexpr, coef, coef1, C: tl.constexpr):
    """The accumulator with the products of the group that ends with dot h."""
    if C.RATIO:
        return partial
    else:
        return tl.fma(partial, columns(group_factors(scales, held, h, coef, coef1, C), C.BN, C.BM), acc)


@triton.jit
def _shift_group(partial, zeros_ptr, sums_ptr, t, h: tl.constexpr, G, M, N, n, row, C: tl.constexpr):
    """A group's products less its float zero points times its sum of x: s * (sum (q-m) x - (zero-m) sum x)."""
    group = t * C.PER_TILE + h * C.DEPTH // C.GROUP
    g = tl.minimum(group, G - 1).to(tl.int64)
    # a group past the last has no x, but absolute noise gives even it a scale
    shift = tl.where(group < G, C.MIDDLE - tl.load(zeros_ptr + g * N + n), 0.0)
    return tl.fma(shift[:, None], tl.load(sums_ptr + g * M + row)[None, :], partial)


# ------------------------------------------------------------------------------------------------------ after the loop

@triton.jit
def _choose(minus, s, r, PAIR: tl.constexpr):
    """[BN, BM] factors: s of every column, or r where the column belongs to the pair's second evaluation."""
    if PAIR:
        return tl.where(minus[None, :], r[:, None], s[:, None])
    else:
        return s[:, None]


@triton.jit
def _scale_rows(acc, scales_ptr, zeros_ptr, sums_ptr, seed, coef, coef1, minus, base4, n, row, first, C: tl.constexpr):
    """One scale to an output: the zero point, then the perturbed scale, of the sum over all of K."""
    if C.ZERO == FLOAT_ZEROS:   # noqa: SIM102  known at compile time, the other is not
        if first == 0:    # once, not once per split
            shift = C.MIDDLE - tl.load(zeros_ptr + n)
            acc = tl.fma(shift[:, None], tl.load(sums_ptr + row)[None, :], acc)
    s = tl.load(scales_ptr + 4 * n)
    if C.LAW == NO_NOISE or C.SHARED:
        return acc * columns(s, C.BN, C.BM)
    else:
        k0, _, _, _ = quad_noise(seed, base4 + n, C.LAW, C.WIDE)
        return acc * _choose(minus, perturb(s, k0, coef, C.RELATIVE), perturb(s, k0, coef1, C.RELATIVE), C.PAIR)


@triton.jit
def _factor_rows(acc, seed, coef, coef1, minus, base4, n, C: tl.constexpr):
    """One z to an output: the sum times 1 + c z, with that of the output's first scale."""
    k0, _, _, _ = quad_noise(seed, base4 + n, C.LAW, C.WIDE)
    return acc * _choose(minus, factor(k0, coef), factor(k0, coef1), C.PAIR)


@triton.jit
def _store(y_ptr, bias_ptr, n, to, acc, live, C: tl.constexpr):
    """Add the bias, round, store."""
    if C.BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    tl.store(y_ptr + to, acc.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _finish(y_ptr, bias_ptr, partials_ptr, counters_ptr, n, to, acc, live, before, outputs, M, C: tl.constexpr):
    """Store the sum; where programs share K, leave this one's part of it: the last program of a tile adds all parts,
    always in order 0, 1, 2, ...

    A counter of the tile tells which is the last, and is 0 again when that one is done. The barrier and the counter's
    release make every part visible before it is counted; parts are read past the L1 cache.
    """
    if C.SPLITS == 1:
        _store(y_ptr, bias_ptr, n, to, acc, live, C)
    else:
        at = partials_ptr + M.to(tl.int64) * before + to
        size = M.to(tl.int64) * outputs
        tl.store(at + tl.program_id(2).to(tl.int64) * size, acc, mask=live)
        tl.debug_barrier()
        counter = counters_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == C.SPLITS - 1:
            total = tl.load(at, mask=live, other=0.0, cache_modifier=".cg")
            for split in range(1, C.SPLITS):
                total += tl.load(at + split * size, mask=live, other=0.0, cache_modifier=".cg")
            _store(y_ptr, bias_ptr, n, to, total, live, C)
            tl.store(counter, 0)


# ---------------------------------------------------------------------------------------------------------- the kernel

@triton.jit(do_not_specialize=["base4", "base4_1", "base4_2", "R", "M", "G", "tiles", "tiles_per_split"],
            do_not_specialize_on_alignment=["seeds_ptr", "coefs_ptr"])
def _qmm_kernel(x_ptr, seeds_ptr, coefs_ptr, partials_ptr, sums_ptr, y_ptr, y1_ptr, y2_ptr,
                codes_ptr, scales_ptr, zeros_ptr, bias_ptr, codes1_ptr, scales1_ptr, zeros1_ptr, bias1_ptr,
                codes2_ptr, scales2_ptr, zeros2_ptr, bias2_ptr, entries_ptr, counters_ptr,
                base4: tl.int64, N: tl.int32, base4_1: tl.int64, N1: tl.int32, base4_2: tl.int64, N2: tl.int32,
                R: tl.int32, M: tl.int32, K: tl.int32, G: tl.int32, stride_x: tl.int32, tiles: tl.int32,
                tiles_per_split: tl.int32, C: tl.constexpr):
    """One tile of y = x (q (s + c z))^T: rows of one evaluation, or of a pair, by outputs of one weight.

    grid = (tiles of outputs: the first weight's, then the second's, then the third's; row blocks; splits). C: the
    Constants. The module's docstring tells shapes, what is added in which order, and why operands are swapped.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    FACTORS: tl.constexpr = C.FACTORS
    PASSES: tl.constexpr = C.PASSES
    tile_n, before, outputs, y_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, base4, N = _own_weight(
        y_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, base4, N,
        y1_ptr, codes1_ptr, scales1_ptr, zeros1_ptr, bias1_ptr, base4_1, N1,
        y2_ptr, codes2_ptr, scales2_ptr, zeros2_ptr, bias2_ptr, base4_2, N2, C)
    first = tl.program_id(2) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    if C.PDL:
        _fetch_ahead(codes_ptr, scales_ptr, first, last, tile_n, N, C)
        gdc_wait()
        gdc_launch_dependents()
    e, row, minus, live_row = _own_rows(R, C)
    out_n = tile_n * BN + tl.arange(0, BN)
    n = tl.minimum(out_n, N - 1)            # surplus outputs repeat the last one, and are not stored
    seed = tl.load(seeds_ptr + e)
    coef = tl.load(coefs_ptr + e)
    coef1 = tl.load(coefs_ptr + e + C.EACH - 1)

    k = order(tl.arange(0, C.DEPTH)) if C.BOOKS else tl.arange(0, C.DEPTH)
    xp = x_ptr + row[None, :].to(tl.int64) * stride_x + first * 128 + k[:, None]
    cp = word_pointers(codes_ptr, first, N, n, C.WORDS, C.FIRST_WORDS)
    lane_n = tl.minimum(tile_n * BN + outputs_of_lanes(C), N - 1)
    lane_coef = coefs_of_lanes(coef, coef1, C)
    # of the first output, in the tile's first group
    sp = scales_ptr + (first // C.PERIOD).to(tl.int64) * 4 * next_quad(N, C)
    if not C.WHOLE_ROW:
        ahead = load_scales(sp + 4 * lane_n, C.PER_TILE)
    held = hold_none(C.LANES, C.NOISE)
    acc = tl.zeros((BN, BM), tl.float32)
    prev = tl.full((FACTORS,), 1.0, tl.float32)
    for t in range(first, last):
        if not C.WHOLE_ROW:
            scales = ahead
            sp = next_tile(sp, t + 1, last, N, C)
            ahead = load_scales(sp + 4 * lane_n, C.PER_TILE)
        held = noise_of_tile(held, t, seed, base4, N, lane_n, C)

        partial = acc
        for turn in tl.static_range(PASSES):
            q = load_planes(cp, entries_ptr, turn, DT, C)
            if C.ZERO == INTEGER_ZEROS:
                q = _subtract_zeros(q, zeros_ptr, t, G, N, n, DT, C)
            dots = join_dots(q, C)
            for h in tl.static_range(128 // C.DEPTH):
                if not C.WHOLE_ROW and h * C.DEPTH % C.GROUP == 0:
                    acc, prev, partial = _begin_group(acc, prev, scales, held, h, lane_coef, coef1, C)
                partial = tl.dot(dots[h], _load_x(xp, k, t, h, K, C), partial, input_precision="ieee")
                if not C.WHOLE_ROW and (h + 1) * C.DEPTH % C.GROUP == 0:
                    if C.ZERO == FLOAT_ZEROS:
                        partial = _shift_group(partial, zeros_ptr, sums_ptr, t, h, G, M, N, n, row, C)
                    acc = _end_group(acc, partial, scales, held, h, lane_coef, coef1, C)
        if C.WHOLE_ROW:
            acc = partial
        held = drop_noise(held, C.PER_TILE, C.NOISE)
        xp += 128
        cp += N * C.WORDS

    if C.WHOLE_ROW:
        acc = _scale_rows(acc, scales_ptr, zeros_ptr, sums_ptr, seed, coef, coef1, minus, base4, n, row, first, C)
    elif C.RATIO:
        acc = acc * columns(prev, BN, BM)
    if C.SHARED and C.LAW != NO_NOISE:
        acc = _factor_rows(acc, seed, coef, coef1, minus, base4, n, C)
    live = live_row[None, :] & (out_n < N)[:, None]
    to = row[None, :].to(tl.int64) * N + out_n[:, None]
    _finish(y_ptr, bias_ptr, partials_ptr, counters_ptr, n, to, acc, live, before, outputs, M, C)


@triton.jit(do_not_specialize=["M"])
def _group_sums_kernel(x_ptr, sums_ptr, M: tl.int32, K: tl.int32, group: tl.int32, stride_x: tl.int32,
                       BM: tl.constexpr, BK: tl.constexpr):
    """sums[g, m] = sum of x[m, k] over group g, in float32; grid = (cdiv(M, BM), G)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    start = tl.program_id(1) * group
    acc = tl.zeros((BM,), tl.float32)
    for at in range(0, group, BK):
        k = at + tl.arange(0, BK)
        live = (row < M)[:, None] & ((k < group) & (start + k < K))[None, :]
        block = tl.load(x_ptr + row[:, None].to(tl.int64) * stride_x + start + k[None, :], mask=live, other=0.0)
        acc += tl.sum(block.to(tl.float32), 1)
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * M + row, acc, mask=row < M)
