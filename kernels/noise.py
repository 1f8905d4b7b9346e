"""The noise law z(seed, index): one Philox call gives the noise of four neighbouring scales.

A scale is known by its global index i in the arena; nothing else enters: not the tile, not the launch, not the device.

    quad = i // 4, word = i % 4
    w    = Philox4x32-7(counter = (quad mod 2^32, quad div 2^32, 0, 0), key = 64-bit seed)[word]

    law         raw value k                          unit (z = k * unit)      |k| <=
    rademacher  -1 if the top bit of w is set else 1  1                        1
    ih4         sum of the four bytes of w, - 510     1 / sqrt((2^16 - 1) / 3) 510       (Irwin-Hall, near-Gaussian)
    gaussian    Box-Muller of the word's pair         1                        5.9

Kernels work on raw values: the coefficient absorbs the unit and is rounded by `kernel_coefs` so that coef * k is
exact in float32. Fused or not, on a CPU or a GPU, the integer laws therefore give the same bits. `gaussian` goes
through logarithms and is only reproducible to a tolerance between devices.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. SPSA with regenerated noise: MeZO,
arXiv 2305.17333; on quantization scales: QZO, arXiv 2505.13430.

Terms (coefficient, law, quad): docs/glossary.md.
"""
import math

import torch
import triton
import triton.language as tl

NONE, RADEMACHER, IH4, GAUSSIAN = 0, 1, 2, 3
LAWS = {"none": NONE, "rademacher": RADEMACHER, "ih4": IH4, "gaussian": GAUSSIAN}
VERSIONS = {"rademacher": "rademacher/1", "ih4": "ih4/1", "gaussian": "gaussian/1"}   # frozen: a journal names one
SHARINGS = ("group", "row")   # one z per scale; one z per output row, that of the row's first scale
ROUNDS = 7            # of the noise
SEED_ROUNDS = 10      # of the step seeds
UNITS = {NONE: 1.0, RADEMACHER: 1.0, IH4: 1.0 / math.sqrt((256**2 - 1) / 3), GAUSSIAN: 1.0}
RAW_BITS = {RADEMACHER: 1, IH4: 9}   # bits of the largest |k|
RAW_BYTES = 72                       # raw_noise holds of a quad while it works: its values and seven int64 temporaries
BLOCK_QUADS = 16384                  # the reference in torch never holds the noise of more than 4 * this many scales

MASK = 0xFFFFFFFF
MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85

# the same as the kernels name them: of a module's numbers Triton takes only such
NO_NOISE, _SIGN, _GAUSSIAN, _ROUNDS = (tl.constexpr(value) for value in (NONE, RADEMACHER, GAUSSIAN, ROUNDS))


def law_number(noise):
    """The number of a law's name; ValueError names the laws there are."""
    if not isinstance(noise, str) or noise not in VERSIONS:
        raise ValueError(f"noise={noise!r:.60} is not a noise law; the laws are {', '.join(map(repr, VERSIONS))}")
    return LAWS[noise]


def law_version(noise, sharing="group"):
    """What a journal calls the law: "rademacher/1", or "rademacher-row/1" where a row's scales share their noise."""
    version = VERSIONS[noise]
    return version if sharing == "group" else version.replace("/", f"-{sharing}/")


def check_sharing(sharing, relative):
    """ValueError for a sharing there is not, or one that does not go with absolute noise."""
    if sharing not in SHARINGS:
        raise ValueError(f"sharing={sharing!r:.60}: 'group' (one z per scale) and 'row' (one per output row) are there")
    if sharing == "row" and not relative:
        raise ValueError("sharing='row' scales a whole output row, so it is relative: use relative=True, or "
                         "sharing='group'")


# ------------------------------------------------------------------------------------------ reference implementation

def philox4x32(counter, key, rounds):
    """Philox4x32. counter: four int64 tensors (or ints) of 32-bit words; key: two (ints or tensors that broadcast).

    Returns four of the same, each in 0 .. 2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The int64 product wraps modulo 2^64, where its bits are those of the unsigned 32 x 32 product. c1 and c3 keep
        # the whole product: their high halves vanish in the mask of the next round's c0 and c2.
        a, b = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        c0, c1 = ((b >> 32) ^ c1 ^ k0) & MASK, b
        c2, c3 = ((a >> 32) ^ c3 ^ k1) & MASK, a
        k0, k1 = (k0 + WEYL_A) & MASK, (k1 + WEYL_B) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def step_seed(run_seed, step, direction):
    """Seed of direction j at step t: words 0-1 of Philox4x32-10(counter = (t low, t high, j, 1), key = run seed).

    Returns a signed 64-bit int. Runs with neighbouring seeds share nothing.
    """
    key = run_seed & MASK, (run_seed >> 32) & MASK
    words = philox4x32((step & MASK, (step >> 32) & MASK, direction, 1), key, SEED_ROUNDS)
    return signed64(words[0] | words[1] << 32)


def signed64(seed):
    """Any int, taken modulo 2^64, as the signed 64-bit int of the same bits."""
    seed = int(seed) & (1 << 64) - 1
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _gaussian_pair(u, v):
    """Box-Muller of two 32-bit words held in int64: radius from u, angle from v.

    The top two bits of v choose a quarter turn, the next 22 an angle in (-pi/4, pi/4), where short Taylor series
    reach float32: no trigonometric function, so no device's range reduction enters.
    """
    radius = torch.sqrt(-2.0 * torch.log(((u >> 8).to(torch.float32) + 0.5) * 2.0**-24))
    angle = ((((v >> 8) & 0x3FFFFF).to(torch.float32) + 0.5) * 2.0**-22 - 0.5) * (math.pi / 2)
    q = angle * angle
    sin = angle * (1 + q * (-1 / 6 + q * (1 / 120 + q * (-1 / 5040))))
    cos = 1 + q * (-1 / 2 + q * (1 / 24 + q * (-1 / 720 + q * (1 / 40320))))
    quarter = v >> 30
    odd = (quarter & 1) == 1
    x = torch.where(odd, -sin, cos)
    y = torch.where(odd, cos, sin)
    sign = torch.where(quarter >= 2, -radius, radius)
    return x * sign, y * sign


def raw_noise(law, seeds, quads):
    """Raw values of whole quads: float32 [*seeds.shape, *quads.shape, 4].

    law: a number of LAWS; seeds: int64 tensor [] or [J]; quads: int64 tensor. Allocates a few int64 temporaries of
    J * quads.numel() entries: callers pass at most BLOCK_QUADS of them at a time.
    """
    zero = torch.zeros((), dtype=torch.int64, device=quads.device)
    lifted = seeds.view(*seeds.shape, *[1] * quads.dim())
    high = quads >> 32 if quads.numel() and int(quads.max()) >> 32 else zero      # a scalar stays one for two rounds
    if seeds.numel() == 1:
        lifted = int(seeds)                  # the key schedule then costs no tensor operations
    words = philox4x32((quads & MASK, high, zero, zero), (lifted & MASK, (lifted >> 32) & MASK), ROUNDS)
    out = torch.empty(*seeds.shape, *quads.shape, 4, dtype=torch.float32, device=quads.device)
    if law == GAUSSIAN:
        for pair in (0, 2):
            out[..., pair], out[..., pair + 1] = _gaussian_pair(words[pair], words[pair + 1])
        return out
    for i, w in enumerate(words):
        if law == RADEMACHER:
            out[..., i] = 1 - ((w >> 30) & 2)
        else:
            out[..., i] = (w & 255) + ((w >> 8) & 255) + ((w >> 16) & 255) + (w >> 24) - 510
    return out


def noise(law, seed, index):
    """z at global scale indices: the reference implementation of what every kernel regenerates.

    Parameters
    ----------
    law : str
        "rademacher", "ih4" or "gaussian"; all have mean 0 and variance 1.
    seed : int
        64-bit; taken modulo 2^64.
    index : Tensor
        int64, any shape, on any device: global scale indices as `scale_index` gives them.

    Returns
    -------
    Tensor
        float32, shaped like `index`, on its device.

    Raises ValueError for an unknown law or a negative index, TypeError for an index that is no integer tensor.
    """
    number = law_number(law)
    if not isinstance(index, torch.Tensor) or index.is_floating_point() or index.is_complex():
        raise TypeError(f"index must be an integer tensor of global scale indices, got {type(index).__name__}")
    flat = index.reshape(-1).to(torch.int64)
    if flat.numel() and int(flat.min()) < 0:
        raise ValueError(f"index holds {int(flat.min())}; global scale indices start at 0")
    out = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
    key = torch.tensor(signed64(seed), device=flat.device)
    for start in range(0, flat.numel(), BLOCK_QUADS):
        part = flat[start:start + BLOCK_QUADS]
        raw = raw_noise(number, key, part >> 2).gather(-1, (part & 3).unsqueeze(-1)).squeeze(-1)
        out[start:start + BLOCK_QUADS] = raw * UNITS[number]
    return out.reshape(index.shape)


def kernel_coefs(coefs, law):
    """Coefficients on z -> float32 coefficients on the raw values k, rounded so that coef * k is exact in float32.

    coefs: float tensor or list, any shape. ih4 keeps 24 - 9 = 15 mantissa bits (round half to even), a relative
    change of at most 2^-15; rademacher and gaussian keep all 24.
    """
    c = torch.as_tensor(coefs, dtype=torch.float64) * UNITS[law]
    if law in RAW_BITS and RAW_BITS[law] > 1:
        mantissa, exponent = torch.frexp(c)
        bits = 24 - RAW_BITS[law]
        c = torch.ldexp(torch.round(mantissa * 2.0**bits), exponent - bits)
    return c.to(torch.float32)


# ------------------------------------------------------------------------------------------------ Triton

@triton.jit
def _raw_integer(w, LAW: tl.constexpr):
    """One 32-bit word -> integer-valued float32."""
    if LAW == _SIGN:
        # the word's top bit becomes the sign bit of 1.0 (0x3F800000)
        return ((w & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)
    else:
        # bytes added two at a time: each 16-bit half of t holds a sum of two bytes
        t = (w & 0x00FF00FF) + ((w >> 8) & 0x00FF00FF)
        return (((t & 0xFFFF) + (t >> 16)).to(tl.int32, bitcast=True) - 510).to(tl.float32)


@triton.jit
def _raw_gaussian_pair(u, v):
    """_gaussian_pair in the kernels."""
    radius = tl.sqrt(-2.0 * tl.log(((u >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08))          # 2^-24
    angle = ((((v >> 8) & 0x3FFFFF).to(tl.float32) + 0.5) * 2.384185791015625e-07 - 0.5) * 1.5707963267948966  # 2^-22
    q = angle * angle
    sin = angle * (1 + q * (-0.16666666666666666 + q * (0.008333333333333333 + q * -0.0001984126984126984)))
    cos = 1 + q * (-0.5 + q * (0.041666666666666664 + q * (-0.001388888888888889 + q * 2.48015873015873e-05)))
    quarter = v >> 30
    odd = (quarter & 1) == 1
    sign = tl.where(quarter >= 2, -radius, radius)
    return tl.where(odd, -sin, cos) * sign, tl.where(odd, cos, sin) * sign


@triton.jit
def _quad_words(seed, quad, WIDE: tl.constexpr):
    """The four words of each quad (int64 numbers). WIDE: quad numbers reach 2^32, so the second counter word is not
    zero."""
    low = quad.to(tl.uint32)
    zero = low * 0
    high = (quad >> 32).to(tl.uint32) if WIDE else zero
    return tl.philox(seed, low, high, zero, zero, _ROUNDS)


@triton.jit
def quad_noise(seed, quad, LAW: tl.constexpr, WIDE: tl.constexpr):
    """The four raw values of each quad (int64 numbers) from one Philox call, as four tensors shaped like `quad`.

    Four 1-D results rather than one [.., 4] tile: a tile that small is replicated over the warps.
    """
    w0, w1, w2, w3 = _quad_words(seed, quad, WIDE)
    if LAW == _GAUSSIAN:
        z0, z1 = _raw_gaussian_pair(w0, w1)
        z2, z3 = _raw_gaussian_pair(w2, w3)
        return z0, z1, z2, z3
    else:
        return _raw_integer(w0, LAW), _raw_integer(w1, LAW), _raw_integer(w2, LAW), _raw_integer(w3, LAW)


@triton.jit
def hold_none(LANES: tl.constexpr, LAW: tl.constexpr):
    """What a loop holds before its first noise, of the types of `hold_noise`."""
    zero = tl.zeros((LANES,), tl.uint32 if LAW == _SIGN else tl.float32)
    return zero, zero, zero, zero


@triton.jit
def hold_noise(seed, quad, LAW: tl.constexpr, WIDE: tl.constexpr):
    """The raw values of each quad as a loop holds them, for `nth_noise`.

    rademacher: four bits at the top of one word, which stands in all four places and so takes one register.
    """
    if LAW == _SIGN:
        w0, w1, w2, w3 = _quad_words(seed, quad, WIDE)
        bits = (w0 & 0x80000000) | (w1 >> 1 & 0x40000000) | (w2 >> 2 & 0x20000000) | (w3 >> 3 & 0x10000000)
        return bits, bits, bits, bits
    else:
        return quad_noise(seed, quad, LAW, WIDE)


@triton.jit
def nth_noise(held, i: tl.constexpr, LAW: tl.constexpr):
    """Raw value i of those held."""
    if LAW == _SIGN:
        return _raw_integer(held[0] << i, LAW)
    else:
        return held[i]


@triton.jit
def drop_noise(held, count: tl.constexpr, LAW: tl.constexpr):
    """What is held without its first `count` values: 1, 2 or 4."""
    if LAW == NO_NOISE:
        return held
    elif LAW == _SIGN:
        bits = held[0] << count
        return bits, bits, bits, bits
    elif count == 1:
        return held[1], held[2], held[3], held[3]
    else:
        return held[2], held[3], held[3], held[3]
