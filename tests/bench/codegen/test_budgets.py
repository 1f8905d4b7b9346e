"""Budgets of instructions: what is over one is named, what keeps it is not."""

import pytest

from qzo.bench.codegen import budgets


def steps_under(monkeypatch, steps, registers=168, read_ahead=120, fewer=0):
    """over_budget, with `steps` instructions for each (two accumulators or ratio, law), 150 for picked tiles; fewer:
    registers that several weights take less than one."""
    monkeypatch.setattr(budgets.launches, "matmul", lambda case: [case])

    def figures(case):
        several = (case.members,) if case.members > 1 else ()
        form = (case.rows, case.codes, *several) if case.tile is None else "ratio" if case.tile.ratio else "two"
        held = registers - fewer * (case.members > 1)
        return {"step": steps.get((form, case.law), 150), "registers": held, "read_ahead": read_ahead}

    return budgets.over_budget(figures)


KEPT = {
    ("two", "none"): 330,
    ("two", "rademacher"): 330,
    ("two", "ih4"): 330,
    ("ratio", "none"): 350,
    ("ratio", "rademacher"): 350,
    ("ratio", "ih4"): 350,
}


def test_a_table_too_dear(monkeypatch):
    assert steps_under(monkeypatch, KEPT | {((8, "nf4"), "rademacher"): 270}) == []
    over = steps_under(monkeypatch, KEPT | {((8, "nf4"), "rademacher"): 271})
    assert over == [
        f"{arch} 8 rows nf4: 271 instructions a step, 1.8 times the 150 of int4 at the most"
        for arch in ("sm_80", "sm_90")
    ]


def test_vectors_too_dear(monkeypatch):
    said = "sm_90 16 rows aqlm-2x8 one scale: {} instructions a step, 1.6 times the 150 of int4 at the most"
    for steps in (240, 241):
        over = steps_under(monkeypatch, KEPT | {((16, "aqlm-2x8"), "rademacher"): steps})
        assert (said.format(steps) in over) == (steps > 240)


def test_several_weights_in_a_launch_too_dear(monkeypatch):
    assert steps_under(monkeypatch, KEPT | {((128, "int4", 3), "rademacher"): 153}) == []
    over = steps_under(monkeypatch, KEPT | {((128, "int4", 3), "rademacher"): 154})
    assert over == ["sm_90 128 rows, 3 members: 154 instructions a step, 1.02 times the 150 of one at the most"]
    assert steps_under(monkeypatch, KEPT | {((128, "int4", 3), "rademacher"): 154}, fewer=1) == []


def test_budgets_that_are_kept(monkeypatch):
    assert steps_under(monkeypatch, KEPT) == []


def test_a_step_too_long(monkeypatch):
    over = steps_under(monkeypatch, KEPT | {("ratio", "none"): 351, ((128, "int4"), "rademacher"): 286})
    assert over == [
        "sm_90 ratio none: 351 instructions a step, at most 350 wanted",
        "sm_90 128 rows: 286 instructions a step, at most 285 wanted",
    ]


def test_too_many_registers_for_three_programs(monkeypatch):
    named = [f"sm_90 {rows}{members}" for rows in ("8 rows", "16 rows") for members in ("", ", 3 members")]
    over = steps_under(monkeypatch, KEPT, registers=169)
    assert sorted(over) == sorted(f"{name}: 169 registers a thread, at most 168 wanted" for name in named)


def test_a_scale_used_as_soon_as_it_is_read(monkeypatch):
    over = steps_under(monkeypatch, KEPT, read_ahead=119)
    assert "sm_80 16 rows: what is read is used 119 instructions later, at least 120 wanted" in over
    assert len(over) == sum(budget.ahead == 120 for budget in budgets.BUDGETS) > 30
    assert steps_under(monkeypatch, KEPT, read_ahead=None) == []


@pytest.mark.parametrize(
    ("form", "name", "arches"),
    [("two", "two accumulators", ("sm_90", "sm_80")), ("ratio", "ratio", ("sm_90",))],
)
def test_noise_too_dear(monkeypatch, form, name, arches):
    noisy = KEPT[form, "rademacher"]
    assert steps_under(monkeypatch, KEPT | {(form, "none"): noisy - 26}) == []
    over = steps_under(monkeypatch, KEPT | {(form, "none"): noisy - 27})
    assert over == [
        f"{arch} {name} rademacher: the noise adds 27 instructions a step, at most 26 wanted" for arch in arches
    ]
