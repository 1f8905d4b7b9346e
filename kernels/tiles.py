"""Which tile a matmul runs with: a pure function of the rows of ONE evaluation, the layer and the chip.

The number of evaluations never enters: a coef-0 row block must have the bits of a plain forward of the same rows, so
both have to run the same tile, the same split and the same order of additions.
"""
import dataclasses

import torch

# multiprocessors (compute units on gfx942) of the part most users have of each architecture: fixed numbers, so that
# every card of an architecture splits K alike
PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
                "sm_120": 99 << 10, "gfx942": 64 << 10}
GROUPS = (32, 64, 128)      # group sizes the kernels take, beside the whole row
BLAS_FROM = 512             # rows per evaluation from which large_rows="blas", where asked for, is what runs
SHARED_UP_TO = 128          # rows per evaluation up to which layers with the same x share a launch: more fill a chip
OVERLAP_UP_TO = 128         # rows per evaluation up to which a launch is so short that its beginning counts


@dataclasses.dataclass(frozen=True)
class Tile:
    """rows x outputs of one program (a power of two each), and how it runs.

    ratio: one accumulator kept in units of the current scale, instead of a second one for each group's partial sum.
    deep: one dot per group (wgmma) instead of dots of 32 k (mma.sync, tcgen05, mfma).
    registers: most that a thread may hold; without it (0) ptxas may spill a few to fit another block on the chip.
    splits: programs that share the K dimension; their float32 partial sums are added in order by a second kernel.
    """

    rows: int
    outputs: int
    warps: int
    stages: int
    ratio: bool = False
    deep: bool = False
    registers: int = 0
    splits: int = 1

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


def pick(rows, n, k, group, dtype, arch, zeros=None, bits=4, lookup=None):
    """The tile for `rows` rows per evaluation, an [n, k] weight in groups of `group` (k: whole row), on `arch`.

    zeros: dtype of the zero points, None where all are the middle code; torch.uint8 and torch.float32 ones take
    registers. bits: of a code; lookup: "table", "exact" (a table in two passes), "vectors" or "long vectors" (more than
    two words of codes each) where codes stand for something else.
    Raises ValueError for a group size no kernel has. An architecture that is not listed runs as its nearest elder.
    """
    if group not in GROUPS and group != k:
        raise ValueError(f"group_size={group}: the kernels take groups of {GROUPS} or the whole row ({k} here)")
    if arch == "interpreter":       # one program costs milliseconds whatever its size
        return Tile(rows=16 if rows <= 16 else 64, outputs=64, warps=4, stages=1)
    known = _nearest(arch)
    if dtype == torch.float32:      # exact float32 products without tensor cores: correct, not fast
        return Tile(rows=16 if rows <= 16 else 32, outputs=32, warps=8, stages=2)
    tile = _table(known, rows, n, group if group in GROUPS else 128, zeros if group in GROUPS else None, bits, lookup)
    return dataclasses.replace(tile, splits=_splits(tile, rows, n, k, group, known))


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


def _fills(arch, rows, n, tile):
    """Whether a pair of evaluations makes programs for three quarters of the chip."""
    return 8 * -(-rows // tile.rows) * -(-n // tile.outputs) >= 3 * PROCESSORS[arch]


def _table(arch, rows, n, group, zeros, bits, lookup):
    """Tiles that compile without spilling a register, whatever the flags: bench/sass.py tells."""
    # a second accumulator beside several groups a step, a table or eight codes a word spills in the large tiles
    looked_up = lookup is not None
    short = group < 128 or ((looked_up or bits == 2) and arch not in ("sm_90", "sm_100"))
    float_zeros = zeros == torch.float32
    registers = 255 if group == 32 or bits != 4 or looked_up else 0
    if lookup == "exact":
        return _exact(arch, rows, group)
    if arch == "sm_90":
        if rows <= 16:
            return Tile(16, 128, 4, 6, deep=True)
        if rows <= 32:
            return Tile(32, 64, 4, 5, deep=True)
        if rows <= 64:
            return Tile(64, 64, 4, 4, deep=True, ratio=short)
        # a step's instructions per product fall with the rows: 262, 323, 427 for 64, 128, 256
        large = Tile(256, 128, 8, 3, deep=True, ratio=True)
        medium = Tile(128, 128, 8, 3, deep=True, ratio=True)
        roomy = (zeros is None or (short and not float_zeros)) and (short or not (looked_up or bits == 8))
        if rows > 256 and roomy and _fills(arch, rows, n, large):
            return large
        if rows > 128 and not float_zeros and _fills(arch, rows, n, medium):
            return medium
        return Tile(64, 128, 8, 3, deep=True, ratio=short)
    if arch == "sm_100":
        if rows <= 16 or lookup == "long vectors":      # every plane of theirs is kept in tensor memory
            return Tile(16, 128, 4, 4, registers=registers)
        # never 128 rows: Triton 3.6 compiles dots of 32 k on that tile to a bare trap, without an error
        return Tile(64, 64 if float_zeros else 128, 8, 4, registers=registers)
    if arch == "gfx942":
        if rows <= 16:
            return Tile(16, 64, 4, 2)
        return Tile(64, 64, 4, 2) if rows <= 64 or float_zeros or looked_up else Tile(128, 128, 8, 2)
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


def _exact(arch, rows, group):
    """Tiles of tables in two passes, which take registers for both."""
    if arch == "sm_90":
        few, some, many = Tile(16, 64, 4, 5), Tile(32, 64, 4, 5), Tile(64, 128, 8, 3, ratio=True)
        tile = dataclasses.replace(few if rows <= 16 else some if rows <= 32 else many, deep=True)
    elif arch == "gfx942":
        return Tile(16 if rows <= 16 else 64, 64, 4, 1)         # its table is loads, which stages would keep in LDS
    elif arch == "sm_100":
        tile = Tile(16, 64, 4, 4) if rows <= 16 else Tile(32, 128, 8, 4)
    else:
        tile = Tile(16 if rows <= 16 or group < 128 else 32, 64, 4, 4)
    return dataclasses.replace(tile, registers=255)


def _splits(tile, rows, n, k, group, arch):
    """Largest power of two that leaves at most two programs a multiprocessor and a quad of groups each."""
    if rows > 64:
        return 1
    columns = -(-n // tile.outputs) * -(-rows // tile.rows)
    quads = -(-k // (4 * group)) if group != k else -(-k // 512)
    splits = 1
    while 2 * splits * columns <= 2 * PROCESSORS[arch] and 2 * splits <= quads:
        splits *= 2
    return splits
