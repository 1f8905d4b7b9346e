"""The matmul of qmm.py in plain torch: the CPU backend, and the kernel's reference implementation on any device.

Never a whole layer in float: a chunk of output rows is unpacked once, then scaled and multiplied for each evaluation
in turn, in two buffers that stay in cache. One matmul per evaluation, its rows on 64-byte boundaries: a coef-0 block
has the bits of a plain forward of the same rows, whatever stands beside it.

Threads share the chunks, one matmul each, instead of sharing every matmul: these are too small to be divided, and a
chunk's bits do not depend on who computes it.
"""
import concurrent.futures
import functools
import os
import time

import torch

from .codes import middle
from .noise import BLOCK_QUADS, NONE, RAW_BYTES, raw_noise

CHUNK_BYTES = 1 << 20
THREADED_FROM = 1 << 22       # multiply-adds below which handing chunks to threads costs more than it saves
CHUNK_ROWS = 256             # below this many rows at large K the matmuls become too thin


def chunk_rows(n, k):
    """Output rows unpacked at a time: at most 1 MB or 256 rows, in an even number of even chunks."""
    most = max(CHUNK_BYTES // (4 * k), CHUNK_ROWS)
    return -(-n // (2 * -(-n // (2 * most))))


def _aligned(rows):
    """The rows as contiguous float32 on a 64-byte boundary, where the matmul library's choices depend on shape only."""
    rows = rows.to(torch.float32).contiguous()
    return rows.clone() if rows.data_ptr() % 64 else rows


def _raw_block(law, seeds, weight, quads, start, stop, limit):
    """Raw noise of output rows start..stop of a weight: for each seed float32 [quads, stop - start, 4].

    Philox runs on at most `limit` quads at a time: on several seeds at once where they are short, else in parts.
    """
    columns = torch.arange(start, stop, device=seeds.device)
    wanted = weight.base4 + torch.arange(quads, device=seeds.device)[:, None] * weight.next_quad + columns
    if wanted.numel() <= limit:
        at_once = limit // wanted.numel()
        return [raw for some in seeds.split(at_once) for raw in raw_noise(law, some, wanted)]
    rows = max(1, limit // (stop - start))
    return [torch.cat([raw_noise(law, seed, part) for part in wanted.split(rows)]) for seed in seeds]


def _noise_limit(scales):
    """Most quads whose noise is made at once: a quarter at the most of the arena that the scales are a part of."""
    return max(1, min(BLOCK_QUADS, scales.untyped_storage().nbytes() // 64))


def scratch_bytes(m, dtype, weight, perturbation, threads):
    """Bytes that qmm_torch holds for a while beside x [m, K] and y [m, N] in `dtype`, on `threads` threads.

    Each thread: a chunk of the weight, unpacked and scaled, and what it is looked up by; its part of y where that is
    not written in place; the raw noise of one seed per pair of evaluations, and what it is made through.
    """
    n, k, evaluations = weight.out_features, weight.in_features, len(perturbation)
    rows, step = m // evaluations, chunk_rows(n, k)
    workers = 1 if m * n * k < THREADED_FROM else min(threads, -(-n // step))
    direct = dtype == torch.float32 and rows * n % 16 == 0
    noise = 0
    if perturbation.law != NONE:
        quads, seeds = 1 if perturbation.shared else len(weight.scales), -(-evaluations // 2)
        limit = _noise_limit(weight.scales)
        noise = 16 * max(min(limit, seeds * quads * n), seeds * quads * step) + RAW_BYTES * min(limit, quads * n)
    copies = 0 if dtype == torch.float32 and rows * k % 16 == 0 else 4 * m * k
    each = 8 * step * k + weight.form.decoding_bytes(step, k) + (0 if direct else 4 * rows * step) + noise
    return copies + workers * each


def perturb_torch(s, k, coef, relative):
    """scales.perturb in torch: one rounding per written operation."""
    p = k * coef
    return p.add_(1.0).mul_(s) if relative else p.add_(s)


def _by_group(p, w):
    """Scales in quads [quads, rows of W, 4] -> [rows of W, groups, 1], to multiply w [rows of W, groups, group]."""
    return p.permute(1, 0, 2).reshape(w.shape[0], -1, 1)[:, :w.shape[1]]


class _Matmul:
    """What all chunks of one matmul have in common."""

    def __init__(self, x, weight, perturbation, y, exact):
        self.weight, self.perturbation, self.y, self.exact, self.dtype = weight, perturbation, y, exact, x.dtype
        self.form, self.rows = weight.form.in_float32(), len(x) // len(perturbation)
        self.blocks = [_aligned(x[e * self.rows:(e + 1) * self.rows]) for e in range(len(perturbation))]
        self.turns = _by_seed(perturbation.seeds)
        self.seeds = torch.stack([perturbation.seeds[turn[0]] for turn in self.turns])
        self.coefs = perturbation.coefs.tolist()
        self.step = chunk_rows(weight.out_features, weight.in_features)
        # noise is made for several chunks at once, but never for more than a quarter of the arena
        self.limit = _noise_limit(weight.scales)
        self.quads = 1 if perturbation.shared else len(weight.scales)          # of noise, for an output row
        self.per_block = max(1, self.limit // (self.quads * len(self.turns) * self.step))
        # every block of y starts on a 64-byte boundary
        self.direct = y.dtype == torch.float32 and self.rows * weight.out_features % 16 == 0

    def run(self, first, last):
        """Output rows first..last, chunk by chunk."""
        device, law = self.y.device, self.perturbation.law
        scaled = torch.empty(self.step, self.weight.in_features, dtype=torch.float32, device=device)
        part = None if self.direct else torch.empty(self.rows, self.step, dtype=torch.float32, device=device)
        raws = [None] * len(self.turns)
        for number, start in enumerate(range(first, last, self.step)):
            stop = min(start + self.step, last)
            if law != NONE and number % self.per_block == 0:
                origin = start
                end = min(start + self.per_block * self.step, last)
                raws = _raw_block(law, self.seeds, self.weight, self.quads, start, end, self.limit)
            here = [None if raw is None else raw[:, start - origin:stop - origin] for raw in raws]
            self.multiply(start, stop, here, scaled[:stop - start], part)

    def unpacked(self, start, stop):
        """float32 [rows of W, groups, group]: what the codes of output rows start..stop stand for, less zero points."""
        weight = self.weight
        units = self.form.decode(weight.codes, weight.in_features, start, stop, self.dtype, self.exact)
        units = units.view(stop - start, -1, weight.group)
        if weight.zeros is not None:
            units -= (weight.zeros[:, start:stop].to(torch.float32) - middle(weight.bits)).T.unsqueeze(2)
        return units

    def multiply(self, start, stop, raws, scaled, part):
        """One chunk under every evaluation; raws: its noise for each turn, scaled and part: where to work."""
        shared, relative = self.perturbation.shared, self.perturbation.relative
        units = self.unpacked(start, stop)
        s = self.weight.scales[:, start:stop]                               # [quads, rows of W, 4]
        w = scaled.view(units.shape)
        if shared or self.perturbation.law == NONE:
            torch.mul(units, _by_group(s, w), out=w)                        # one weight serves every evaluation
        for turn, raw in zip(self.turns, raws, strict=True):
            for e in turn:
                if raw is not None and not shared:
                    torch.mul(units, _by_group(perturb_torch(s, raw, self.coefs[e], relative), w), out=w)
                target = self.y[e * self.rows:(e + 1) * self.rows, start:stop]
                out = target if self.direct else part[:, :stop - start]
                torch.mm(self.blocks[e], scaled.T, out=out)
                if raw is not None and shared:
                    out *= perturb_torch(1.0, raw[0, :, 0], self.coefs[e], True)
                if self.weight.bias is not None:
                    out += self.weight.bias[start:stop]
                if not self.direct:
                    target.copy_(out)


def qmm_torch(x, weight, perturbation, y, *, exact=False):
    """Fill y [E*R, N] as plan.launch does, from codes in planes or rows. Sums in float32."""
    matmul, (m, k), n = _Matmul(x, weight, perturbation, y, exact), x.shape, y.shape[1]
    threads = torch.get_num_threads()
    if threads == 1 or x.device.type != "cpu" or m * n * k < THREADED_FROM:
        matmul.run(0, n)
        return
    chunks = -(-n // matmul.step)
    share = -(-chunks // min(threads, chunks)) * matmul.step
    inference = torch.is_inference_mode_enabled()

    def work(first):
        with torch.inference_mode(inference), torch.no_grad():     # both are settings of a thread
            matmul.run(first, min(first + share, n))

    list(_pool(threads, os.getpid()).map(work, range(0, n, share)))


@functools.cache
def _pool(threads, process):
    """Threads whose own matmuls run on one thread each; the caller's setting stays as it is.

    process: its id, since a fork has no threads but the one that forked.
    """
    pool = concurrent.futures.ThreadPoolExecutor(threads, "qzo", initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(time.sleep, [0.01] * threads))                   # all of them exist, and have set theirs
    torch.set_num_threads(threads)
    return pool


def _by_seed(seeds):
    """Evaluations that share a seed (+eps and -eps), in order of first appearance: their noise is made once."""
    turns = {}
    for e, seed in enumerate(seeds.tolist()):
        turns.setdefault(seed, []).append(e)
    return list(turns.values())
