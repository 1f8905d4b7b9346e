"""How many instructions a step of the main loop may take, how many registers, how soon it may use what it reads: what
keeps the kernels fast where there is no GPU."""

import dataclasses

from ...kernels import tiles
from . import launches
from .launches import Case


@dataclasses.dataclass(frozen=True)
class Budget:
    """Most instructions per step, bf16 but for the folded form; group 128, but 64 for NF4, and the whole row for
    vectors."""

    name: str
    case: Case
    most: int
    registers: int = 255  # most of a thread
    ahead: int = 0  # fewest instructions from a read of global memory to the use of its value (waits.py)


def _budget(name, arch, law, most, **form):
    """Of a 128 x 128 tile with 8 warps."""
    tile = tiles.Tile(128, 128, 8, 3, **form)
    return Budget(f"{name} {law}", Case(arch, n=16384, law=law, tile=tile), most)


# (arch, rows, outputs, warps) of a tile of int4 codes without zero points -> most bytes of stack, because it is the
# fastest measured all the same. On an H100, with the 208 bytes of Triton 3.6 in bfloat16, 187 and 684 microseconds at
# 512 and 2,048 rows, where the best without a spill take 193 and 756 (bench/results/h100-tiles-2026-11-27.jsonl);
# Triton 3.9 spilled 256; today it is 120 and 184, and 248 with one scale to a row.
MEASURED_SPILLS = {("sm_90", 128, 128, 4): 256}
# Bytes of stack that no instruction of the main loop touches: where K is split, the last program's sum of the parts,
# once a launch, may park a few addresses there (80 bytes at the most, of all that is compiled).
PARKED = 96
NOISE_ADDS = {
    "rademacher": 26,
    "ih4": 40,
}  # instructions, to a step
# instructions tell tiles of one shape apart, not one shape from another: on sm_90 128 x 128 in four warps takes a
# quarter more of them than 256 x 128 in eight, and nine tenths of its time
REGIMES = {  # rows per evaluation -> a step of the tile that runs them, a pair under Rademacher noise: seen + 5 %
    "sm_80": {8: 223, 16: 259, 32: 323, 64: 327, 512: 540},
    "sm_86": {8: 219, 16: 255, 32: 326, 64: 327, 512: 520},
    "sm_89": {8: 219, 16: 255, 32: 330, 64: 323, 512: 520},
    "sm_90": {8: 344, 16: 248, 32: 289, 64: 289, 128: 285, 256: 362, 512: 548},
    "sm_100": {8: 442, 16: 479, 32: 361, 64: 361, 512: 368},
    "sm_120": {8: 208, 16: 241, 32: 317, 64: 313, 512: 509},
}
# registers of a thread with which three programs are on a multiprocessor at once, as tiles._splits counts on
RESIDENT = {("sm_90", 8): 168, ("sm_90", 16): 168}
AHEAD = 120  # instructions of a warp that take longer than what it reads takes to arrive from the L2 cache
OTHER_CODES = {  # the same with other codes; on sm_100 multiply-adds are packed in two, and cost moves
    ("sm_80", "int2"): {16: 269, 64: 335, 512: 328},
    ("sm_80", "int8"): {16: 301, 64: 364, 512: 605},
    ("sm_86", "int2"): {16: 270, 64: 334, 512: 313},
    ("sm_86", "int8"): {16: 300, 64: 363, 512: 584},
    ("sm_89", "int2"): {16: 270, 64: 334, 512: 313},
    ("sm_89", "int8"): {16: 300, 64: 363, 512: 584},
    ("sm_90", "int2"): {16: 269, 64: 296, 128: 295, 512: 371},
    ("sm_90", "int8"): {16: 296, 64: 328, 128: 323, 512: 399},
    ("sm_100", "int2"): {16: 477, 64: 397, 512: 421},
    ("sm_100", "int8"): {16: 558, 64: 407, 512: 431},
    ("sm_120", "int2"): {16: 255, 64: 326, 512: 308},
    ("sm_120", "int8"): {16: 288, 64: 353, 512: 569},
    ("sm_80", "nf4"): {8: 430, 16: 474, 64: 556, 512: 567},
    ("sm_89", "nf4"): {8: 431, 16: 473, 64: 554, 512: 550},
    ("sm_90", "nf4"): {8: 456, 16: 477, 64: 510, 512: 600},
    ("sm_100", "nf4"): {8: 770, 16: 789, 64: 546, 512: 600},
    ("sm_120", "nf4"): {8: 422, 16: 476, 64: 546, 512: 547},
}
VECTORS = {  # AQLM, and int4 with one scale to a row, what it is held against
    ("sm_80", "int4"): {8: 170, 16: 203, 64: 253},
    ("sm_80", "aqlm-2x8"): {8: 173, 16: 213, 64: 268, 512: 273},
    ("sm_80", "aqlm-1x16"): {8: 154, 16: 186, 64: 298, 512: 300},
    ("sm_89", "aqlm-2x8"): {8: 173, 16: 213, 64: 268, 512: 273},
    ("sm_89", "aqlm-1x16"): {8: 154, 16: 186, 64: 298, 512: 300},
    ("sm_90", "int4"): {8: 331, 16: 225, 64: 237},
    ("sm_90", "aqlm-2x8"): {8: 392, 16: 300, 64: 336, 512: 406},
    ("sm_90", "aqlm-1x16"): {8: 294, 16: 260, 64: 365, 512: 358},
    ("sm_100", "aqlm-2x8"): {8: 381, 16: 400, 64: 300, 512: 298},
    ("sm_100", "aqlm-1x16"): {8: 319, 16: 339, 64: 258, 512: 258},
    ("sm_120", "aqlm-2x8"): {8: 190, 16: 227, 64: 277, 512: 277},
    ("sm_120", "aqlm-1x16"): {8: 155, 16: 189, 64: 306, 512: 306},
}
EXACT_TABLES = {  # NF4 in two passes
    "sm_80": {8: 638, 16: 720, 512: 628},
    "sm_90": {8: 663, 16: 701, 512: 789},
}
GROUP_64 = {  # int4 in groups of 64, what NF4 is held against
    "sm_80": {8: 286, 16: 321, 64: 399, 512: 407},
    "sm_90": {8: 412, 16: 317, 64: 353, 512: 727},
}
FOLDED = {  # (architecture, law, zero points) -> rows -> a step of the folded form in float16
    ("sm_80", "rademacher", "none"): {128: 342, 512: 455},
    ("sm_86", "rademacher", "none"): {512: 445},
    ("sm_89", "rademacher", "none"): {128: 331, 512: 445},
    ("sm_90", "none", "none"): {512: 331},
    ("sm_90", "rademacher", "none"): {128: 342, 256: 321, 512: 329},
    ("sm_90", "ih4", "none"): {512: 336},
    ("sm_90", "rademacher", "integer"): {128: 392, 512: 372},
    ("sm_100", "rademacher", "none"): {512: 369},
    ("sm_120", "rademacher", "none"): {128: 327, 512: 436},
}
MEMBERS = {  # rows for which q, k and v share a launch, whose step may take 1.02 times that of one layer's
    "sm_80": (8, 64),
    "sm_90": (8, 16, 64, 128),
    "sm_100": (8,),
    "sm_120": (64,),
}
MEMBERS_COST = 1.02  # where registers are no fewer: the compiler may save some, to have another program on the chip
TABLE_COSTS = 1.8  # times the instructions of an int4 step, at the most
VECTORS_COST = 1.6  # the same, of AQLM's against int4 with one scale to a row
BUDGETS = (
    *(_budget("sm_90 two accumulators", "sm_90", law, 330, deep=True) for law in ("none", *NOISE_ADDS)),
    *(_budget("sm_90 ratio", "sm_90", law, 350, deep=True, ratio=True) for law in ("none", *NOISE_ADDS)),
    *(_budget("sm_80 two accumulators", "sm_80", law, 470) for law in ("none", *NOISE_ADDS)),
    *(
        Budget(f"{arch} {rows} rows", Case(arch, rows), most, RESIDENT.get((arch, rows), 255), AHEAD)
        for arch, regimes in REGIMES.items()
        for rows, most in regimes.items()
    ),
    *(
        Budget(f"{arch} {rows} rows {codes}", Case(arch, rows, codes=codes, group=64 if codes == "nf4" else 128), most)
        for (arch, codes), regimes in OTHER_CODES.items()
        for rows, most in regimes.items()
    ),
    *(
        Budget(f"{arch} {rows} rows {codes} one scale", Case(arch, rows, codes=codes, group=launches.WHOLE_ROW), most)
        for (arch, codes), regimes in VECTORS.items()
        for rows, most in regimes.items()
    ),
    *(
        Budget(f"{arch} {rows} rows nf4 exact", Case(arch, rows, codes="nf4-exact", group=64), most)
        for arch, regimes in EXACT_TABLES.items()
        for rows, most in regimes.items()
    ),
    *(
        Budget(
            f"{arch} {rows} rows folded {law} {zeros}",
            Case(arch, rows, dtype=launches.torch.float16, law=law, zeros=zeros, folded=True),
            most,
        )
        for (arch, law, zeros), regimes in FOLDED.items()
        for rows, most in regimes.items()
    ),
    *(
        Budget(f"{arch} {rows} rows group 64", Case(arch, rows, group=64), most)
        for arch, regimes in GROUP_64.items()
        for rows, most in regimes.items()
    ),
    *(
        Budget(
            f"{arch} {rows} rows, 3 members",
            Case(arch, rows, members=3),
            REGIMES[arch][rows],
            RESIDENT.get((arch, rows), 255),
            AHEAD,
        )
        for arch, several in MEMBERS.items()
        for rows in several
    ),
)


def over_budget(figures_of):
    """Broken budgets as one-line texts; figures_of: function from a Launch to its figures."""
    bad = []
    figures = {budget: figures_of(launches.matmul(budget.case)[0]) for budget in BUDGETS}
    steps = {budget: found["step"] for budget, found in figures.items()}
    for budget, step in steps.items():
        if step > budget.most:
            bad.append(f"{budget.name}: {step} instructions a step, at most {budget.most} wanted")
        registers, ahead = figures[budget]["registers"], figures[budget]["read_ahead"]
        if registers > budget.registers:
            bad.append(f"{budget.name}: {registers} registers a thread, at most {budget.registers} wanted")
        if ahead is not None and ahead < budget.ahead:
            bad.append(
                f"{budget.name}: what is read is used {ahead} instructions later, at least {budget.ahead} wanted"
            )
        law, form = budget.case.law, dataclasses.replace(budget.case, law="none")
        added = step - (steps_of(steps, form) or step)
        if law in NOISE_ADDS and added > NOISE_ADDS[law]:
            bad.append(f"{budget.name}: the noise adds {added} instructions a step, at most {NOISE_ADDS[law]} wanted")
        one = dataclasses.replace(budget.case, members=1)
        single = steps_of(steps, one)
        fewer = any(b.case == one and registers < found["registers"] for b, found in figures.items())
        if budget.case.members > 1 and single and not fewer and step > MEMBERS_COST * single:
            most = f"{MEMBERS_COST} times the {single} of one at the most"
            bad.append(f"{budget.name}: {step} instructions a step, {most}")
        plain = steps_of(steps, dataclasses.replace(budget.case, codes="int4"))
        allowed = TABLE_COSTS if budget.case.codes == "nf4" else VECTORS_COST
        if budget.case.codes in ("nf4", "aqlm-1x16", "aqlm-2x8") and plain and step > allowed * plain:
            bad.append(f"{budget.name}: {step} instructions a step, {allowed} times the {plain} of int4 at the most")
    return bad


def steps_of(steps, case):
    """The step of a case among those of the budgets, or None."""
    return next((step for budget, step in steps.items() if budget.case == case), None)
