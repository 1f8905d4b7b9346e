"""Which tile a matmul runs with: a pure function of the rows of ONE evaluation, the layer and the chip.

The number of evaluations never enters: a coef-0 row block must have the bits of a plain forward of the same rows, so
both have to run the same tile, the same split and the same order of additions.

Terms (tile): docs/glossary.md.
"""
import dataclasses

import torch

# multiprocessors (compute units on gfx942) of the part most users have of each architecture: fixed numbers, so that
# every card of an architecture splits K alike
PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
                "sm_120": 99 << 10, "gfx942": 64 << 10}
# On sm_90, rows x outputs and warps of a program of many rows -> (programs of it that a multiprocessor holds at once,
# microseconds that a round of those takes 4,096 inputs): bench/results/h100-tiles-2026-11-27.jsonl
ROUNDS = {(64, 64, 4): (3, 30), (128, 64, 4): (2, 33), (128, 128, 4): (2, 62), (128, 128, 8): (1, 40),
          (256, 128, 8): (1, 69)}
GROUPS = (32, 64, 128)      # group sizes the kernels take, beside the whole row
FOLDED_FROM = 128           # rows per evaluation from which the folded form has tiles worth its rounding
BLAS_FROM = 512             # rows per evaluation from which large_rows="blas", where asked for, is what runs
BLAS_WINS_FROM = 2048       # and from which it is faster: 0.86 of dense on an H100, 0.97 at 8192, below fused at 512
SHARED_UP_TO = 128          # rows per evaluation up to which layers with the same x share a launch: more fill a chip
OVERLAP_UP_TO = 64          # rows per evaluation up to which a launch is so short that its beginning counts


@dataclasses.dataclass(frozen=True)
class Tile:
    """rows x outputs of one program (a power of two each), and how it runs.

    ratio: one accumulator kept in units of the current scale, instead of a second one for each group's partial sum.
    deep: one dot per group (wgmma) instead of dots of 32 k (mma.sync, tcgen05, mfma).
    registers: most that a thread may hold; without it (0) ptxas may spill a few to fit another block on the chip.
    splits: programs that share the K dimension; their float32 partial sums are added in order inside the kernel.
    in_order: thread i looks after the scales of output i (scales.py): sm_100 keeps accumulators so, in tensor memory,
        and gfx942 has no warps of 32.
    """

    rows: int
    outputs: int
    warps: int
    stages: int
    ratio: bool = False
    deep: bool = False
    registers: int = 0
    splits: int = 1
    in_order: bool = False

    def check(self):
        """ValueError naming the first number that no kernel can have."""
        for name, least, most in (("rows", 16, 256), ("outputs", 16, 256), ("warps", 1, 16), ("splits", 1, 1 << 10)):
            value = getattr(self, name)
            if not least <= value <= most or value & (value - 1):
                raise ValueError(f"{self}: {name} must be a power of two from {least} to {most}")
        if not 1 <= self.stages <= 16:
            raise ValueError(f"{self}: stages must be from 1 to 16")


def architecture(device):
    """"sm_90", "gfx942", ... of a CUDA or ROCm device."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A matmul as far as a tile depends on it: rows of ONE evaluation by an [n, k] weight, on a chip.

    group : inputs that share a scale; k: the whole row
    dtype : of x
    arch : as `architecture` names it, or "interpreter"
    zeros : dtype of the zero points, None where all are the middle code; torch.uint8 and torch.float32 ones take
        registers
    bits : of a code
    lookup : "table", "exact" (a table in two passes), "vectors" or "long vectors" (more than two words of codes each)
        where codes stand for something else than their number
    """

    rows: int
    n: int
    k: int
    group: int
    dtype: torch.dtype
    arch: str
    zeros: torch.dtype | None = None
    bits: int = 4
    lookup: str | None = None

    @classmethod
    def of(cls, rows, weight, dtype, arch, exact=False):
        """That of an operands.Weight; exact: a table without rounding it to x's type."""
        return cls(rows, weight.out_features, weight.in_features, weight.group, dtype, arch, weight.zero_type,
                   weight.bits, weight.form.tiles(exact))


def pick(problem):
    """The tile for a Problem.

    Raises ValueError for a group size no kernel has. An architecture that is not listed runs as its nearest elder.
    """
    rows, group, k = problem.rows, problem.group, problem.k
    if group not in GROUPS and group != k:
        raise ValueError(f"group_size={group}: the kernels take groups of {GROUPS} or the whole row ({k} here)")
    if problem.arch == "interpreter":       # one program costs milliseconds whatever its size
        return Tile(rows=16 if rows <= 16 else 64, outputs=64, warps=4, stages=1)
    known = dataclasses.replace(problem, arch=_nearest(problem.arch))
    if problem.dtype == torch.float32:      # exact float32 products without tensor cores: correct, not fast
        return Tile(rows=16 if rows <= 16 else 32, outputs=32, warps=8, stages=2)
    # one scale to a row is applied after the loop, as one to 128 inputs without zero points
    tile = _table(known if group in GROUPS else dataclasses.replace(known, group=128, zeros=None))
    return dataclasses.replace(tile, splits=_splits(tile, known))


def _nearest(arch):
    if arch in PROCESSORS:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch.removeprefix("sm_"))
    elder = [a for a in PROCESSORS if a.startswith("sm_") and int(a[3:]) <= number]
    if not elder:
        raise ValueError(f"{arch} has no bf16 tensor cores; the kernels need sm_80 or newer, or backend('torch')")
    return max(elder, key=lambda a: int(a[3:]))


def _table(problem):
    """Measured tiles on sm_90, on other chips by occupancy; none spills a register in its main loop, but for those
    that bench/codegen/budgets.py names, whatever the flags."""
    arch, rows, group, bits, lookup = problem.arch, problem.rows, problem.group, problem.bits, problem.lookup
    # a second accumulator beside several groups a step, a table or eight codes a word spills in the large tiles
    looked_up = lookup is not None
    short = group < 128 or ((looked_up or bits == 2) and arch not in ("sm_90", "sm_100"))
    float_zeros = problem.zeros == torch.float32
    registers = 255 if group == 32 or bits != 4 or looked_up else 0
    if lookup == "exact":
        return _exact(arch, rows, group)
    if arch == "sm_90":
        return _hopper(problem)
    if arch == "sm_100":
        if rows <= 16 or lookup == "long vectors":      # every plane of theirs is kept in tensor memory
            return Tile(16, 128, 4, 4, registers=registers, in_order=True)
        # never 128 rows: Triton 3.6 compiles dots of 32 k on that tile to a bare trap, without an error
        return Tile(64, 64 if float_zeros else 128, 8, 4, registers=registers, in_order=True)
    if arch == "gfx942":
        if rows <= 16:
            return Tile(16, 64, 4, 2, in_order=True)
        small = rows <= 64 or float_zeros or looked_up
        return Tile(64, 64, 4, 2, in_order=True) if small else Tile(128, 128, 8, 2, in_order=True)
    if rows <= 16:
        return Tile(16, 64, 4, 4, registers=registers)
    if lookup in ("vectors", "long vectors"):       # four warps spill with 64 columns, even those of a pair of 32
        return Tile(32 if rows <= 32 or lookup != "vectors" else 64, 128, 8, 3, registers=registers)
    if rows <= 32:
        return Tile(32, 64, 4, 4, registers=registers)
    if rows <= 64 or float_zeros:
        ratio = group == 32 or (short and float_zeros)
        return Tile(64, 64, 4, 4 if arch == "sm_80" else 3, ratio=ratio, registers=registers)
    return Tile(64, 128, 8 if short else 4, 3 if arch == "sm_80" else 2, ratio=short, registers=registers)


def _hopper(problem):
    """Tiles of sm_90. Three stages: a fourth keeps a block of the chip's shared memory from another program, and cost
    1.44 times the time at 64 rows."""
    rows, group, zeros, bits, lookup = problem.rows, problem.group, problem.zeros, problem.bits, problem.lookup
    float_zeros = zeros == torch.float32
    if rows <= 8 and lookup != "table" and not float_zeros:     # they hold more registers
        return Tile(16, 128, 4, 3, deep=True)
    if rows <= 16:
        return Tile(16, 64, 4, 3, deep=True)
    if rows <= 32:
        return Tile(32, 64, 4, 3, deep=True)
    # the ratio form costs a tenth where there are registers without it
    small = Tile(64, 64, 4, 3, deep=True, ratio=group == 32 or (group == 64 and float_zeros))
    if rows <= 64:
        return small
    found = [small]
    vectors = lookup in ("vectors", "long vectors")
    if not vectors and (group == 128 or (group == 64 and not float_zeros)):
        found.append(Tile(128, 64, 4, 3, deep=True))
    elif not float_zeros:       # four warps would spill
        found.append(Tile(128, 128, 8, 3, deep=True, ratio=True))
    if bits == 4 and zeros is None and lookup is None:
        found.append(Tile(128, 128, 4, 3, deep=True, ratio=True))
    elif not float_zeros and (group < 128 or (zeros is None and bits == 2)):
        found.append(Tile(256, 128, 8, 3, deep=True, ratio=True))
    return min(found, key=lambda tile: _microseconds(tile, rows, problem.n))


def _microseconds(tile, rows, n):
    """Time of a pair of evaluations of many rows on sm_90, 4,096 inputs: its programs run in rounds that fill the chip,
    and the last one takes as long as the others."""
    resident, each = ROUNDS[tile.rows, tile.outputs, tile.warps]
    if tile.outputs == 64 and rows > 512:       # 835 microseconds at 2,048 rows, where 21 rounds of 33 are 693
        each *= 1.25
    programs = 2 * -(-rows // tile.rows) * -(-n // tile.outputs)
    return each * -(-programs // (resident * PROCESSORS["sm_90"]))


def _exact(arch, rows, group):
    """Tiles of tables in two passes, which take registers for both."""
    if arch == "sm_90":
        few, some, many = Tile(16, 64, 4, 5), Tile(32, 64, 4, 5), Tile(64, 128, 8, 3, ratio=True)
        tile = dataclasses.replace(few if rows <= 16 else some if rows <= 32 else many, deep=True)
    elif arch == "gfx942":
        # its table is loads, which stages would keep in LDS
        return Tile(16 if rows <= 16 else 64, 64, 4, 1, in_order=True)
    elif arch == "sm_100":
        tile = Tile(16, 64, 4, 4, in_order=True) if rows <= 16 else Tile(32, 128, 8, 4, in_order=True)
    else:
        tile = Tile(16 if rows <= 16 or group < 128 else 32, 64, 4, 4)
    return dataclasses.replace(tile, registers=255)


def most_paired(group):
    """Rows per evaluation up to which one tile serves a pair: above it, products limit the speed and not what is read.
    Groups of 32 take registers for two scales of four groups a step."""
    return 16 if group == 32 else 32


def _splits(tile, problem):
    """Largest power of two with which the programs of a pair of evaluations are all on the chip at once, and each has a
    quad of groups.

    Fewer programs leave the chip waiting for memory, more run in a second round that takes as long as the first: on an
    H100 344 programs on 132 multiprocessors are fastest at 1, 16 and 64 rows, with 4, 2 and 1 splits, and 688 take 1.13
    to 1.28 times as long (bench/results/h100-tiles-2026-11-27.jsonl; NF4's take the same time). How many a
    multiprocessor holds follows from the registers of the compiled code: at most 168 of four warps on sm_90 under the
    usual flags, 201 where both halves of a pair of 17 to 32 rows share a tile. On the other chips, where no tile was
    timed, the forms with most registers, or the shared memory, leave room for two.
    """
    rows, n, k, group, arch = problem.rows, problem.n, problem.k, problem.group, problem.arch
    if rows > 64:
        return 1
    together = rows <= most_paired(group)
    resident = 3 if arch == "sm_90" and (rows <= 16 or not together) else 2
    programs = -(-n // tile.outputs) * -(-rows // tile.rows) * (1 if together else 2)
    quads = -(-k // (4 * group)) if group != k else -(-k // 512)
    most = min(resident * PROCESSORS[arch] // programs, quads)
    return 1 << most.bit_length() - 1 if most else 1


def pick_folded(problem):
    """The tile of the folded form (folded.py) for a Problem.

    It never splits K, and nothing in its loop waits for the tensor cores: the larger the tile, the fewer instructions
    for a product. Raises ValueError for what the form cannot be had for.
    """
    rows, n, k, group, dtype = problem.rows, problem.n, problem.k, problem.group, problem.dtype
    zeros, lookup = problem.zeros, problem.lookup
    if (dtype not in (torch.float16, torch.bfloat16) or group not in GROUPS or group == k
            or zeros not in (None, torch.uint8) or lookup not in (None, "table")):
        raise ValueError(f"{dtype} activations, group_size={group} of {k}, zero points {zeros}, lookup {lookup}: the "
                         f"folded form takes float16 or bfloat16, groups of {GROUPS} below K, uint8 zero points or "
                         "none, and integers or a table rounded to 16 bits; use tiles.pick")
    if problem.arch == "interpreter":
        return Tile(rows=64, outputs=64, warps=4, stages=1)
    known = _nearest(problem.arch)
    if known == "sm_90":
        large = Tile(256, 128, 8, 3, deep=True)
        medium = Tile(128, 128, 8, 3, deep=True)
        if rows > 128 and zeros is None and problem.bits < 8 and not lookup and _fills(known, rows, n, large):
            return large        # zero points, bytes or a table spill in it
        return medium if _fills(known, rows, n, medium) else Tile(128, 64, 4, 3, deep=True)
    if known == "sm_100":
        return Tile(64, 128, 8, 4)      # as in _table: Triton 3.6 and 128 rows
    if known == "gfx942":
        return Tile(64, 64, 4, 2) if lookup else Tile(128, 128, 8, 2)
    tile = Tile(128, 128, 8, 3 if known == "sm_80" else 2)
    small = (lookup and group == 32) or not _fills(known, rows, n, tile)     # the former for registers
    return dataclasses.replace(tile, rows=64, registers=255) if small else tile


def _fills(arch, rows, n, tile):
    """Whether a pair of evaluations makes programs for three quarters of the chip."""
    return 8 * -(-rows // tile.rows) * -(-n // tile.outputs) >= 3 * PROCESSORS[arch]
