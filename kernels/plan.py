"""All that follows from a Weight, the form of a Perturbation, the rows and the chip: made once, then only launched.

The first launch goes through Triton, which compiles; every later one calls the compiled kernel's own launcher with
arguments packed ahead: of them only x, y, seeds, coefficients and scratch are new.
"""
import math

import torch
import triton

from . import tiles
from .codes import TILE_K
from .lookup import PLAIN, lookups
from .noise import NONE, ROUNDS
from .qmm import _group_sums_kernel, _qmm_kernel, gdc_wait

ZERO_NONE, ZERO_INTEGER, ZERO_FLOAT = 0, 1, 2
ZEROS = {None: ZERO_NONE, torch.float32: ZERO_FLOAT, torch.uint8: ZERO_INTEGER}
WIDE_FROM = 1 << 32          # quad numbers from here on need the second counter word
MOST_MEMBERS = 3             # weights of one launch


def constants(tile, weight, *, rows, law, relative, shared, pair, asm, pdl=False, lookup=PLAIN, members=1):
    """The kernel's compile-time constants; members: weights of one launch, which have the same ones.

    A pair that one tile cannot hold takes two tiles' rows: the product of one row has the same bits in either.
    lookup: the constants of lookup.lookups.
    """
    k, group = weight.in_features, weight.group
    whole_row = group not in tiles.GROUPS or group == k
    ratio = tile.ratio and not whole_row
    most = tiles.most_paired(group)
    if lookup["PASSES"] > (2 if lookup["BOOKS"] else 1):
        most //= 4 if lookup["BOOKS"] else 2
    pair = pair and law != NONE and rows <= most and not ratio
    return dict(BM=2 * tile.rows if pair and 2 * rows > tile.rows else tile.rows, BN=tile.outputs,
                LANES=tile.outputs if tile.in_order else lanes(tile),
                FOLD=lanes(tile) == tile.outputs == 128 and not tile.in_order, BITS=weight.bits,
                GROUP=128 if whole_row else group, WHOLE_ROW=whole_row, LAW=law,
                RELATIVE=bool(relative), SHARED=bool(shared), PAIR=bool(pair), WIDE=is_wide(weight),
                ZERO=ZEROS[weight.zero_type], RATIO=ratio, DEEP=tile.deep, ASM=bool(asm),
                SPLITS=split_count(tile, k, group)[0], PDL=bool(pdl), BIAS=weight.bias is not None,
                MASK_K=k % TILE_K != 0, ROUNDS_=ROUNDS, MEMBERS=members, **lookup)


def lanes(tile):
    """Threads of a program that look after its outputs' scales (scales.py): two for an output where there are more."""
    return tile.outputs * (2 if 32 * tile.warps > tile.outputs else 1)


def is_wide(weight):
    """Whether quad numbers of the weight reach beyond 32 bits."""
    return weight.base4 + weight.scales.shape[0] * weight.out_features > WIDE_FROM


def together(one, other):
    """Whether one launch may multiply both weights: they differ in their outputs, and in their values."""
    def form(weight):
        bias = None if weight.bias is None else weight.bias.dtype
        return (weight.codes.dtype, weight.in_features, weight.group, weight.bits, weight.table, weight.zero_type,
                bias, is_wide(weight), weight.scales.device)
    return form(one) == form(other) and one.codebooks is None is other.codebooks


def split_count(tile, k, group):
    """(programs that share K, steps of 128 k each of them makes): whole quads of groups to each."""
    count = -(-k // TILE_K)
    period = 1 if group == k else max(1, 4 * group // TILE_K)
    per_split = -(-count // tile.splits)
    per_split = -(-per_split // period) * period
    return -(-count // per_split), per_split


def scratch_bytes(m, n, k, group, tile, zeros):
    """Bytes that a launch holds for a while beside x [m, k] and y [m, n]; zeros: dtype of the zero points or None."""
    splits = split_count(tile, k, group)[0]
    return (4 * splits * m * n if splits > 1 else 0) + (4 * (k // group) * m if zeros == torch.float32 else 0)


def overlaps(arch):
    """Whether launches may begin before the one ahead of them has ended (Hopper's programmatic dependent launch)."""
    return gdc_wait is not None and arch.startswith("sm_") and int(arch[3:]) >= 90


class Plan:
    """How `weight` is multiplied with m rows of `dtype` under perturbations of one form.

    others : weights that the same launch multiplies with the same rows, each into a y of its own (`together`); up to
        MOST_MEMBERS in all
    perturbation : any of that form
    tile, asm, pdl : the tile; unpack with inline PTX (NVIDIA, 16-bit x) or its plain twin; overlap with the launch
        ahead (`overlaps`)
    exact : a table without rounding it to x's type

    Two launches of one plan that run at the same time, on two streams, are not allowed: they share counters.
    """

    def __init__(self, weight, perturbation, m, dtype, *, tile, asm, exact=False, pdl=False, others=()):
        members = (weight, *others)
        k, count, widths = weight.in_features, len(perturbation), [member.out_features for member in members]
        law = perturbation.law
        rows = m if law == NONE else m // count                 # without noise all rows are one block
        entries, lookup = lookups(_qmm_kernel, weight.scales, dtype, weight.table, exact, weight.codebooks)
        self.constants = constants(
            tile, weight, rows=rows, law=law, relative=perturbation.relative, shared=perturbation.shared,
            pair=perturbation.pair, asm=asm and dtype != torch.float32, pdl=pdl, lookup=lookup, members=len(members))
        splits, per_split = split_count(tile, k, weight.group)
        each = rows * (2 if self.constants["PAIR"] else 1)
        blocks = m // each * triton.cdiv(each, self.constants["BM"])
        self.grid = sum(triton.cdiv(n, tile.outputs) for n in widths), blocks, splits
        self.parts = (splits, m, sum(widths)) if splits > 1 else None
        self.sums = (weight.groups, m) if weight.zero_type == torch.float32 else None
        self.nothing = weight.scales                            # stands for a tensor that is not there
        device = weight.scales.device
        counters = self.nothing
        if splits > 1:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a matmul meets these rows for the first time inside a CUDA graph's capture: run it "
                                   "once before")
            counters = torch.zeros(math.prod(self.grid[:2]), dtype=torch.int32, device=device)
        self.tensors = (weight.codes, weight.scales, self._or_nothing(weight.zeros), entries,
                        self._or_nothing(weight.bias), counters)
        self.absent = (self.nothing,) * (MOST_MEMBERS - len(members))       # in place of a member's y
        self.more = [self._or_nothing(t) for w in others for t in (w.codes, w.scales, w.zeros, w.bias)]
        self.more += [self.nothing] * (4 * len(self.absent))
        self.numbers = (weight.base4, rows, m, widths[0], k, weight.groups, k, triton.cdiv(k, TILE_K), per_split,
                        *(number for w in others for number in (w.base4, w.out_features)), *(0, 0) * len(self.absent))
        limit = {"maxnreg": tile.registers} if tile.registers else {}       # an option that AMD's compiler lacks
        self.options = dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False, **limit)
        if pdl:
            self.options["launch_pdl"] = True
        self.compiled = None

    def _or_nothing(self, tensor):
        return self.nothing if tensor is None else tensor

    def __call__(self, x, seeds, coefs, y, *more):
        """Fill y [m, N] from contiguous x [m, K] on 16 bytes; more: the y of each of the others."""
        more += self.absent
        parts = sums = self.nothing
        if self.parts:
            parts = self.scratch(self.parts)
        if self.sums:
            sums = self.scratch(self.sums)
            self._sum_groups(x, sums)
        if self.compiled is not None:
            self.compiled(x.data_ptr(), y.data_ptr(), seeds.data_ptr(), coefs.data_ptr(), parts.data_ptr(),
                          sums.data_ptr(), *self.pointers, more[0].data_ptr(), more[1].data_ptr(), *self.packed)
            return
        compiled = _qmm_kernel[self.grid](x, y, seeds, coefs, parts, sums, *self.tensors, *more, *self.more,
                                          *self.numbers, **self.constants, **self.options)
        if compiled is not None:                # None: the interpreter, or a launch that is only recorded
            names = _qmm_kernel.arg_names[-len(self.constants):]
            self.pointers = [t.data_ptr() for t in self.tensors]
            self.packed = (*(t.data_ptr() for t in self.more), *self.numbers, *(self.constants[n] for n in names))
            self.compiled = compiled[self.grid]

    def scratch(self, shape):
        return torch.empty(shape, dtype=torch.float32, device=self.nothing.device)

    def _sum_groups(self, x, sums):
        (groups, m), k = sums.shape, x.shape[-1]
        group = k // groups
        _group_sums_kernel[(triton.cdiv(m, 32), groups)](
            x, sums, m, k, group, k, BM=32, BK=min(128, triton.next_power_of_2(group)), enable_fp_fusion=False)


def launch(x, weight, perturbation, y, *more, **how):
    """Run the kernels once on checked arguments; y [E*R, N] is filled, and more are. x is contiguous, E*R > 0.

    how: tile, asm, exact, pdl and others, as Plan takes them.
    """
    Plan(weight, perturbation, len(x), x.dtype, **how)(x, perturbation.seeds, perturbation.coefs, y, *more)
