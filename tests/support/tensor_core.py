"""How NVIDIA's tensor cores add, in float64, and the kernel's order of additions on them: what a GPU should give.

A block of 8 or 16 products and the accumulator are one sum. The products are exact; they and the accumulator are
aligned to the largest exponent, that of a product being the sum of its factors', and cut off toward zero `bits` binary
places below it; the sum of what is left is exact, and cut off toward zero again, to float32.
    Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021
    Xie, Wang, Yang, Yang: MMA-Sim, arXiv 2511.10909 (Hopper, Blackwell 25 places; Ampere, Ada 24 and blocks of 8)
    Khattak, Mikaitis: Accurate Models of NVIDIA Tensor Cores, arXiv 2512.07004 (the same for the H100 and the A100)
"""

import dataclasses

import torch

from qzo.kernels.vectors import words_of

TILE_K = 128


@dataclasses.dataclass(frozen=True)
class Core:
    block: int
    bits: int


CORES = {
    "sm_80": Core(8, 24),
    "sm_86": Core(8, 24),
    "sm_89": Core(8, 24),
    "sm_90": Core(16, 25),
    "sm_100": Core(16, 25),
    "sm_120": Core(16, 25),
}


def truncations(matmul, tile, arch):
    """How often the accumulator of an output is cut off before a float32 addition, to nearest, takes it over.

    Within a group where it has a partial sum of its own, else over all of K and every pass; splits, which make it
    fewer, are left out. 0 in float32, which has no tensor core; an unknown chip counts as the one of most.
    """
    if matmul.dtype == torch.float32:
        return 0
    chained = matmul.width
    if matmul.group == 0 or tile.ratio:
        chained = matmul.k * (words_of(matmul.books, matmul.bits) if matmul.books else 1 + matmul.exact)
    return -(-chained // CORES.get(arch, CORES["sm_80"]).block)


def _exponents(values):
    """Of values = f * 2^e with |f| in [1, 2); far below all others where they are 0."""
    return torch.where(values == 0, -300, torch.frexp(values)[1] - 1)


def _cut(values):
    """float64 cut off toward zero to the 24 bits of a float32."""
    return (values.view(torch.int64) >> 29 << 29).view(torch.float64)


def _nearest(values):
    return values.float().double()


def add_block(acc, w, x, core):
    """acc [N, M] + w [N, block] . x [M, block]^T, all float64 that holds the narrower types."""
    products = w[:, None] * x[None]
    exponents = _exponents(w)[:, None] + _exponents(x)[None]
    last = torch.maximum(exponents.amax(2), _exponents(acc)).clamp(min=-200) - core.bits
    terms = torch.cat([products, acc[:, :, None]], 2)
    return _cut(torch.ldexp(torch.ldexp(terms, -last[:, :, None]).trunc().sum(2), last))


def dot(acc, w, x, core):
    """acc [N, M] + w [N, k] . x [M, k]^T in blocks, or, without a core, in order of k, each sum rounded to nearest."""
    if core is None:
        for i in range(w.shape[1]):
            acc = _nearest(acc + w[:, i : i + 1] * x[:, i])
        return acc
    for at in range(0, w.shape[1], core.block):
        acc = add_block(acc, w[:, at : at + core.block], x[:, at : at + core.block], core)
    return acc


def _evaluation(matmul, tile, core, x, scales, words):
    """[N, M] of one evaluation: x [M, K], its perturbed scales [G, N], the passes' words [N, K].

    With codebooks k goes through a dot in the order of vectors.order.
    """
    whole = matmul.group == 0
    group = TILE_K if whole else matmul.width
    depth = group if tile.deep else 32
    acc = torch.zeros(len(words[0]), len(x), dtype=torch.float64)
    prev = torch.ones(len(acc), dtype=torch.float64)
    for start in range(0, x.shape[1], TILE_K):
        partial = acc
        for word in words:
            for h in range(0, min(TILE_K, x.shape[1] - start), depth):
                i = torch.arange(depth)
                at = start + (16 * (i % 16 // 2) + 2 * (i // 16) + i % 2 + h // 8 if matmul.books else i + h)
                g = start // group + h // group
                if not whole and h % group == 0:
                    if tile.ratio:
                        acc = partial = _nearest(acc * _nearest(prev * _nearest(1 / scales[g]))[:, None])
                        prev = scales[g]
                    else:
                        partial = torch.zeros_like(acc)
                partial = dot(partial, word[:, at], x[:, at], core)
                if not whole and (h + depth) % group == 0:
                    acc = partial if tile.ratio else _nearest(acc + partial * scales[g][:, None])
        acc = partial if whole else acc
    return _nearest(acc * scales[0][:, None]) if whole else _nearest(acc * prev[:, None]) if tile.ratio else acc


def emulate(matmul, tile, core, evaluations=None, row=slice(None), out=slice(None)):
    """float32 y as the kernel gives it on a tile without splits, or some of it; row: of each evaluation."""
    assert (tile.splits, matmul.zeros) == (1, None)
    pad = (0, -matmul.k % TILE_K if matmul.group == 0 else 0)
    words = [torch.nn.functional.pad(word[out], pad) for word in matmul.passes(torch.ones_like(matmul.scales))]
    blocks = []
    for e in range(len(matmul.seeds)) if evaluations is None else evaluations:
        x = torch.nn.functional.pad(matmul.x.double().split(matmul.rows)[e][row], pad)
        k, coef, s = matmul.raw_noise[e][:, out], matmul.raw_coefs[e].double(), matmul.scales[:, out].double()
        scales = _nearest(s * _nearest(1 + coef * k)) if matmul.relative else _nearest(s + coef * k)
        y = _evaluation(matmul, tile, core, x, scales, words)
        if matmul.bias:
            y = _nearest(y + matmul.bias_values[out].double()[:, None])
        blocks.append(y.T)
    return torch.cat(blocks).float()
