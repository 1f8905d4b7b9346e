"""Memory bandwidth by itself: a kernel that only reads and one that copies, on a CPU what torch has for it."""

import torch
import triton
import triton.language as tl

BLOCK, TURNS = 4096, 8  # int32 of a turn, turns of a program


@triton.jit
def _read_kernel(x, sums, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    """Program p reads TURNS blocks of x; sums[p] is their sum, so that no load can be left out."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * TURNS
    total = tl.zeros((BLOCK,), tl.int32)
    for turn in range(TURNS):
        total += tl.load(x + start + turn * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def _copy_kernel(x, y, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    """Program p copies TURNS blocks of x into y."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * TURNS
    for turn in range(TURNS):
        at = start + turn * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at))


def sums_of(x):
    """What `read` writes into for x, int32 [programs]; ValueError unless x is whole programs."""
    if x.numel() % (BLOCK * TURNS):
        raise ValueError(f"{x.numel()} numbers: expected a multiple of {BLOCK * TURNS}")
    return torch.zeros(x.numel() // (BLOCK * TURNS), dtype=torch.int32, device=x.device)


def read(x, sums):
    """Read all of x once: int32 on a GPU, summed into `sums`; float32 on a CPU, its dot product with itself."""
    if x.dtype == torch.int32:
        _read_kernel[(len(sums),)](x, sums, BLOCK, TURNS, num_warps=8)
        return
    torch.dot(x, x)


def copy(x, y):
    """y <- x."""
    if x.dtype == torch.int32:
        _copy_kernel[(x.numel() // (BLOCK * TURNS),)](x, y, BLOCK, TURNS, num_warps=8)
        return
    y.copy_(x)
