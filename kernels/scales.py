"""A tile's scales under its evaluations: read ahead, perturbed, brought to the columns that they multiply.

A quad of groups has one Philox call for its noise (noise.py) and lasts up to four tiles. What a program holds in
between is the noise, one register an output under the law of two values; scales are read a tile at a time, one tile
before the products they belong to. So nothing waits for a scale, and none of the eight perturbed ones that an output of
a pair has in a quad is held: on sm_90 1 to 8 rows take 168 registers a thread for 219, three programs a multiprocessor.
The noise is made between the copies of later tiles and the wait for this one's. Behind the products it would cost the
same: Triton waits for a wgmma right after it, whatever is written in between.

Lanes: one thread looks after one output where there are as many, two neighbours after one where there are twice as
many; they make its noise, once, and through `columns` it reaches the threads that hold the accumulator. Triton keeps
that way within a warp, without a barrier, where a warp's lanes are for the outputs of which it holds the products.
"""
import triton
import triton.language as tl

from .noise import NO_NOISE, hold_noise, nth_noise


@triton.jit
def factor(k, coef):
    """1 + coef * k. The product is exact, so the fused operation rounds where the written one does."""
    return tl.fma(k, coef, 1.0)


@triton.jit
def perturb(s, k, coef, RELATIVE: tl.constexpr):
    """p of qmm.py's docstring."""
    if RELATIVE:
        return s * factor(k, coef)
    else:
        return tl.fma(k, coef, s)


@triton.jit
def load_pair(sp):
    """The float32 at sp and the one after it, by one 8-byte load; sp is 8-byte aligned."""
    both = tl.load(sp.to(tl.pointer_type(tl.uint64), bitcast=True))
    return both.to(tl.uint32).to(tl.float32, bitcast=True), (both >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def load_scales(sp, PER_TILE: tl.constexpr):
    """The scales of a tile, from pointers to those of its first group: four, repeated where it has fewer groups."""
    if PER_TILE == 1:
        s0 = tl.load(sp)
        return s0, s0, s0, s0
    elif PER_TILE == 2:
        s0, s1 = load_pair(sp)
        return s0, s1, s0, s1
    else:
        s0, s1 = load_pair(sp)
        s2, s3 = load_pair(sp + 2)
        return s0, s1, s2, s3


@triton.jit
def outputs_of_lanes(C: tl.constexpr):
    """Which of BN outputs each of BN or 2 BN lanes looks after, int32 [LANES].

    FOLD: four warps of 32 lanes, of which warp w holds the products of outputs 16 w .. and 64 + 16 w ..
    """
    i = tl.arange(0, C.LANES)
    if C.FOLD:
        return i // 32 * 16 + i // 16 % 2 * 64 + i % 16
    else:
        return i // (C.LANES // C.BN)


@triton.jit
def coefs_of_lanes(coef, coef1, C: tl.constexpr):
    """Each lane's coefficient where two neighbours look after an output of a pair; else the first evaluation's."""
    if C.PAIR and C.LANES != C.BN:
        return tl.where(tl.arange(0, C.LANES) % 2 == 1, coef1, coef)
    else:
        return coef


@triton.jit
def next_quad(N, C: tl.constexpr):
    """Quads from one of an output's to its next, in memory and in the noise law: the outputs of the whole layer, of
    which a shard has N."""
    if C.SHARDS == 1:
        return N
    else:
        return N * C.SHARDS


@triton.jit
def next_tile(sp, t, last, N, C: tl.constexpr):
    """From the scales of a tile's first group to those of the next tile's, which is t: four groups of an output are
    neighbours, then come the other outputs'. The last tile's stay."""
    return sp + tl.where(t < last, C.PER_TILE + tl.where(t % C.PERIOD == 0, 4 * next_quad(N, C) - 4, 0), 0)


@triton.jit
def noise_of_tile(held, t, seed, base4, N, lane_n, C: tl.constexpr):
    """The noise that tile t begins with: where a quad of groups begins, that of the quad."""
    if C.NOISE != NO_NOISE:    # noqa: SIM102  known at compile time, the other is not
        if t % C.PERIOD == 0:
            quad = t // C.PERIOD
            held = hold_noise(seed, base4 + quad.to(tl.int64) * next_quad(N, C) + lane_n, C.NOISE, C.WIDE)
    return held


@triton.jit
def group_factors(scales, held, h: tl.constexpr, coef, coef1, C: tl.constexpr):
    """The lanes' scales of the group that dot h of a tile belongs to, perturbed by the noise held, as `columns` takes
    them: [BN], or [2 BN] of a pair.

    scales: the tile's four, as `load_scales` gives them; coef: each lane's where there are 2 BN; coef1: that of a
    pair's second evaluation where there are BN.
    """
    i: tl.constexpr = h * C.DEPTH // C.GROUP
    BN: tl.constexpr = C.BN
    s = scales[i]
    p = s
    if C.NOISE != NO_NOISE:
        k = nth_noise(held, i, C.NOISE)
        p = perturb(s, k, coef, C.RELATIVE)
    if C.NOISE != NO_NOISE and C.PAIR and s.shape[0] == BN:
        p = tl.join(p, perturb(s, k, coef1, C.RELATIVE))
        if C.FOLD:
            p = tl.permute(tl.reshape(p, (4, 2, 16, 2)), (1, 0, 2, 3))
        p = tl.reshape(p, (2 * BN,))
    elif C.FOLD:
        p = tl.reshape(tl.permute(tl.reshape(p, (4, 2, 16)), (1, 0, 2)), (BN,))
    return p


@triton.jit
def columns(p, BN: tl.constexpr, BM: tl.constexpr):
    """[BN, BM] factors from [BN], or from [2 BN]: even columns have the first of an output's two, odd ones the
    second."""
    if p.shape[0] == BN:
        return tl.broadcast_to(p[:, None], (BN, BM))
    else:
        return tl.reshape(tl.broadcast_to(tl.reshape(p, (BN, 1, 2)), (BN, BM // 2, 2)), (BN, BM))
