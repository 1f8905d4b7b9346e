"""The matmul of qmm.py in plain torch: the CPU backend, and the kernel's twin on any device.

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

from .codes import centred_codes, middle
from .noise import BLOCK_QUADS, NONE, RAW_BYTES, raw_noise
from .table import table_entries
from .vectors import decoding_bytes, vector_rows

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


def _raw_block(law, seeds, base4, quads, n, start, stop, limit):
    """Raw noise of output rows start..stop: for each seed float32 [quads, stop - start, 4].

    Philox runs on at most `limit` quads at a time: on several seeds at once where they are short, else in parts.
    """
    columns = torch.arange(start, stop, device=seeds.device)
    wanted = base4 + torch.arange(quads, device=seeds.device)[:, None] * n + columns
    if wanted.numel() <= limit:
        at_once = limit // wanted.numel()
        return [raw for some in seeds.split(at_once) for raw in raw_noise(law, some, wanted)]
    rows = max(1, limit // (stop - start))
    return [torch.cat([raw_noise(law, seed, part) for part in wanted.split(rows)]) for seed in seeds]


def _noise_limit(arena_bytes):
    """Most quads whose noise is made at once: a quarter of the arena at the most."""
    return max(1, min(BLOCK_QUADS, arena_bytes // 64))


def scratch_bytes(m, n, k, group, evaluations, dtype, law, shared, arena_bytes, threads, *, table=False, books=0,
                  bits=4):
    """Bytes that qmm_torch holds for a while beside x [m, k] and y [m, n] in `dtype`, on `threads` threads.

    Each thread: a chunk of the weight, unpacked and scaled, and what it is looked up by; its part of y where that is
    not written in place; the raw noise of one seed per pair of evaluations, and what it is made through.
    """
    rows, step = m // evaluations, chunk_rows(n, k)
    workers = 1 if m * n * k < THREADED_FROM else min(threads, -(-n // step))
    direct = dtype == torch.float32 and rows * n % 16 == 0
    noise = 0
    if law != NONE:
        quads, seeds, limit = 1 if shared else -(-k // (4 * group)), -(-evaluations // 2), _noise_limit(arena_bytes)
        noise = 16 * max(min(limit, seeds * quads * n), seeds * quads * step) + RAW_BYTES * min(limit, quads * n)
    looked_up = decoding_bytes(step, k, books, bits) if books else 2 * step * k if table else 0
    copies = 0 if dtype == torch.float32 and rows * k % 16 == 0 else 4 * m * k
    return copies + workers * (8 * step * k + looked_up + (0 if direct else 4 * rows * step) + noise)


def perturb_torch(s, k, coef, relative):
    """Twin of qmm.perturb: one rounding per written operation."""
    p = k * coef
    return p.add_(1.0).mul_(s) if relative else p.add_(s)


def _by_group(p, w):
    """Scales in quads [quads, rows of W, 4] -> [rows of W, groups, 1], to multiply w [rows of W, groups, group]."""
    return p.permute(1, 0, 2).reshape(w.shape[0], -1, 1)[:, :w.shape[1]]


def qmm_torch(x, weight, perturbation, y, *, exact=False):
    """Fill y [E*R, N] as plan.launch does, from codes in planes or rows. Sums in float32."""
    m, k = x.shape
    n, codes, scales, bits, group = y.shape[1], weight.codes, weight.scales, weight.bits, weight.group
    zeros, bias, table = weight.zeros, weight.bias, weight.table
    seeds, law, relative, shared = perturbation.seeds, perturbation.law, perturbation.relative, perturbation.shared
    rows = m // seeds.numel()
    blocks = [_aligned(x[e * rows:(e + 1) * rows]) for e in range(seeds.numel())]
    turns = _by_seed(seeds)
    distinct = torch.stack([seeds[turn[0]] for turn in turns])
    coef_list = perturbation.coefs.tolist()
    step = chunk_rows(n, k)
    # noise is made for several chunks at once, but never for more than a quarter of the arena
    limit = _noise_limit(scales.untyped_storage().nbytes())
    quads = 1 if shared else len(scales)                                # of noise, for an output row
    per_block = max(1, limit // (quads * len(turns) * step))
    books = None if weight.codebooks is None else weight.codebooks.float()
    direct = y.dtype == torch.float32 and rows * n % 16 == 0       # every block of y starts on a 64-byte boundary

    def run(first, last):
        """Output rows first..last, chunk by chunk."""
        scaled = torch.empty(step, k, dtype=torch.float32, device=x.device)
        part = None if direct else torch.empty(rows, step, dtype=torch.float32, device=x.device)
        raws = [None] * len(turns)
        for number, start in enumerate(range(first, last, step)):
            stop = min(start + step, last)
            if law != NONE and number % per_block == 0:
                origin = start
                end = min(start + per_block * step, last)
                raws = _raw_block(law, distinct, weight.base4, quads, n, start, end, limit)
            if books is not None:
                unpacked = vector_rows(codes, k, start, stop, books, x.dtype)
            elif table is not None:
                unpacked = table_entries(codes, k, start, stop, table, x.dtype, exact)
            else:
                unpacked = centred_codes(codes, k, start, stop, bits)
            unpacked = unpacked.view(stop - start, -1, group)
            if zeros is not None:
                unpacked -= (zeros[:, start:stop].to(torch.float32) - middle(bits)).T.unsqueeze(2)
            s = scales[:, start:stop]                                                  # [quads, rows of W, 4]
            w = scaled[:stop - start].view(unpacked.shape)
            if shared or law == NONE:
                torch.mul(unpacked, _by_group(s, w), out=w)             # one weight serves every evaluation
            for turn, raw in zip(turns, raws, strict=True):
                here = None if raw is None else raw[:, start - origin:stop - origin]
                for e in turn:
                    if here is not None and not shared:
                        torch.mul(unpacked, _by_group(perturb_torch(s, here, coef_list[e], relative), w), out=w)
                    target = y[e * rows:(e + 1) * rows, start:stop]
                    out = target if direct else part[:, :stop - start]
                    torch.mm(blocks[e], scaled[:stop - start].T, out=out)
                    if here is not None and shared:
                        out *= perturb_torch(1.0, here[0, :, 0], coef_list[e], True)
                    if bias is not None:
                        out += bias[start:stop]
                    if not direct:
                        target.copy_(out)
            del unpacked                                       # before the next chunk is: one at a time

    threads = torch.get_num_threads()
    if threads == 1 or x.device.type != "cpu" or m * n * k < THREADED_FROM:
        run(0, n)
        return
    chunks = -(-n // step)
    share = -(-chunks // min(threads, chunks)) * step
    inference = torch.is_inference_mode_enabled()

    def work(first):
        with torch.inference_mode(inference), torch.no_grad():     # both are settings of a thread
            run(first, min(first + share, n))

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
