"""The step on the scales: every noise value regenerated from its seed, the whole arena in one launch.

Several steps are one launch, too: each program takes its scales through all of them, so a replay reads and writes an
arena once for many steps, with the bits of a launch for each.

    relative:  t = 1;  t += a_j * k_j in order of j;  s <- s * t
    absolute:          s += a_j * k_j in order of j
    projection:        s <- copysign(max(s * sign, floor), sign);  a scale that is zero stays zero

with (seed_j, a_j) the applied directions, a_j = -(lr / J) d_j on raw noise (noise.kernel_coefs). Paper: QZO, arXiv
2505.13430, algorithm 1, whose max(s, 0) would destroy a model with negative scales: the sign a scale was loaded with
is kept. The sign bit survives a floor of 0 as -0.0.

A coefficient that is NaN leaves every scale as it is: how a step that runs on a device without a look from the host
skips a loss that is not finite.

Seeds and coefficients are [J] of one step, or [S, J] of S steps, in their order.

Noise shared by rows (relative): every scale of an output row has the k of the row's first scale, so that a row's
scales move by one factor. `layers`, int64 [L, 3], then tells where each layer's quads begin and end and how many
outputs it has.

Terms (projection): docs/glossary.md.
"""
import itertools

import torch
import triton
import triton.language as tl

from .noise import BLOCK_QUADS, RAW_BYTES, quad_noise, raw_noise

BLOCK = 256          # quads of a program: one 16-byte access per thread and quad
CACHED_QUADS = BLOCK_QUADS // 4      # of a block that the reference takes through several steps


@triton.jit
def _project(s, new, floor):
    """new, with the sign of s and at least `floor` in size; a zero scale as it was, every scale where new is NaN.

    size * -1.0 and not -size, which Triton 3.4 takes for 0 - size: the sign of a size of zero would be lost.
    """
    negative = s.to(tl.uint32, bitcast=True) >> 31 != 0
    size = tl.maximum(tl.where(negative, -new, new), floor)
    return tl.where((s == 0.0) | (new != new), s, tl.where(negative, size * -1.0, size))


@triton.jit(do_not_specialize=["steps", "pairs", "base4", "quads"])
def _update_kernel(scales_ptr, seeds_ptr, coefs_ptr, floor: tl.float32, steps: tl.int32, pairs: tl.int32,
                   base4: tl.int64, quads: tl.int64, LAW: tl.constexpr, RELATIVE: tl.constexpr, WIDE: tl.constexpr,
                   BLOCK_: tl.constexpr):
    """grid = (cdiv(quads, BLOCK_),); in place. Never to be auto-tuned: a trial run would be a step."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_ + tl.arange(0, BLOCK_)
    at = scales_ptr + 4 * i[:, None] + tl.arange(0, 4)[None, :]
    live = (i < quads)[:, None]
    s = tl.load(at, mask=live, other=0.0)
    for step in range(steps):
        # RELATIVE collects the factor, otherwise the sum itself
        total = tl.full((BLOCK_, 4), 1.0, tl.float32) if RELATIVE else s
        for j in range(step * pairs, (step + 1) * pairs):
            k0, k1, k2, k3 = quad_noise(tl.load(seeds_ptr + j), base4 + i, LAW, WIDE)
            k = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (BLOCK_, 4))
            total = tl.fma(k, tl.load(coefs_ptr + j), total)
        s = _project(s, s * total if RELATIVE else total, floor)
    tl.store(at, s, mask=live)


@triton.jit(do_not_specialize=["steps", "pairs"])
def _update_rows_kernel(scales_ptr, layers_ptr, seeds_ptr, coefs_ptr, floor: tl.float32, steps: tl.int32,
                        pairs: tl.int32, LAW: tl.constexpr, WIDE: tl.constexpr, BLOCK_: tl.constexpr):
    """grid = (programs of a layer, layers), each with blocks a stride apart; in place, noise shared by rows."""
    first = tl.load(layers_ptr + 3 * tl.program_id(1))
    quads = (tl.load(layers_ptr + 3 * tl.program_id(1) + 1) - first).to(tl.int32)
    outputs = tl.load(layers_ptr + 3 * tl.program_id(1) + 2).to(tl.int32)
    for start in range(tl.program_id(0) * BLOCK_, quads, tl.num_programs(0) * BLOCK_):
        i = start + tl.arange(0, BLOCK_)
        at = scales_ptr + 4 * (first + i)[:, None] + tl.arange(0, 4)[None, :]
        live = (i < quads)[:, None]
        s = tl.load(at, mask=live, other=0.0)
        for step in range(steps):
            total = tl.full((BLOCK_,), 1.0, tl.float32)
            for j in range(step * pairs, (step + 1) * pairs):
                k, _, _, _ = quad_noise(tl.load(seeds_ptr + j), first + i % outputs, LAW, WIDE)
                total = tl.fma(k, tl.load(coefs_ptr + j), total)
            s = _project(s, s * total[:, None], floor)
        tl.store(at, s, mask=live)


def launch(scales, seeds, coefs, *, base4, law, relative, floor, layers=None):
    """Update `scales` (float32, contiguous, whole quads from quad base4 on) in place with every (seed, coef), [J] or
    [S, J], contiguous.

    layers: for noise shared by rows; base4 is then 0, and `scales` the whole arena.
    """
    quads, pairs = scales.numel() // 4, seeds.shape[-1]
    steps = seeds.numel() // pairs
    if layers is not None:
        # twice the blocks of a layer of mean size: a larger one makes several turns, nothing waits for `layers`
        _update_rows_kernel[(triton.cdiv(2 * triton.cdiv(quads, BLOCK), len(layers)), len(layers))](
            scales, layers, seeds, coefs, floor, steps, pairs, LAW=law, WIDE=quads > 1 << 32, BLOCK_=BLOCK,
            num_warps=4, enable_fp_fusion=False)
        return
    _update_kernel[(triton.cdiv(quads, BLOCK),)](
        scales, seeds, coefs, floor, steps, pairs, base4, quads, LAW=law, RELATIVE=bool(relative),
        WIDE=base4 + quads > 1 << 32, BLOCK_=BLOCK, num_warps=4, enable_fp_fusion=False)


def scratch_bytes(quads):
    """Bytes that update_torch holds for a while in a step: a block's sum, its quad numbers and the noise that is
    added."""
    return min(BLOCK_QUADS, max(1, quads // 4)) * (16 + 8 + RAW_BYTES)


def update_torch(scales, seeds, coefs, *, base4, law, relative, floor, layers=None):
    """The same in torch, bit for bit for the integer laws.

    One step is made in blocks of at most 64 k scales and a quarter of the arena, several in blocks that stay in a cache
    from the first step to the last.
    """
    flat, several = scales.view(-1, 4), seeds.numel() > seeds.shape[-1]
    seeds, coefs = (t.view(-1, t.shape[-1]) for t in (seeds, coefs))
    if layers is not None:
        for first, end, outputs in layers.tolist():
            _update_rows_torch(flat[first:end].view(-1, outputs, 4), first, seeds, coefs, law, floor)
        return
    block = CACHED_QUADS if several else min(BLOCK_QUADS, max(1, len(flat) // 4))
    for start in range(0, len(flat), block):
        s = flat[start:start + block]
        quads = torch.arange(base4 + start, base4 + start + len(s), device=s.device)
        for moves in _moves(law, seeds, coefs, quads):
            total = torch.ones_like(s) if relative else s.clone()
            for move in moves:
                total += move
            s.copy_(_project_torch(s, total.mul_(s) if relative else total, floor))


def _update_rows_torch(scales, first, seeds, coefs, law, floor):
    """One layer, [quads of an output, N, 4]: a factor for each output and step."""
    outputs, block = scales.shape[1], BLOCK_QUADS if len(seeds) == 1 else CACHED_QUADS
    for start in range(0, outputs, block):
        quads = torch.arange(first + start, first + min(start + block, outputs), device=scales.device)
        for moves in _moves(law, seeds, coefs, quads):
            total = torch.ones(len(quads), device=scales.device)
            for move in moves:
                total += move[:, 0]
            for s in scales[:, start:start + block]:
                s.copy_(_project_torch(s, s * total[:, None], floor))


def _moves(law, seeds, coefs, quads):
    """Of each step in turn an iterator of coef * k of its directions, float32 [quads, 4], to be used up before the
    next; of several steps the noise of BLOCK_QUADS quads is made at a time."""
    at_once = 1 if len(seeds) == 1 else max(1, BLOCK_QUADS // len(quads))
    every = (move for some, its in zip(seeds.flatten().split(at_once), coefs.flatten().split(at_once), strict=True)
             for move in raw_noise(law, some, quads).mul_(its.view(-1, 1, 1)))
    for _ in seeds:
        yield itertools.islice(every, seeds.shape[1])


def _project_torch(s, new, floor):
    """_project in torch."""
    negative = torch.signbit(s)
    size = torch.where(negative, -new, new).clamp_(min=floor)
    return torch.where((s == 0) | new.isnan(), s, torch.where(negative, -size, size))
