"""The step on the scales: every noise value regenerated from its seed, the whole arena in one launch.

    relative:  t = 1;  t += a_j * k_j in order of j;  s <- s * t
    absolute:          s += a_j * k_j in order of j
    projection:        s <- copysign(max(s * sign, floor), sign);  a scale that is zero stays zero

with (seed_j, a_j) the applied directions, a_j = -(lr / J) d_j on raw noise (noise.kernel_coefs). Paper: QZO, arXiv
2505.13430, algorithm 1, whose max(s, 0) would destroy a model with negative scales: the sign a scale was loaded with
is kept. The sign bit survives a floor of 0 as -0.0.
"""
import torch
import triton
import triton.language as tl

from .noise import BLOCK_QUADS, ROUNDS, quad_noise, raw_noise

BLOCK = 256          # quads of a program: one 16-byte access per thread and quad


@triton.jit(do_not_specialize=["pairs", "base4", "quads"])
def _update_kernel(scales_ptr, seeds_ptr, coefs_ptr, floor: tl.float32, pairs: tl.int32, base4: tl.int64,
                   quads: tl.int64, LAW: tl.constexpr, RELATIVE: tl.constexpr, WIDE: tl.constexpr,
                   ROUNDS_: tl.constexpr, BLOCK_: tl.constexpr):
    """grid = (cdiv(quads, BLOCK_),); in place. Never to be auto-tuned: a trial run would be a step."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_ + tl.arange(0, BLOCK_)
    at = scales_ptr + 4 * i[:, None] + tl.arange(0, 4)[None, :]
    live = (i < quads)[:, None]
    s = tl.load(at, mask=live, other=0.0)
    # RELATIVE collects the factor, otherwise the sum itself
    total = tl.full((BLOCK_, 4), 1.0, tl.float32) if RELATIVE else s
    for j in range(pairs):
        k0, k1, k2, k3 = quad_noise(tl.load(seeds_ptr + j), base4 + i, LAW, WIDE, ROUNDS_)
        k = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (BLOCK_, 4))
        total = tl.fma(k, tl.load(coefs_ptr + j), total)
    new = s * total if RELATIVE else total
    negative = s.to(tl.uint32, bitcast=True) >> 31 != 0
    size = tl.maximum(tl.where(negative, -new, new), floor)
    new = tl.where(s == 0.0, s, tl.where(negative, -size, size))
    tl.store(at, new, mask=live)


def launch(scales, seeds, coefs, *, base4, law, relative, floor):
    """Update `scales` (float32, contiguous, whole quads from quad base4 on) in place with every (seed, coef)."""
    quads = scales.numel() // 4
    _update_kernel[(triton.cdiv(quads, BLOCK),)](
        scales, seeds, coefs, floor, seeds.numel(), base4, quads, LAW=law, RELATIVE=bool(relative),
        WIDE=base4 + quads > 1 << 32, ROUNDS_=ROUNDS, BLOCK_=BLOCK, num_warps=4, enable_fp_fusion=False)


def update_torch(scales, seeds, coefs, *, base4, law, relative, floor):
    """The same in torch, bit for bit for the integer laws; in blocks of at most 64 k scales and a quarter arena."""
    flat = scales.view(-1, 4)
    block = min(BLOCK_QUADS, max(1, len(flat) // 4))
    for start in range(0, len(flat), block):
        s = flat[start:start + block]
        quads = torch.arange(base4 + start, base4 + start + len(s), device=s.device)
        total = torch.ones_like(s) if relative else s.clone()
        for seed, coef in zip(seeds, coefs, strict=True):
            total += raw_noise(law, seed, quads).mul_(coef)
        new = total.mul_(s) if relative else total
        negative = torch.signbit(s)
        size = torch.where(negative, -new, new).clamp_(min=floor)
        s.copy_(torch.where(s == 0, s, torch.where(negative, -size, size)))
