"""All that follows from a Weight, the form of a Perturbation, the rows and the chip: made once, then only launched.

The first launch goes through Triton, which compiles; every later one calls the compiled kernel's own launcher with
arguments packed ahead: of them only x, y, seeds, coefficients and scratch are new.

Terms (plan): docs/glossary.md.
"""
import dataclasses
import math

import torch
import triton

from . import tiles
from .codes import TILE_K
from .constants import Constants, is_wide, of_operands
from .noise import NONE
from .qmm import _group_sums_kernel, _qmm_kernel, gdc_wait

MOST_MEMBERS = 3             # weights of one launch


@dataclasses.dataclass(frozen=True)
class Options:
    """How a launch is made, whatever its operands.

    tile : the tiles.Tile
    asm : unpack with inline PTX (NVIDIA, 16-bit x) or in Triton's own operations
    exact : a table without rounding it to x's type
    pdl : begin while the launch ahead ends (`overlaps`)
    """

    tile: tiles.Tile
    asm: bool
    exact: bool = False
    pdl: bool = False


def constants(weight, perturbation, rows, options, lookup, members=1):
    """The kernel's Constants for so many rows of an evaluation; members: weights of one launch, which have the same
    ones; lookup: the fields of the form's `lookup`.

    A pair that one tile cannot hold takes two tiles' rows: the product of one row has the same bits in either.
    """
    tile, k = options.tile, weight.in_features
    common = of_operands(weight, perturbation, lookup, options.asm)
    ratio = tile.ratio and not common["WHOLE_ROW"]
    most, vectors = tiles.most_paired(weight.group), common["BOOKS"] > 0
    if common["PASSES"] > (2 if vectors else 1):
        most //= 4 if vectors else 2
    pair = bool(perturbation.pair and perturbation.law != NONE and rows <= most and not ratio)
    depth = common["GROUP"] if tile.deep else 32
    lane_count = tile.outputs if tile.in_order else lanes(tile)
    return Constants(
        BM=2 * tile.rows if pair and 2 * rows > tile.rows else tile.rows, BN=tile.outputs, LANES=lane_count,
        FOLD=lanes(tile) == tile.outputs == 128 and not tile.in_order, DEEP=tile.deep, DEPTH=depth,
        NEXT=depth // 8 if vectors else depth, RATIO=ratio,
        FACTORS=2 * tile.outputs if pair and common["NOISE"] != NONE else lane_count,
        SPLITS=split_count(tile, k, weight.group)[0], PDL=options.pdl, MEMBERS=members, PAIR=pair,
        EACH=2 if pair else 1, MASK_K=k % TILE_K != 0, BIAS=weight.bias is not None, **common)


def lanes(tile):
    """Threads of a program that look after its outputs' scales (scales.py): two for an output where there are more."""
    return tile.outputs * (2 if 32 * tile.warps > tile.outputs else 1)


def together(one, other):
    """Whether one launch may multiply both weights: they differ in their outputs, and in their values."""
    def form(weight):
        bias = None if weight.bias is None else weight.bias.dtype
        return (weight.codes.dtype, weight.in_features, weight.group, weight.bits, weight.table, weight.zero_type,
                bias, is_wide(weight), weight.shards, weight.scales.device)
    return form(one) == form(other) and one.codebooks is None is other.codebooks


def split_count(tile, k, group):
    """(programs that share K, steps of 128 k each of them makes): whole quads of groups to each."""
    count = -(-k // TILE_K)
    period = 1 if group == k else max(1, 4 * group // TILE_K)
    per_split = -(-count // tile.splits)
    per_split = -(-per_split // period) * period
    return -(-count // per_split), per_split


def scratch_bytes(m, weight, tile):
    """Bytes that a launch holds for a while beside x [m, K] and y [m, N]."""
    splits = split_count(tile, weight.in_features, weight.group)[0]
    sums = 4 * weight.groups * m if weight.zero_type == torch.float32 else 0
    return sums + (4 * splits * m * weight.out_features if splits > 1 else 0)


def overlaps(arch):
    """Whether launches may begin before the one ahead of them has ended (Hopper's programmatic dependent launch)."""
    return gdc_wait is not None and arch.startswith("sm_") and int(arch[3:]) >= 90


FRESH = ("x_ptr", "seeds_ptr", "coefs_ptr", "partials_ptr", "sums_ptr", "y_ptr", "y1_ptr", "y2_ptr")


class Plan:
    """How `weight` is multiplied with m rows of `dtype` under perturbations of one form.

    others : weights that the same launch multiplies with the same rows, each into a y of its own (`together`); up to
        MOST_MEMBERS in all
    perturbation : any of that form

    Two launches of one plan that run at the same time, on two streams, are not allowed: they share counters.
    """

    def __init__(self, weight, perturbation, m, dtype, options, others=()):
        members, tile, k, law = (weight, *others), options.tile, weight.in_features, perturbation.law
        rows = m if law == NONE else m // len(perturbation)     # without noise all rows are one block
        entries, lookup = weight.form.lookup(_qmm_kernel, dtype, options.exact, weight.scales)
        if dtype == torch.float32:
            options = dataclasses.replace(options, asm=False)
        self.constants = made = constants(weight, perturbation, rows, options, lookup, len(members))
        splits, per_split = split_count(tile, k, weight.group)
        each = rows * made.EACH
        outputs = sum(member.out_features for member in members)
        self.grid = (sum(triton.cdiv(member.out_features, tile.outputs) for member in members),
                     m // each * triton.cdiv(each, made.BM), splits)
        self.parts = (splits, m, outputs) if splits > 1 else None
        self.sums = (weight.groups, m) if weight.zero_type == torch.float32 else None
        self.nothing = weight.scales                            # stands for a tensor that is not there
        self.absent = (self.nothing,) * (MOST_MEMBERS - len(members))       # in place of a member's y
        self.arguments = dict(
            entries_ptr=entries, counters_ptr=self._counters() if splits > 1 else self.nothing, R=rows, M=m, K=k,
            G=weight.groups, stride_x=k, tiles=triton.cdiv(k, TILE_K), tiles_per_split=per_split, C=made)
        for number in range(MOST_MEMBERS):
            self.arguments |= self._of_member(members[number] if number < len(members) else None, number)
        limit = {"maxnreg": tile.registers} if tile.registers else {}       # an option that AMD's compiler lacks
        self.options = dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False, **limit)
        if options.pdl:
            self.options["launch_pdl"] = True
        self.compiled = None

    def _counters(self):
        """int32, a number of each tile: how many of its splits are done (qmm._finish)."""
        device = self.nothing.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a matmul meets these rows for the first time inside a CUDA graph's capture: run it "
                               "once before")
        return torch.zeros(math.prod(self.grid[:2]), dtype=torch.int32, device=device)

    def _of_member(self, weight, number):
        """The kernel's arguments of one weight, or of none in its place."""
        mine, base4 = (number, f"base4_{number}") if number else ("", "base4")
        tensors = {name: None if weight is None else getattr(weight, name)
                   for name in ("codes", "scales", "zeros", "bias")}
        found = {f"{name}{mine}_ptr": self.nothing if t is None else t for name, t in tensors.items()}
        return found | {base4: 0 if weight is None else weight.base4, f"N{mine}": weight.out_features if weight else 0}

    def __call__(self, x, seeds, coefs, y, *more):
        """Fill y [m, N] from contiguous x [m, K] on 16 bytes; more: the y of each of the others."""
        parts = sums = self.nothing
        if self.parts:
            parts = self.scratch(self.parts)
        if self.sums:
            sums = self.scratch(self.sums)
            self._sum_groups(x, sums)
        fresh = (x, seeds, coefs, parts, sums, y, *more, *self.absent)
        if self.compiled is not None:
            self.compiled(*[tensor.data_ptr() for tensor in fresh], *self.packed)
            return
        compiled = _qmm_kernel[self.grid](**dict(zip(FRESH, fresh, strict=True)), **self.arguments, **self.options)
        if compiled is not None:                # None: the interpreter, or a launch that is only recorded
            self.packed = [self.arguments[name] for name in _qmm_kernel.arg_names[len(FRESH):]]
            self.packed = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self.packed]
            self.compiled = compiled[self.grid]

    def scratch(self, shape):
        return torch.empty(shape, dtype=torch.float32, device=self.nothing.device)

    def _sum_groups(self, x, sums):
        (groups, m), k = sums.shape, x.shape[-1]
        group = k // groups
        _group_sums_kernel[(triton.cdiv(m, 32), groups)](
            x, sums, m, k, group, k, BM=32, BK=min(128, triton.next_power_of_2(group)), enable_fp_fusion=False)


def launch(x, weight, perturbation, y, *more, others=(), **options):
    """Run the kernels once on checked arguments; y [E*R, N] is filled, and more are. x is contiguous, E*R > 0.

    others: as Plan takes them; options: as Options does.
    """
    Plan(weight, perturbation, len(x), x.dtype, Options(**options), others)(
        x, perturbation.seeds, perturbation.coefs, y, *more)
