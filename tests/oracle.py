"""The slow truth: the definitions of the package written once more, in Python integers and float64.

Imports nothing of the package. Every float32 step that the package promises bit for bit is done here in
float64 and rounded after each operation: float64 holds a product of two float32 exactly, and rounding the
float64 sum of two float32 once more gives what a float32 addition gives (53 >= 2 * 24 + 2 bits).
"""

import math

import torch

WORD = 1 << 32
UNIT = {"rademacher": 1.0, "ih4": 1 / math.sqrt(65535 / 3), "gaussian": 1.0}
LARGEST_BITS = {"rademacher": 1, "ih4": 9}


# ------------------------------------------------------------------------------------------------------ noise


def philox(counter, key, rounds):
    """Philox4x32 of Salmon et al., SC 2011, on Python ints."""
    c, (k0, k1) = list(counter), key
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second // WORD ^ c[1] ^ k0, second % WORD, first // WORD ^ c[3] ^ k1, first % WORD]
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c


def raw(law, seed, index):
    """The raw noise of one global scale index: an int, or a float for the gaussian law."""
    seed, quad, word = seed % 2**64, index // 4, index % 4
    words = philox((quad % WORD, quad // WORD, 0, 0), (seed % WORD, seed // WORD), 7)
    if law == "rademacher":
        return 1 - 2 * (words[word] >> 31)
    if law == "ih4":
        return sum(words[word].to_bytes(4, "little")) - 510
    u, v = words[word & 2], words[word | 1]
    radius = math.sqrt(-2 * math.log((u // 256 + 0.5) / 2**24))
    angle = math.pi / 2 * ((v >> 30) + ((v >> 8) % 2**22 + 0.5) / 2**22 - 0.5)
    return radius * (math.sin(angle) if word % 2 else math.cos(angle))


def raw_at(law, seed, index):
    """float64 raw noise at every entry of an int64 tensor of indices."""
    values = [raw(law, int(seed), int(i)) for i in index.flatten()]
    return torch.tensor(values, dtype=torch.float64).view(index.shape)


def step_seed(run_seed, step, direction):
    """Seed of a direction at a step, as a signed 64-bit int."""
    run_seed, step = run_seed % 2**64, step % 2**64
    words = philox((step % WORD, step // WORD, direction, 1), (run_seed % WORD, run_seed // WORD), 10)
    return (words[0] + words[1] * WORD + 2**63) % 2**64 - 2**63


def raw_coef(law, coef):
    """The float32 coefficient on raw noise: few enough bits that its product with k is exact."""
    value = coef * UNIT[law]
    if LARGEST_BITS.get(law, 1) > 1 and value:
        mantissa, exponent = math.frexp(value)
        bits = 24 - LARGEST_BITS[law]
        value = math.ldexp(round(mantissa * 2**bits), exponent - bits)
    return _float32(torch.tensor(value, dtype=torch.float64)).item()


# ---------------------------------------------------------------------------------------------------- weights


def index(base4, groups, outputs):
    """Global scale indices [groups, outputs] of a layer whose first quad is base4."""
    return torch.tensor(
        [[4 * (base4 + (g // 4) * outputs + n) + g % 4 for n in range(outputs)] for g in range(groups)],
        dtype=torch.int64,
    ).view(groups, outputs)


def perturbed(scales, k, coef, relative):
    """The scales [G, N] of one evaluation, float64."""
    return scales.double() * (1 + coef * k) if relative else scales.double() + coef * k


def weight(codes, scales, zeros, bits=4, table=None):
    """float64 [N, K] from codes [N, K], float64 scales [G, N], zeros None (all 2^(bits - 1)) or [G, N]; or from the
    float64 entries of a table that the codes stand for."""
    group = codes.shape[1] // scales.shape[0]
    zeros = torch.full_like(scales, 2.0 ** (bits - 1)) if zeros is None else zeros.double()
    spread = [t.double().T.repeat_interleave(group, 1) for t in (scales, zeros)]
    return spread[0] * (codes.double() - spread[1] if table is None else table.double()[codes.long()])


def vector_weight(codes, scales, codebooks, bits):
    """float64 [N, K] from codes [N, K/8, C], float64 scales [1, N] and codebooks [C, 2^bits, 8] of float16 or so.

    Up to 8 bits, the entries of two codebooks, of 0 and 1, 2 and 3 .., are added and rounded to the codebooks' type.
    """
    together = 2 if bits <= 8 else 1
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, codes.shape[2], together):
        books = range(first, min(first + together, codes.shape[2]))
        entries = torch.stack([codebooks[c].double()[codes[:, :, c].long()] for c in books])
        total = total + entries.sum(0).to(codebooks.dtype).double()
    return scales.T * total.flatten(1)


# ----------------------------------------------------------------------------------------------------- update


def _float32(values):
    return values.to(torch.float32).to(torch.float64)


def update(scales, noises, coefs, relative, floor):
    """The step on float32 scales: noises and coefs hold one raw tensor and one float for each direction."""
    old = scales.double()
    total = torch.ones_like(old) if relative else old.clone()
    for k, coef in zip(noises, coefs, strict=True):
        total = _float32(total + coef * k)
    new = _float32(old * total) if relative else total
    sign = torch.where(torch.signbit(old), -1.0, 1.0).double()
    size = torch.clamp(new * sign, min=floor)
    return torch.where(old == 0, old, torch.copysign(size, sign)).to(torch.float32)
