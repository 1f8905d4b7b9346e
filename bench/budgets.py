"""How many instructions a step of the main loop may take: what keeps the kernels fast where there is no GPU."""

import dataclasses

from ..kernels import tiles
from . import launches
from .launches import Case


@dataclasses.dataclass(frozen=True)
class Budget:
    """Most instructions per step, group 128, bf16."""

    name: str
    case: Case
    most: int


def _budget(name, arch, law, most, **form):
    """Of a 128 x 128 tile with 8 warps."""
    tile = tiles.Tile(128, 128, 8, 3, **form)
    return Budget(f"{name} {law}", Case(arch, n=16384, law=law, tile=tile), most)


NOISE_ADDS = {
    "rademacher": 25,
    "ih4": 40,
}  # instructions, to a step
REGIMES = {  # rows per evaluation -> a step of the tile that runs them, a pair under Rademacher noise: seen + 5 %
    "sm_80": {8: 236, 16: 270, 32: 349, 64: 336, 512: 547},
    "sm_86": {8: 236, 16: 269, 32: 343, 64: 337, 512: 524},
    "sm_89": {8: 236, 16: 269, 32: 343, 64: 337, 512: 524},
    "sm_90": {8: 363, 16: 396, 32: 307, 64: 297, 128: 275, 256: 339, 512: 448},
    "sm_100": {8: 442, 16: 456, 32: 361, 64: 361, 512: 368},
    "sm_120": {8: 218, 16: 252, 32: 326, 64: 319, 512: 512},
}
OTHER_BITS = {  # the same with 2- and 8-bit codes
    ("sm_80", 2): {16: 269, 64: 335, 512: 534},
    ("sm_80", 8): {16: 301, 64: 364, 512: 605},
    ("sm_86", 2): {16: 270, 64: 334, 512: 516},
    ("sm_86", 8): {16: 300, 64: 363, 512: 584},
    ("sm_89", 2): {16: 270, 64: 334, 512: 516},
    ("sm_89", 8): {16: 300, 64: 363, 512: 584},
    ("sm_90", 2): {16: 402, 64: 297, 128: 269, 512: 450},
    ("sm_90", 8): {16: 456, 64: 328, 128: 306, 512: 479},
    ("sm_100", 2): {16: 477, 64: 386, 512: 391},
    ("sm_100", 8): {16: 516, 64: 393, 512: 393},
    ("sm_120", 2): {16: 255, 64: 326, 512: 508},
    ("sm_120", 8): {16: 288, 64: 353, 512: 569},
}
BUDGETS = (
    *(_budget("sm_90 two accumulators", "sm_90", law, 330, deep=True) for law in ("none", *NOISE_ADDS)),
    *(_budget("sm_90 ratio", "sm_90", law, 350, deep=True, ratio=True) for law in ("none", *NOISE_ADDS)),
    *(_budget("sm_80 two accumulators", "sm_80", law, 470) for law in ("none", *NOISE_ADDS)),
    *(
        Budget(f"{arch} {rows} rows", Case(arch, rows), most)
        for arch, regimes in REGIMES.items()
        for rows, most in regimes.items()
    ),
    *(
        Budget(f"{arch} {rows} rows {bits} bits", Case(arch, rows, bits=bits), most)
        for (arch, bits), regimes in OTHER_BITS.items()
        for rows, most in regimes.items()
    ),
)


def over_budget(figures_of):
    """Broken budgets as one-line texts; figures_of: function from a Launch to its figures."""
    bad = []
    steps = {budget: figures_of(launches.matmul(budget.case)[0])["step"] for budget in BUDGETS}
    for budget, step in steps.items():
        if step > budget.most:
            bad.append(f"{budget.name}: {step} instructions a step, at most {budget.most} wanted")
        law, form = budget.case.law, dataclasses.replace(budget.case, law="none")
        added = step - next((s for b, s in steps.items() if b.case == form), step)
        if law in NOISE_ADDS and added > NOISE_ADDS[law]:
            bad.append(
                f"{budget.name}: the noise adds {added} instructions a step, at most {NOISE_ADDS[law]} wanted"
            )
    return bad
