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

The CPU twin, in plain torch and fast enough to train with, is qmm_torch.py beside this file.

Shapes: x [E*R, K], y [E*R, N]; W is a Weight whose codes are planes, the evaluations a Perturbation (operands.py).
Which tile, constants and scratch a launch has, plan.py tells.

Order of additions, which makes results reproducible: within a dot as the hardware has it, groups in order of k,
splits in order 0, 1, ...; no float atomics.
"""
import triton
import triton.language as tl

from .codes import join_planes2, join_planes4, word_pointers
from .lookup import load_planes
from .noise import drop_noise, held_noise, quad_noise
from .scales import columns, factor, lane_factors, load_scales, outputs_of_lanes, perturb
from .vectors import order

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:          # an older Triton: launches follow one another without overlap
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def _rescale(acc, prev, s, BN: tl.constexpr, BM: tl.constexpr, ASM: tl.constexpr):
    """Ratio form: bring the accumulator from units of `prev` to units of s. |s| < 1e-20 counts as 1e-20 here.

    ASM: one reciprocal instruction, within one unit in the last place, in place of a division that guards against
    denormal and huge divisors: 15 instructions a step less, and no scale is either (< 8e37, where it would be 0).
    """
    s = tl.where(tl.abs(s) < 1e-20, 1e-20, s)
    if ASM:
        inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [s], dtype=tl.float32, is_pure=True,
                                            pack=1)
    else:
        inverse = 1.0 / s
    return acc * columns(prev * inverse, BN, BM), s


@triton.jit
def _centred_zero(zeros_ptr, g, N, n, MIDDLE: tl.constexpr, DT: tl.constexpr):
    """Integer zero point minus the middle code, exact in DT."""
    return (tl.load(zeros_ptr + g.to(tl.int64) * N + n).to(tl.int32) - MIDDLE).to(DT)[:, None]


@triton.jit
def _choose(minus, s, r, PAIR: tl.constexpr):
    """[BN, BM] factors: s of every column, or r where the column belongs to the pair's second evaluation."""
    if PAIR:
        return tl.where(minus[None, :], r[:, None], s[:, None])
    else:
        return s[:, None]


@triton.jit
def _member(second, third, a, b, c, MEMBERS: tl.constexpr):
    """Of a, b and c that which belongs to this program's member; scalars, chosen without a jump."""
    chosen = tl.where(second, b, a)
    if MEMBERS == 3:
        chosen = tl.where(third, c, chosen)
    return chosen


@triton.jit
def _to_l2(at):
    """Ask for the lines at these addresses to be in L2 once they are loaded: nothing is read."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False,
                              pack=1)


@triton.jit
def _fetch_ahead(codes_ptr, scales_ptr, first, last, tile_n, N, BN: tl.constexpr, WORDS: tl.constexpr,
                 PERIOD: tl.constexpr, TILES: tl.constexpr):
    """The program's first tiles of codes and its first quad of scales, in lines of 128 bytes."""
    quad = 0 if PERIOD == 0 else first // PERIOD
    scale = tl.minimum(tile_n * BN + 8 * tl.arange(0, BN // 8), N - 1)
    _to_l2(scales_ptr + 4 * (quad * N + scale))
    if WORDS & (WORDS - 1) == 0:
        line = tl.minimum(tile_n * BN * WORDS + 64 * tl.arange(0, BN * WORDS // 64), (N - 1) * WORDS)
        for t in tl.static_range(TILES):
            tile = tl.minimum(first + t, last - 1).to(tl.int64)
            _to_l2(codes_ptr + tile * N * WORDS + line)


@triton.jit
def _finish(y_ptr, bias_ptr, n, to, acc, live, BIAS: tl.constexpr):
    """Add the bias, round, store."""
    if BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    tl.store(y_ptr + to, acc.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _finish_split(y_ptr, bias_ptr, partials_ptr, counters_ptr, n, to, acc, live, size, SPLITS: tl.constexpr,
                  BIAS: tl.constexpr):
    """Leave this program's part of the sum; the last program of a tile adds all parts, always in order 0, 1, 2, ...

    A counter of the tile tells which is the last, and is 0 again when that one is done. The barrier and the counter's
    release make every part visible before it is counted; parts are read past the L1 cache.
    """
    at = partials_ptr + to
    tl.store(at + tl.program_id(2).to(tl.int64) * size, acc, mask=live)
    tl.debug_barrier()
    counter = counters_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        total = tl.load(at, mask=live, other=0.0, cache_modifier=".cg")
        for split in range(1, SPLITS):
            total += tl.load(at + split * size, mask=live, other=0.0, cache_modifier=".cg")
        _finish(y_ptr, bias_ptr, n, to, total, live, BIAS)
        tl.store(counter, 0)


@triton.jit(do_not_specialize=["base4", "base4_1", "base4_2", "R", "M", "G", "tiles", "tiles_per_split"],
            do_not_specialize_on_alignment=["seeds_ptr", "coefs_ptr"])
def _qmm_kernel(x_ptr, y_ptr, seeds_ptr, coefs_ptr, partials_ptr, sums_ptr,
                codes_ptr, scales_ptr, zeros_ptr, entries_ptr, bias_ptr, counters_ptr, y1_ptr, y2_ptr,
                codes1_ptr, scales1_ptr, zeros1_ptr, bias1_ptr, codes2_ptr, scales2_ptr, zeros2_ptr, bias2_ptr,
                base4: tl.int64, R: tl.int32, M: tl.int32, N: tl.int32, K: tl.int32, G: tl.int32, stride_x: tl.int32,
                tiles: tl.int32, tiles_per_split: tl.int32,
                base4_1: tl.int64, N1: tl.int32, base4_2: tl.int64, N2: tl.int32,
                BM: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr, FOLD: tl.constexpr, BITS: tl.constexpr,
                GROUP: tl.constexpr, WHOLE_ROW: tl.constexpr, LAW: tl.constexpr, RELATIVE: tl.constexpr,
                SHARED: tl.constexpr, PAIR: tl.constexpr, WIDE: tl.constexpr,
                ZERO: tl.constexpr, RATIO: tl.constexpr, DEEP: tl.constexpr, ASM: tl.constexpr, SPLITS: tl.constexpr,
                PDL: tl.constexpr, BIAS: tl.constexpr, MASK_K: tl.constexpr, BOOKS: tl.constexpr, PASSES: tl.constexpr,
                HEAD: tl.constexpr, STEP: tl.constexpr, TABLE: tl.constexpr, LAST: tl.constexpr, ROUNDS_: tl.constexpr,
                MEMBERS: tl.constexpr):
    """grid = (tiles of outputs, row blocks, splits); a tile holds rows of one evaluation, or of a pair.

    All outputs of a row block run side by side: x is then read from memory once, and the codes, a quarter of its
    bytes per element, stay in the L2 cache from one row block to the next.

    MEMBERS: weights that one x is multiplied by, up to three; the tiles of outputs are those of the first, then of the
    second, then of the third. They differ in what has a 1 or a 2 in its name, and in nothing else.

    Operands are swapped, y^T = W x^T, so that the codes are the tensor core's register operand and never pass
    through shared memory once unpacked. Each step of the loop is one tile of 128 k.

    LANES, FOLD: threads that look after scales, and their order, see scales.py. GROUP: 32, 64 or 128. WHOLE_ROW: one
    scale per output, applied after the loop. SHARED: one z per output, applied last. PAIR: evaluations 2e and 2e + 1
    have one seed; their rows alternate in the tile, so that which coefficient a column has is known from the
    accumulator's register and costs no instruction. SPLITS: programs that share a tile; more than one leave their parts
    in partials_ptr, float32 [splits, M, N] of one member after another (_finish_split).
    PDL: this launch may begin before the one ahead of it has ended (programmatic dependent launch), and waits for it
    before it reads anything; its codes and scales are by then on their way. ZERO_FLOAT: sums_ptr [G, M] holds each
    group's sum of x, and s * (sum (q-m) x - (zero-m) sum x), m = 2^(BITS - 1), needs no per-code subtraction. MASK_K:
    128 does not divide K. BOOKS, PASSES, HEAD, STEP, TABLE, LAST and entries_ptr: what codes stand for, see
    lookup.lookups.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    DEPTH: tl.constexpr = GROUP if DEEP else 32     # k of one dot
    PER_TILE: tl.constexpr = 128 // GROUP           # groups in a tile
    PERIOD: tl.constexpr = 4 // PER_TILE            # tiles in a quad of groups
    EACH: tl.constexpr = 2 if PAIR else 1           # evaluations in a tile
    NOISE: tl.constexpr = 0 if SHARED else LAW      # law of the noise inside the loop
    MIDDLE: tl.constexpr = 1 << BITS - 1
    WORDS: tl.constexpr = 16 * PASSES if BOOKS else 8 * BITS        # of an output row in a tile
    FACTORS: tl.constexpr = 2 * BN if NOISE != 0 and PAIR else LANES        # of a group
    NEXT: tl.constexpr = DEPTH // 8 if BOOKS else DEPTH             # inputs from one dot's first to the next one's
    tile_n = tl.program_id(0)
    outputs = N                                                     # of all members
    before = 0                                                      # those of the members ahead
    if MEMBERS > 1:
        end = tl.cdiv(N, BN)
        end1 = end + tl.cdiv(N1, BN)
        second = tile_n >= end
        third = tile_n >= end1
        tile_n -= _member(second, third, 0, end, end1, MEMBERS)
        outputs += N1
        if MEMBERS == 3:
            outputs += N2
        before = _member(second, third, 0, N, N + N1, MEMBERS)
        y_ptr = _member(second, third, y_ptr, y1_ptr, y2_ptr, MEMBERS)
        codes_ptr = _member(second, third, codes_ptr, codes1_ptr, codes2_ptr, MEMBERS)
        scales_ptr = _member(second, third, scales_ptr, scales1_ptr, scales2_ptr, MEMBERS)
        if ZERO != 0:
            zeros_ptr = _member(second, third, zeros_ptr, zeros1_ptr, zeros2_ptr, MEMBERS)
        if BIAS:
            bias_ptr = _member(second, third, bias_ptr, bias1_ptr, bias2_ptr, MEMBERS)
        base4 = _member(second, third, base4, base4_1, base4_2, MEMBERS)
        N = _member(second, third, N, N1, N2, MEMBERS)
    if PDL:
        first = tl.program_id(2) * tiles_per_split
        last = tl.minimum(first + tiles_per_split, tiles)
        _fetch_ahead(codes_ptr, scales_ptr, first, last, tile_n, N, BN, WORDS, 0 if WHOLE_ROW else PERIOD, 2)
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.cdiv(R * EACH, BM)
    e = tl.program_id(1) // blocks * EACH
    column = (tl.program_id(1) % blocks) * BM + tl.arange(0, BM)
    local = column // EACH
    minus = column % 2 == 1
    row = e * R + tl.minimum(local, R - 1)          # surplus rows and columns repeat the last one, and are not stored
    if PAIR:
        row += tl.where(minus, R, 0)
    out_n = tile_n * BN + tl.arange(0, BN)
    n = tl.minimum(out_n, N - 1)
    seed = tl.load(seeds_ptr + e)
    coef = tl.load(coefs_ptr + e)
    coef1 = tl.load(coefs_ptr + e + EACH - 1)

    first = tl.program_id(2) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)

    k = order(tl.arange(0, DEPTH)) if BOOKS else tl.arange(0, DEPTH)
    xp = x_ptr + row[None, :].to(tl.int64) * stride_x + first * 128 + k[:, None]
    cp = word_pointers(codes_ptr, first, N, n, WORDS, 16 if BOOKS or BITS == 2 else 32)
    acc = tl.zeros((BN, BM), tl.float32)
    prev = tl.full((FACTORS,), 1.0, tl.float32)
    lane_n = tl.minimum(tile_n * BN + outputs_of_lanes(BN, LANES, FOLD), N - 1)
    lane_coef = coef
    if PAIR and LANES != BN:
        lane_coef = tl.where(tl.arange(0, LANES) % 2 == 1, coef1, coef)
    sp = scales_ptr + (first // PERIOD).to(tl.int64) * 4 * N        # of the first output, in the tile's first group
    if not WHOLE_ROW:
        a0, a1, a2, a3 = load_scales(sp + 4 * lane_n, PER_TILE)
    h0 = tl.zeros((LANES,), tl.uint32 if NOISE == 1 else tl.float32)
    h1 = h0
    h2 = h0
    h3 = h0
    for t in range(first, last):
        if not WHOLE_ROW:
            scales = (a0, a1, a2, a3)
            after = t + 1
            sp += tl.where(after < last, PER_TILE + tl.where(after % PERIOD == 0, 4 * N - 4, 0), 0)
            a0, a1, a2, a3 = load_scales(sp + 4 * lane_n, PER_TILE)
        if NOISE != 0 and not WHOLE_ROW:    # noqa: SIM102  known at compile time, the other is not
            if t % PERIOD == 0:
                quad = t // PERIOD
                h0, h1, h2, h3 = held_noise(seed, base4 + quad.to(tl.int64) * N + lane_n, LAW, WIDE, ROUNDS_)

        partial = acc
        for turn in tl.static_range(PASSES):
            w0, w1, w2, w3 = load_planes(cp, entries_ptr, turn, BN, BITS, BOOKS, DT,
                                         HEAD + STEP * turn + (TABLE if turn < PASSES - 1 else LAST), ASM)
            if ZERO == 1:
                g = tl.minimum(t * PER_TILE, G - 1)
                g1 = tl.minimum(t * PER_TILE + 1, G - 1)
                if WHOLE_ROW:
                    g = g * 0
                z0 = _centred_zero(zeros_ptr, g, N, n, MIDDLE, DT)
                z1 = z0
                z2 = z0
                z3 = z0
                if PER_TILE == 2:
                    z2 = _centred_zero(zeros_ptr, g1, N, n, MIDDLE, DT)
                    z3 = z2
                if PER_TILE == 4:
                    z1 = _centred_zero(zeros_ptr, g1, N, n, MIDDLE, DT)
                    z2 = _centred_zero(zeros_ptr, tl.minimum(t * PER_TILE + 2, G - 1), N, n, MIDDLE, DT)
                    z3 = _centred_zero(zeros_ptr, tl.minimum(t * PER_TILE + 3, G - 1), N, n, MIDDLE, DT)
                w0 = w0 - z0
                w1 = w1 - z1
                w2 = w2 - z2
                w3 = w3 - z3
            if DEPTH == 128:
                planes = (join_planes4(w0, w1, w2, w3, BN),)
            elif DEPTH == 64:
                planes = (join_planes2(w0, w1, BN), join_planes2(w2, w3, BN))
            else:
                planes = (w0, w1, w2, w3)

            for h in tl.static_range(128 // DEPTH):
                if not WHOLE_ROW and (h * DEPTH) % GROUP == 0:              # a group begins
                    if RATIO:
                        s = lane_factors(scales[h * DEPTH // GROUP], h0, h1, h2, h3, h * DEPTH // GROUP, lane_coef,
                                         coef1, BN, NOISE, RELATIVE, PAIR, FOLD)
                        acc, prev = _rescale(acc, prev, s, BN, BM, ASM)
                        partial = acc
                    else:
                        partial = tl.zeros((BN, BM), tl.float32)
                if MASK_K:
                    xk = tl.load(xp + h * NEXT, mask=(t * 128 + h * NEXT + k < K)[:, None], other=0.0)
                else:
                    xk = tl.load(xp + h * NEXT)
                partial = tl.dot(planes[h], xk, partial, input_precision="ieee")
                if not WHOLE_ROW and ((h + 1) * DEPTH) % GROUP == 0:        # and ends
                    if ZERO == 2:
                        group = t * PER_TILE + h * DEPTH // GROUP
                        g = tl.minimum(group, G - 1).to(tl.int64)
                        # a group past the last has no x, but absolute noise gives even it a scale
                        shift = tl.where(group < G, MIDDLE - tl.load(zeros_ptr + g * N + n), 0.0)
                        partial = tl.fma(shift[:, None], tl.load(sums_ptr + g * M + row)[None, :], partial)
                    if RATIO:
                        acc = partial
                    else:
                        s = lane_factors(scales[h * DEPTH // GROUP], h0, h1, h2, h3, h * DEPTH // GROUP, lane_coef,
                                         coef1, BN, NOISE, RELATIVE, PAIR, FOLD)
                        acc = tl.fma(partial, columns(s, BN, BM), acc)
        if WHOLE_ROW:
            acc = partial
        if NOISE != 0:
            h0, h1, h2, h3 = drop_noise(h0, h1, h2, h3, PER_TILE, LAW)
        xp += 128
        cp += N * WORDS

    if WHOLE_ROW:
        if ZERO == 2:   # noqa: SIM102  known at compile time, the other is not
            if first == 0:    # once, not once per split
                shift = MIDDLE - tl.load(zeros_ptr + n)
                acc = tl.fma(shift[:, None], tl.load(sums_ptr + row)[None, :], acc)
        prev = tl.load(scales_ptr + 4 * n)
    if WHOLE_ROW or RATIO:
        if not WHOLE_ROW or NOISE == 0:
            acc = acc * columns(prev, BN, BM)
        else:
            k0, _, _, _ = quad_noise(seed, base4 + n, LAW, WIDE, ROUNDS_)
            acc = acc * _choose(minus, perturb(prev, k0, coef, RELATIVE), perturb(prev, k0, coef1, RELATIVE), PAIR)
    if SHARED and LAW != 0:
        k0, _, _, _ = quad_noise(seed, base4 + n, LAW, WIDE, ROUNDS_)
        acc = acc * _choose(minus, factor(k0, coef), factor(k0, coef1), PAIR)
    live = (local < R)[None, :] & (out_n < N)[:, None]
    to = row[None, :].to(tl.int64) * N + out_n[:, None]
    if SPLITS > 1:
        _finish_split(y_ptr, bias_ptr, partials_ptr + M.to(tl.int64) * before, counters_ptr, n, to, acc, live,
                      M.to(tl.int64) * outputs, SPLITS, BIAS)
    else:
        _finish(y_ptr, bias_ptr, n, to, acc, live, BIAS)


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
