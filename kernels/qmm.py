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

Shapes: x [E*R, K]; codes int16 planes [T, N, 8 * bits] of 2, 4 or 8 bits (codes.py); scales float32 [Q, N, 4], a
layer's slice of the arena and so on 16 bytes, scale (g, n) at [g // 4, n, g % 4]; zeros None (all 2^(bits - 1)), uint8
[G, N] or float32 [G, N]; bias [N] or None; seeds int64 [E]; coefs float32 [E] on raw noise (noise.kernel_coefs); base4:
number of the layer's first quad in the noise law.

Order of additions, which makes results reproducible: within a dot as the hardware has it, groups in order of k,
splits in order 0, 1, ... No atomics.
"""
import torch
import triton
import triton.language as tl

from . import tiles
from .codes import TILE_K, join_planes2, join_planes4, word_pointers
from .lookup import PLAIN, load_planes, lookups
from .noise import NONE, ROUNDS, quad_noise
from .vectors import order

ZERO_NONE, ZERO_INTEGER, ZERO_FLOAT = 0, 1, 2
WIDE_FROM = 1 << 32          # quad numbers from here on need the second counter word
PAIRED_UP_TO = 32            # rows per evaluation: above it, products limit the speed and not what is read


@triton.jit
def _factor(k, coef):
    """1 + coef * k. The product is exact, so the fused operation rounds where the written one does."""
    return tl.fma(k, coef, 1.0)


@triton.jit
def perturb(s, k, coef, RELATIVE: tl.constexpr):
    """p of the module's docstring."""
    if RELATIVE:
        return s * _factor(k, coef)
    else:
        return tl.fma(k, coef, s)


@triton.jit
def _load_pair(sp):
    """The float32 at sp and the one after it, by one 8-byte load; sp is 8-byte aligned."""
    both = tl.load(sp.to(tl.pointer_type(tl.uint64), bitcast=True))
    return both.to(tl.uint32).to(tl.float32, bitcast=True), (both >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _rescale(acc, prev, s, ASM: tl.constexpr):
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
    return acc * (prev * inverse)[:, None], s


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


@triton.jit(do_not_specialize=["base4", "R", "M", "G", "tiles", "tiles_per_split"],
            do_not_specialize_on_alignment=["seeds_ptr", "coefs_ptr"])
def _qmm_kernel(x_ptr, codes_ptr, scales_ptr, zeros_ptr, entries_ptr, sums_ptr, bias_ptr, y_ptr, seeds_ptr, coefs_ptr,
                base4: tl.int64, R: tl.int32, M: tl.int32, N: tl.int32, K: tl.int32, G: tl.int32, stride_x: tl.int32,
                tiles: tl.int32, tiles_per_split: tl.int32,
                BM: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, WHOLE_ROW: tl.constexpr,
                LAW: tl.constexpr, RELATIVE: tl.constexpr, SHARED: tl.constexpr, PAIR: tl.constexpr, WIDE: tl.constexpr,
                ZERO: tl.constexpr, RATIO: tl.constexpr, DEEP: tl.constexpr, ASM: tl.constexpr, SPLIT: tl.constexpr,
                BIAS: tl.constexpr, MASK_K: tl.constexpr, BOOKS: tl.constexpr, PASSES: tl.constexpr,
                HEAD: tl.constexpr, STEP: tl.constexpr, TABLE: tl.constexpr, LAST: tl.constexpr, ROUNDS_: tl.constexpr):
    """grid = (cdiv(N, BN), row blocks, splits); a tile holds rows of one evaluation, or of a pair.

    All outputs of a row block run side by side: x is then read from memory once, and the codes, a quarter of its
    bytes per element, stay in the L2 cache from one row block to the next.

    Operands are swapped, y^T = W x^T, so that the codes are the tensor core's register operand and never pass
    through shared memory once unpacked. Each step of the loop is one tile of 128 k.

    GROUP: 32, 64 or 128. WHOLE_ROW: one scale per output, applied after the loop. SHARED: one z per output, applied
    last. PAIR: evaluations 2e and 2e + 1 have one seed; their rows alternate in the tile, so that which coefficient a
    column has is known from the accumulator's register and costs no instruction. SPLIT: y_ptr is float32
    [splits, M, N]. ZERO_FLOAT: sums_ptr [G, M] holds each group's sum of x, and s * (sum (q-m) x - (zero-m) sum x),
    m = 2^(BITS - 1), needs no per-code subtraction. MASK_K: 128 does not divide K. BOOKS, PASSES,
    HEAD, STEP, TABLE, LAST and entries_ptr: what codes stand for, see lookup.lookups.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    DEPTH: tl.constexpr = GROUP if DEEP else 32     # k of one dot
    PER_TILE: tl.constexpr = 128 // GROUP           # groups in a tile
    PERIOD: tl.constexpr = 4 // PER_TILE            # tiles in a quad of groups
    EACH: tl.constexpr = 2 if PAIR else 1           # evaluations in a tile
    NOISE: tl.constexpr = 0 if SHARED else LAW      # law of the noise inside the loop
    MIDDLE: tl.constexpr = 1 << BITS - 1
    WORDS: tl.constexpr = 16 * PASSES if BOOKS else 8 * BITS        # of an output row in a tile
    NEXT: tl.constexpr = DEPTH // 8 if BOOKS else DEPTH             # inputs from one dot's first to the next one's
    blocks = tl.cdiv(R * EACH, BM)
    e = tl.program_id(1) // blocks * EACH
    column = (tl.program_id(1) % blocks) * BM + tl.arange(0, BM)
    local = column // EACH
    minus = column % 2 == 1
    row = e * R + tl.minimum(local, R - 1)          # surplus rows and columns repeat the last one, and are not stored
    if PAIR:
        row += tl.where(minus, R, 0)
    out_n = tl.program_id(0) * BN + tl.arange(0, BN)
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
    prev = tl.full((BN,), 1.0, tl.float32)
    s0 = tl.zeros((BN,), tl.float32)
    s1 = s0
    s2 = s0
    s3 = s0
    r0 = s0      # the scales of the pair's second evaluation
    r1 = s0
    r2 = s0
    r3 = s0
    for t in range(first, last):
        # the scales of this tile's groups in s0, s1, ..: read tile by tile, or a quad at a time and then passed down
        quad = t // PERIOD
        sp = scales_ptr + 4 * (quad.to(tl.int64) * N + n)
        if WHOLE_ROW:
            pass
        elif NOISE == 0:
            sp += (t % PERIOD) * PER_TILE
            if PER_TILE == 1:
                s0 = tl.load(sp)
            else:
                s0, s1 = _load_pair(sp)
            if PER_TILE == 4:
                s2, s3 = _load_pair(sp + 2)
        elif t % PERIOD == 0:
            k0, k1, k2, k3 = quad_noise(seed, base4 + quad.to(tl.int64) * N + n, LAW, WIDE, ROUNDS_)
            s0, s1 = _load_pair(sp)
            s2, s3 = _load_pair(sp + 2)
            if PAIR:
                r0 = perturb(s0, k0, coef1, RELATIVE)
                r1 = perturb(s1, k1, coef1, RELATIVE)
                r2 = perturb(s2, k2, coef1, RELATIVE)
                r3 = perturb(s3, k3, coef1, RELATIVE)
            s0 = perturb(s0, k0, coef, RELATIVE)
            s1 = perturb(s1, k1, coef, RELATIVE)
            s2 = perturb(s2, k2, coef, RELATIVE)
            s3 = perturb(s3, k3, coef, RELATIVE)
        else:
            if PER_TILE == 1:
                s0 = s1
                s1 = s2
                s2 = s3
                r0 = r1
                r1 = r2
                r2 = r3
            else:
                s0 = s2
                s1 = s3
                r0 = r2
                r1 = r3
        scales = (s0, s1, s2, s3)
        others = (r0, r1, r2, r3)

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
                    s = scales[h * DEPTH // GROUP]
                    if RATIO:
                        acc, prev = _rescale(acc, prev, s, ASM)
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
                        factor = _choose(minus, s, others[h * DEPTH // GROUP], PAIR and NOISE != 0)
                        acc = tl.fma(partial, tl.broadcast_to(factor, partial.shape), acc)
        if WHOLE_ROW:
            acc = partial
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
            acc = acc * prev[:, None]
        else:
            k0, _, _, _ = quad_noise(seed, base4 + n, LAW, WIDE, ROUNDS_)
            acc = acc * _choose(minus, perturb(prev, k0, coef, RELATIVE), perturb(prev, k0, coef1, RELATIVE), PAIR)
    if SHARED and LAW != 0:
        k0, _, _, _ = quad_noise(seed, base4 + n, LAW, WIDE, ROUNDS_)
        acc = acc * _choose(minus, _factor(k0, coef), _factor(k0, coef1), PAIR)
    live = (local < R)[None, :] & (out_n < N)[:, None]
    to = row[None, :].to(tl.int64) * N + out_n[:, None]
    if SPLIT:
        tl.store(y_ptr + tl.program_id(2).to(tl.int64) * M * N + to, acc, mask=live)
    else:
        if BIAS:
            acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
        tl.store(y_ptr + to, acc.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["size", "splits"])
def _reduce_kernel(partials_ptr, bias_ptr, y_ptr, size: tl.int64, N: tl.int32, splits: tl.int32, BIAS: tl.constexpr,
                   BLOCK: tl.constexpr):
    """y = sum over splits of float32 partials [splits, size], always in order 0, 1, 2, ..., then + bias."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < size
    acc = tl.load(partials_ptr + i, mask=live, other=0.0)
    for split in range(1, splits):
        acc += tl.load(partials_ptr + split * size + i, mask=live, other=0.0)
    if BIAS:
        acc += tl.load(bias_ptr + i % N, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, acc.to(y_ptr.dtype.element_ty), mask=live)


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


def constants(tile, *, bits, rows, k, group, law, relative, shared, pair, zero, wide, bias, asm, lookup=None):
    """The kernel's compile-time constants: launch and the ahead-of-time compile test both take them from here.

    A pair that one tile cannot hold takes two tiles' rows: the product of one row has the same bits in either.
    lookup: the constants of lookup.lookups, PLAIN ones without.
    """
    whole_row = group not in tiles.GROUPS or group == k
    ratio = tile.ratio and not whole_row
    lookup = lookup or PLAIN
    most = PAIRED_UP_TO // 2 if group == 32 else PAIRED_UP_TO       # registers: two scales of four groups a step
    if lookup["PASSES"] > (2 if lookup["BOOKS"] else 1):
        most //= 4 if lookup["BOOKS"] else 2
    pair = pair and law != NONE and rows <= most and not ratio
    return dict(BM=2 * tile.rows if pair and 2 * rows > tile.rows else tile.rows, BN=tile.outputs,
                BITS=bits, GROUP=128 if whole_row else group, WHOLE_ROW=whole_row, LAW=law, RELATIVE=bool(relative),
                SHARED=bool(shared), PAIR=bool(pair), WIDE=bool(wide), ZERO=zero, RATIO=ratio,
                DEEP=tile.deep, ASM=bool(asm), SPLIT=tile.splits > 1, BIAS=bool(bias), MASK_K=k % TILE_K != 0,
                ROUNDS_=ROUNDS,
                **lookup)


def _splits(tile, k, group):
    """(programs that share K, steps of 128 k each of them makes): whole quads of groups to each."""
    count = -(-k // TILE_K)
    period = 1 if group == k else max(1, 4 * group // TILE_K)
    per_split = -(-count // tile.splits)
    per_split = -(-per_split // period) * period
    return -(-count // per_split), per_split


def scratch_bytes(m, n, k, group, tile, zeros):
    """Bytes that a launch holds for a while beside x [m, k] and y [m, n]; zeros: dtype of the zero points or None."""
    partial = 4 * _splits(tile, k, group)[0] * m * n if tile.splits > 1 else 0
    return partial + (4 * (k // group) * m if zeros == torch.float32 else 0)


def launch(x, codes, scales, zeros, bias, seeds, coefs, y, *, base4, group, law, relative, tile, asm, shared=False,
           pair=False, bits=4, table=None, exact=False, codebooks=None):
    """Run the kernels on checked arguments; y [E*R, N] is filled. x is contiguous, E*R > 0.

    asm: unpack with inline PTX (NVIDIA, 16-bit x), else with its plain twin. shared: one z per output row.
    pair: seeds[2e] == seeds[2e + 1] for every e, so that one reading of the codes may serve both.
    table: sixteen floats that 4-bit codes stand for; zeros is None then. exact: without rounding them to x's dtype.
    codebooks: [C, 2^bits, 8] in x's dtype, on 16 bytes, that codes of `bits` choose from; no zeros and no table then.
    """
    m, k = x.shape
    n = codes.shape[1]
    groups = k // group
    rows = m if law == NONE else m // seeds.numel()       # without noise all rows are one block
    zero = ZERO_NONE if zeros is None else ZERO_FLOAT if zeros.dtype == torch.float32 else ZERO_INTEGER
    splits, per_split = _splits(tile, k, group)
    entries, lookup = lookups(_qmm_kernel, scales, x.dtype, table, exact, codebooks)
    constexprs = constants(tile, bits=bits, rows=rows, k=k, group=group, law=law, relative=relative, shared=shared,
                           pair=pair, zero=zero, wide=base4 + scales.shape[0] * n > WIDE_FROM,
                           bias=bias is not None, asm=asm and x.dtype != torch.float32, lookup=lookup)
    out = y
    if constexprs["SPLIT"]:
        out = torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    sums = scales
    if zero == ZERO_FLOAT:
        sums = torch.empty(groups, m, dtype=torch.float32, device=x.device)
        _group_sums_kernel[(triton.cdiv(m, 32), groups)](
            x, sums, m, k, group, x.stride(0), BM=32, BK=min(128, triton.next_power_of_2(group)),
            enable_fp_fusion=False)
    limit = {"maxnreg": tile.registers} if tile.registers else {}       # an option that AMD's compiler lacks
    each = rows * (2 if constexprs["PAIR"] else 1)
    grid = (triton.cdiv(n, tile.outputs), m // each * triton.cdiv(each, constexprs["BM"]), splits)
    _qmm_kernel[grid](
        x, codes, scales, scales if zeros is None else zeros, entries,
        sums, scales if bias is None else bias, out, seeds, coefs,
        base4, rows, m, n, k, groups, x.stride(0), triton.cdiv(k, TILE_K), per_split,
        **constexprs, **limit, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False)
    if constexprs["SPLIT"]:
        _reduce_kernel[(triton.cdiv(m * n, 1024),)](
            out, y if bias is None else bias, y, m * n, n, splits, BIAS=bias is not None, BLOCK=1024,
            enable_fp_fusion=False)


