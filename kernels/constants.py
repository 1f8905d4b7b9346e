"""What the kernels of a matmul know at compile time: one record, made on the host, a kernel's argument C.

Triton tells compiled kernels apart by the record's printed fields. So whatever a kernel derives from a field (groups in
a tile, words of a row) is a field too, and its formula stands here, once; numbers that are to vary without another
compilation are none. The record is a tuple: of what Triton 3.4 to 3.9 take as one argument, it is what all of them
print, compare, and read fields of. To them a field is a plain number or text; where a kernel needs it as a shape, or
as the count of a loop that is unrolled, it names it once as a tl.constexpr.
"""
import typing

import torch
import triton.language as tl

from .codes import TILE_K, middle
from .noise import NONE
from .tiles import GROUPS

# the fields that choose, as kernels compare them
NO_ZEROS, INTEGER_ZEROS, FLOAT_ZEROS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ZEROS = {None: NO_ZEROS.value, torch.uint8: INTEGER_ZEROS.value, torch.float32: FLOAT_ZEROS.value}
WIDE_FROM = 1 << 32          # quad numbers from here on need the second counter word


class Constants(typing.NamedTuple):
    """Each kernel reads the fields that concern it; the others keep the values below."""

    # the tile
    BM: int = 0                 # rows of x
    BN: int = 0                 # outputs
    LANES: int = 0              # threads that look after the outputs' scales: BN or 2 BN (scales.py)
    FOLD: bool = False          # and in which order
    DEEP: bool = False          # one dot to a group, not one to 32 k
    DEPTH: int = 32             # k of one dot
    NEXT: int = 32              # inputs from one dot's first to the next one's
    RATIO: bool = False         # one accumulator in units of the current scale, no second one for a group's sum
    FACTORS: int = 0            # scales of a group: LANES, or 2 BN for the two evaluations of a pair
    SPLITS: int = 1             # programs that share K; several leave their parts in partials_ptr
    PDL: bool = False           # may begin before the launch ahead has ended (programmatic dependent launch)
    MEMBERS: int = 1            # weights that one x is multiplied by, up to three
    PAIR: bool = False          # evaluations 2e and 2e + 1 have one seed, and their rows alternate in the tile
    EACH: int = 1               # evaluations in a tile: 2 of a pair
    MASK_K: bool = False        # 128 does not divide K
    BIAS: bool = False
    ASM: bool = False           # unpack by inline PTX
    # the codes
    BITS: int = 4               # of a code
    MIDDLE: int = 8             # the code that stands for 0 where there are no zero points
    WORDS: int = 32             # of an output row in a tile
    FIRST_WORDS: int = 32       # of these, those that are read first
    BOOKS: int = 0              # codebooks that a code chooses from; 0: no vectors
    TEXTS: tuple = ("",)        # the text by which each pass over a tile looks codes up; "": a code is its own number
    PASSES: int = 1             # over a tile, whose products are added
    # scales and zero points
    GROUP: int = 128            # inputs that share a scale: 32, 64 or 128
    WHOLE_ROW: bool = False     # one scale to an output, applied after the loop; GROUP is 128 then
    PER_TILE: int = 1           # groups in a tile
    PERIOD: int = 4             # tiles in a quad of groups
    SHARDS: int = 1             # of so many alike, by outputs, the weight is one (Weight.shards)
    ZERO: int = NO_ZEROS.value
    # the perturbation
    LAW: int = NONE
    NOISE: int = NONE           # the law inside the loop: none where the noise leaves the sum
    RELATIVE: bool = True       # p = s * (1 + c * k), else s + c * k
    SHARED: bool = False        # one z to an output row, applied last
    WIDE: bool = False          # quad numbers reach 2^32
    KEPT: int = 0               # bits of a perturbed scale that the folded form keeps


def of_operands(weight, perturbation, lookup, asm):
    """The fields that a kernel's C has of its Weight and Perturbation, whatever it does with them, as a dict.

    lookup: the fields of the form's `lookup`; asm: whether inline PTX may unpack.
    """
    whole_row = weight.group not in GROUPS or weight.group == weight.in_features
    group = TILE_K if whole_row else weight.group
    per_tile, bits, law, shared = TILE_K // group, weight.bits, perturbation.law, bool(perturbation.shared)
    vectors = lookup["BOOKS"] > 0
    return dict(ASM=bool(asm), BITS=bits, MIDDLE=middle(bits),
                WORDS=16 * lookup["PASSES"] if vectors else 8 * bits, FIRST_WORDS=16 if vectors or bits == 2 else 32,
                GROUP=group, WHOLE_ROW=whole_row, PER_TILE=per_tile, PERIOD=4 // per_tile,
                SHARDS=weight.shards, ZERO=ZEROS[weight.zero_type], LAW=law, NOISE=NONE if shared or whole_row else law,
                RELATIVE=bool(perturbation.relative), SHARED=shared, WIDE=is_wide(weight), **lookup)


def is_wide(weight):
    """Whether quad numbers of the weight reach beyond 32 bits."""
    return weight.base4 + weight.scales.shape[0] * weight.next_quad > WIDE_FROM
