"""What the launchers ask Triton to compile, recorded without a GPU.

The launchers run unchanged, on meta tensors, under a driver that has no device and a hook that keeps each
request instead of compiling it: types, specializations and constants are therefore those of a real launch.
`every`, `plain` and `pairwise` list matmuls of the benchmark; most of them share a compiled kernel.
"""

import contextlib
import dataclasses
import itertools
import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ...kernels import codes, constants, dequantize, folded, noise, perturb, plan, qmm, tiles, update, vectors
from ...kernels.constants import WIDE_FROM, Constants
from ...kernels.operands import Perturbation, Weight
from ...reports.codes import CODES as TIMED_CODES
from ...reports.codes import Codes
from .. import cases

ARCHES = tuple(tiles.PROCESSORS)
FLAGS = ("DEEP", "RATIO", "PAIR", "SHARED", "RELATIVE", "WIDE", "PDL", "BIAS", "MASK_K")
KERNELS = {
    "qmm": qmm._qmm_kernel,
    "folded": folded._folded_kernel,
    "group_sums": qmm._group_sums_kernel,
    "dequantize": dequantize._dequantize_kernel,
    "update": update._update_kernel,
    "update_rows": update._update_rows_kernel,
    "perturb": perturb._perturb_kernel,
}

ROWS = tuple(sorted({*cases.ROWS, 32}))
WHOLE_ROW = -1
GROUPS = (*tiles.GROUPS, WHOLE_ROW)
ZEROS = {"none": None, "integer": torch.uint8, "float": torch.float32}
CODES = {  # those that are timed, and what else has code of its own
    **TIMED_CODES,
    "nf4-exact": TIMED_CODES["nf4"],
    "aqlm-5x8": Codes(8, "", group=-1, books=5),
}


def _weight(kind, n, k, group, dtype, zeros="none", bias=False, wide=False):
    """A Weight on the meta device, of a name of CODES; group -1: the whole row."""
    form = CODES[kind]
    group = k if group == WHOLE_ROW else group
    groups = k // group
    more = {}
    if form.books:
        words = _meta(*vectors.vector_shape(n, k, form.books, form.bits), dtype=torch.int16)
        more["codebooks"] = _meta(form.books, 1 << form.bits, vectors.LENGTH, dtype=dtype)
    else:
        words = _meta(*codes.plane_shape(n, k, form.bits), dtype=torch.int16)
    points = None if zeros == "none" else _meta(groups, n, dtype=ZEROS[zeros])
    return Weight(
        words,
        _meta(-(-groups // 4), n, 4),
        k,
        group,
        points,
        _meta(n, dtype=dtype) if bias else None,
        WIDE_FROM if wide else 0,
        form.bits,
        form.table,
        **more,
    )


def _perturbation(law, relative=True, shared=False, pair=False):
    """Two evaluations on the meta device."""
    return Perturbation(_meta(2, dtype=torch.int64), _meta(2), noise.LAWS[law], relative, shared, pair)


@dataclasses.dataclass(frozen=True)
class Case:
    """One matmul: `rows` of each evaluation, its layer, and every flag that reaches the compiler.

    tile: instead of the one that is picked; members: layers of this form that one launch is for.
    """

    arch: str
    rows: int = 512
    k: int = 4096
    n: int = 4096
    group: int = 128
    dtype: torch.dtype = torch.bfloat16
    law: str = "rademacher"
    zeros: str = "none"
    codes: str = "int4"
    relative: bool = True
    bias: bool = False
    wide: bool = False
    pair: bool = True
    shared: bool = False
    folded: bool = False
    tile: tiles.Tile | None = None
    members: int = 1


@dataclasses.dataclass(frozen=True)
class Launch:
    """One request to the compiler, as plain data: it crosses process borders and its equals compile once."""

    kernel: str  # a name of KERNELS
    arch: str
    signature: tuple  # (argument, type) each
    constants: tuple  # (argument number, value) each
    attributes: tuple  # (argument number, ((name, value), ..)) each: divisible by 16, ..
    warps: int
    stages: int
    registers: int | None  # most that a thread may hold; None: the compiler's choice

    def known(self):
        """What the kernel knows at compile time, by name: its record's fields, or its arguments."""
        found = {self.signature[i][0]: value for i, value in self.constants}
        return found.pop("C")._asdict() | found if "C" in found else found

    def constant(self, name):
        return self.known()[name]

    @property
    def looks_up(self):
        """Whether codes stand for entries of a table or of codebooks."""
        return any(self.known().get("TEXTS", ()))

    def __str__(self):
        held = self.known()
        if self.kernel == "dequantize":
            held = {k: v for k, v in held.items() if v != Constants._field_defaults[k]} | {"TEXTS": self.looks_up}
        if self.kernel not in ("qmm", "folded"):
            return f"{self.arch} {self.kernel} " + " ".join(f"{k}={v}" for k, v in held.items())
        law = next(name for name, number in noise.LAWS.items() if number == held["LAW"])
        group = "row" if held["WHOLE_ROW"] else held["GROUP"]
        members = held["MEMBERS"]
        flags = [f for f in FLAGS if held[f]] + [f"{members} members"] * (members > 1)
        zeros = [f"zero_{name}" for name, kind in ZEROS.items() if kind and constants.ZEROS[kind] == held["ZERO"]]
        types = dict(self.signature)
        bits = "" if held["BITS"] == 4 else f"b{held['BITS']} "
        if held["BOOKS"]:
            bits = f"{held['BOOKS']}x{held['BITS']} "
        elif self.looks_up:
            bits = "exact table " if held["PASSES"] > 1 else "table "
        return (
            f"{self.arch} {self.kernel} {held['BM']}x{held['BN']} w{self.warps} s{self.stages} {types['x_ptr'][1:]} "
            f"{bits}g{group} {law} {' '.join(flags + zeros).lower()}"
        )


class _NoDevice:
    """The part of a Triton driver that a launch needs to reach the compiler; one device an architecture."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return ARCHES.index(self.arch)

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return target(self.arch)


def target(arch):
    """Triton's name for an architecture."""
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


@contextlib.contextmanager
def recorded(arch):
    """Record every launch inside the block; yields the list they go to. Nothing is compiled or run."""
    if not all(hasattr(kernel, "device_caches") for kernel in KERNELS.values()):
        raise RuntimeError("the kernels were imported for Triton's interpreter: unset TRITON_INTERPRET to compile them")
    names = {kernel._fn_name: name for name, kernel in KERNELS.items()}
    launches = []

    def keep(*, fn, compile, **_):  # noqa: A002 (Triton gives them by name)
        launches.append(
            Launch(
                names[fn.jit_function._fn_name],
                arch,
                tuple(compile["signature"].items()),
                tuple((path[0], value) for path, value in compile["constants"].items()),
                tuple((path[0], tuple(map(tuple, pairs))) for path, pairs in compile["configs"][0].items() if pairs),
                compile["num_warps"],
                compile["num_stages"],
                json.loads(compile["specialization_data"])["options"].get("maxnreg"),
            )
        )
        return True  # tells Triton to compile nothing

    held = dict(vars(driver))
    driver.set_active(_NoDevice(arch))
    triton.knobs.runtime.jit_cache_hook = keep
    try:
        yield launches
    finally:
        vars(driver).update(held)
        triton.knobs.runtime.jit_cache_hook = None


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def matmul(case):
    """The launches of one matmul with two evaluations, as qzo.nn.ops makes them."""
    weight = _weight(case.codes, case.n, case.k, case.group, case.dtype, case.zeros, case.bias, case.wide)
    exact = case.codes.endswith("-exact")
    pick = tiles.pick_folded if case.folded else tiles.pick
    tile = case.tile or pick(tiles.Problem.of(case.rows, weight, case.dtype, case.arch, exact))
    operands = (
        _meta(2 * case.rows, case.k, dtype=case.dtype),
        weight,
        _perturbation(case.law, case.relative, case.shared, case.pair),
        _meta(2 * case.rows, case.n, dtype=case.dtype),
    )
    asm = case.arch.startswith("sm_")
    with recorded(case.arch) as launches:
        if case.folded:
            folded.launch(*operands, tile=tile, asm=asm)
        else:
            overlap = case.rows <= tiles.OVERLAP_UP_TO and plan.overlaps(case.arch)
            more = [operands[3]] * (case.members - 1)
            plan.launch(*operands, *more, others=[weight] * len(more), tile=tile, asm=asm, exact=exact, pdl=overlap)
    return launches


def chunk(case):
    """The launch that large_rows="blas" makes for one evaluation of a case's layer."""
    with recorded(case.arch) as launches:
        dequantize.launch(
            _weight(case.codes, case.n, case.k, case.group, case.dtype, case.zeros),
            _perturbation(case.law, case.relative),
            _meta(128, case.k, dtype=case.dtype),
            e=1,
            start=128,
            asm=case.arch.startswith("sm_"),
            exact=case.codes.endswith("-exact"),
        )
    return launches


def update_scales(case):
    """The launches of the kernels that perturb codebooks and update scales, those of rows of noise among them."""
    how = {"base4": WIDE_FROM if case.wide else 0, "law": noise.LAWS[case.law], "relative": case.relative}
    scales, seeds, coefs = _meta(1, 4096, 4), _meta(2, dtype=torch.int64), _meta(2)
    with recorded(case.arch) as launches:
        perturb.launch(scales[0], seeds[:1], coefs[:1], _meta(4096, 4, dtype=torch.float16), **how)
        update.launch(scales, seeds, coefs, floor=0.0, **how)
        rows = how | {"base4": 0, "relative": True}
        update.launch(scales, seeds, coefs, floor=0.0, layers=_meta(3, 3, dtype=torch.int64), **rows)
    return launches


def _stands(kind, group, zeros):
    """Whether there are such codes: tables and vectors have no zero points, vectors one scale to an output."""
    return not (CODES[kind].lookup and zeros != "none") and (group == WHOLE_ROW or not CODES[kind].books)


def _fits(case):
    if case.members > 1 and case.rows > tiles.SHARED_UP_TO:
        return False
    if case.shared and not (case.relative and case.law != "none"):
        return False
    if not _stands(case.codes, case.group, case.zeros) or (case.group != WHOLE_ROW and case.k % case.group):
        return False
    weight = case.folded and _weight(case.codes, case.n, case.k, case.group, case.dtype, case.zeros)
    return not case.folded or folded.supports(weight, case.dtype)


def shapes():
    """Every (in, out) of the models, once."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(cases.LAYERS.values())))


def every(arch):
    """Every matmul of the benchmark on `arch`: the product of shapes, rows and flags."""
    flags = itertools.product(
        shapes(), ROWS, GROUPS, (torch.bfloat16, torch.float16), noise.LAWS, ZEROS, (True, False), (False, True)
    )
    for (k, n), rows, group, dtype, law, zeros, relative, bias in flags:
        case = Case(arch, rows, k, n, group, dtype, law, zeros, relative=relative or law == "none", bias=bias)
        many = dataclasses.replace(case, folded=True)
        yield from filter(_fits, (case, many) if rows >= tiles.FOLDED_FROM else (case,))


def plain(arch):
    """Every shape and row count with the usual flags, and one float32 matmul: every tile, few flags."""
    for (k, n), rows in itertools.product(shapes(), ROWS):
        found = [Case(arch, rows, k, n)]
        if rows >= tiles.FOLDED_FROM:
            found += [Case(arch, rows, k, n, dtype=t, folded=True) for t in (torch.float16, torch.bfloat16)]
        yield from filter(_fits, found)
    yield Case(arch, 64, dtype=torch.float32)


BOTH = dict.fromkeys(("relative", "bias", "shared"), (False, True))
AXES = {
    "rows": (16, 32, 64, 128, 256, 512),
    "k": (4096, 576),
    "group": GROUPS,
    "dtype": (torch.bfloat16, torch.float16),
    "law": tuple(noise.LAWS),
    "zeros": tuple(ZEROS),
    "wide": (False, True),
    "pair": (True, False),
    "members": (1, plan.MOST_MEMBERS),
    **BOTH,
}
OTHER_CODES = {
    "rows": (16, 64, 512),
    "group": GROUPS,
    "zeros": tuple(ZEROS),
    "codes": ("int2", "int8", "nf4", "nf4-exact"),
    "members": (1, plan.MOST_MEMBERS),
}
VECTORS = {
    "codes": ("aqlm-1x16", "aqlm-2x8", "aqlm-5x8"),
    "rows": (16, 64, 512),
    "group": (WHOLE_ROW,),
    "k": (4096, 576),
    "dtype": (torch.bfloat16, torch.float16),
    "law": ("rademacher", "ih4", "none"),
    "pair": (True, False),
    **BOTH,
}
FOLDED = {
    "folded": (True,),
    "rows": (128, 512),
    "k": (4096, 576),
    "group": tiles.GROUPS,
    "dtype": (torch.float16, torch.bfloat16),
    "law": tuple(noise.LAWS),
    "zeros": ("none", "integer"),
    "codes": ("int4", "int2", "int8", "nf4"),
    "wide": (False, True),
    **BOTH,
}
MATMULS = (AXES, OTHER_CODES, VECTORS, FOLDED)
CHUNKS = {
    "group": GROUPS,
    "codes": tuple(CODES),
    "zeros": tuple(ZEROS),
    "dtype": (torch.bfloat16, torch.float16),
    "law": tuple(noise.LAWS),
    "relative": (True, False),
}
UPDATES = {"law": tuple(noise.VERSIONS), "relative": (True, False), "wide": (False, True)}


def product(arch, axes):
    """Every case of these axes that there is on `arch`."""
    cases = (Case(arch, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values()))
    return [case for case in cases if _fits(case)]


def pairwise(arch, axes):
    """Cases in which every two values of different axes that fit together meet."""
    return _cover(product(arch, axes), axes)


def spread(archs, axes, held=()):
    """Cases of pairwise over several chips: every two values meet on one of them, each of which has every value.

    held: cases that are compiled anyway; what meets there needs to meet in no other.
    """
    cases = pairwise(archs[0], axes) if archs else []
    return _cover([dataclasses.replace(case, arch=arch) for case in cases for arch in archs], ("arch", *axes), held)


def _cover(cases, axes, held=()):
    """Of cases always the first that holds most pairs not yet met, until every two values met that meet in any.

    Met are those of a held case that is one of these but for its number of outputs.
    """
    numbers = itertools.count()
    found = {axis: dict.fromkeys(getattr(case, axis) for case in cases) for axis in axes}
    flags = {axis: {value: 1 << next(numbers) for value in values} for axis, values in found.items()}
    bits: dict[int, int] = {}  # the flags of a pair -> its bit
    places = [[flags[axis][getattr(case, axis)] for axis in axes] for case in cases]
    pairs = [sum(bits.setdefault(a | b, 1 << len(bits)) for a, b in itertools.combinations(p, 2)) for p in places]
    missing, kept = (1 << len(bits)) - 1, []
    for case in held:
        if cases and dataclasses.replace(case, n=cases[0].n, **{a: getattr(cases[0], a) for a in axes}) == cases[0]:
            place = [flags[axis].get(getattr(case, axis), 0) for axis in axes]  # 0: not one of the values
            missing &= ~sum(bits.get(a | b, 0) for a, b in itertools.combinations(place, 2))
    while missing:
        best = max(range(len(cases)), key=lambda i: (pairs[i] & missing).bit_count())
        missing &= ~pairs[best]
        kept.append(cases[best])
    return kept


def distinct(launches):
    """Without repetitions, in order."""
    return list(dict.fromkeys(launches))


def few_splits(launches):
    """Of launches that differ in nothing but the number of parts of K, those with the fewest parts and the most."""
    alike: dict[str, list[Launch]] = {}
    for launch in sorted(launches, key=lambda launch: launch.constant("SPLITS")):
        alike.setdefault(str(launch), []).append(launch)
    return [launch for same in alike.values() for launch in distinct([same[0], same[-1]])]
