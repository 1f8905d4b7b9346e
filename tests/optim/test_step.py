"""The arithmetic of a step: losses to coefficients by the formula in double precision, and records to scales."""

import itertools
import math

import pytest
import torch

import qzo
from qzo.kernels.noise import LAWS
from qzo.nn.arena import ScaleArena
from qzo.optim import step
from qzo.optim.journal import Record
from qzo.optim.step import apply_steps, project, update
from tests import oracle
from tests.support.close import assert_same_bits

RECIPE = {"noise": "rademacher", "relative": True, "sharing": "group", "floor": 2.0**-24}


def arena(seed=0):
    """Two layers, one of them with a quad that is part full."""
    made = ScaleArena.of_shapes({"a": (5, 3), "b": (4, 6)}, "cpu")
    random = torch.Generator().manual_seed(seed)
    for name, slot in made.slots.items():
        made.write(name, torch.rand(slot.groups, slot.outputs, generator=random) - 0.5)
    return made


# ---------------------------------------------------------------------------------------------- losses to coefficients


@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("clip", [5.0, 0.3, math.inf])
def test_projection_is_the_formula_in_double_precision(law, clip):
    losses, lr, eps = [1.0, 0.75, 2.0, 2.125, 0.1, 0.7], 0.07, 1e-2
    derivatives, applied = project(torch.tensor(losses, dtype=torch.float64), (lr / 3, 2 * eps, clip), LAWS[law])
    want = [(losses[2 * j] - losses[2 * j + 1]) / (2 * eps) for j in range(3)]
    assert derivatives.tolist() == want
    assert applied.tolist() == [oracle.raw_coef(law, -(lr / 3) * min(max(d, -clip), clip)) for d in want]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e39])
def test_a_loss_that_float32_cannot_hold_is_applied_as_nan_and_moves_nothing(bad):
    losses = torch.tensor([1.0, 0.5, bad, 0.5], dtype=torch.float64)
    _, applied = project(losses, torch.tensor([0.1, 0.02, 5.0], dtype=torch.float64), LAWS["rademacher"])
    assert applied.isnan().all()
    for name, sharing in itertools.product(("torch", "triton"), ("group", "row")):
        moved = arena()
        with qzo.backend(name):
            update(moved, torch.tensor([1, 2]), applied, RECIPE | {"floor": 1.0, "sharing": sharing})
        assert_same_bits(moved.data, arena().data)


def test_the_losses_may_come_from_a_device_and_the_rates_as_a_tensor():
    """A captured step reads both; they say what plain numbers say."""
    losses, rates = torch.tensor([1.0, 0.5], dtype=torch.float64), (0.1, 0.02, 5.0)
    plain, tensors = project(losses, rates, 1), project(losses, torch.tensor(rates, dtype=torch.float64), 1)
    for a, b in zip(plain, tensors, strict=True):
        assert_same_bits(a, b)
    assert (plain[0].dtype, plain[1].dtype) == (torch.float64, torch.float32)


def test_a_coefficient_that_leaves_float32_is_applied_as_nan():
    derivatives, applied = project(torch.tensor([1e30, 0.0], dtype=torch.float64), (1e30, 0.02, math.inf), 1)
    assert derivatives.isfinite().all()
    assert applied.isnan().all()


# ---------------------------------------------------------------------------------------------- coefficients to scales


@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("relative", [True, False])
def test_an_update_is_the_oracles(law, relative):
    moved, seeds, coefs = arena(), [3, -5], [0.25, -0.125]
    before = moved.data.clone()
    update(moved, torch.tensor(seeds), torch.tensor(coefs), RECIPE | {"noise": law, "relative": relative})
    noises = [oracle.raw_at(law, seed % 2**64, torch.arange(len(before))) for seed in seeds]
    assert_same_bits(moved.data, oracle.update(before, noises, coefs, relative=relative, floor=2.0**-24))
    assert not torch.equal(moved.data, before)


def test_shared_noise_moves_the_scales_of_an_output_row_by_one_factor():
    moved = arena()
    before = {name: moved.read(name) for name in moved.slots}
    update(moved, torch.tensor([3]), torch.tensor([0.25]), RECIPE | {"sharing": "row"})
    for name, was in before.items():
        factor = 1 + 0.25 * qzo.noise("rademacher", 3, moved.index(name)[0])
        assert_same_bits(moved.read(name), was * factor)


def test_a_scale_keeps_its_sign_and_the_floor():
    moved = arena()
    before = moved.data.clone()
    update(moved, torch.tensor([3]), torch.tensor([1.0]), RECIPE | {"floor": 0.125})  # half of the factors are zero
    held = before != 0
    assert torch.equal(moved.data.sign(), before.sign())
    assert (moved.data[held].abs() >= 0.125).all()
    assert (moved.data[held].abs() == 0.125).any()


def test_records_are_applied_with_what_the_journal_holds_of_them():
    """In the order of the directions, as one step: of losses nothing is read."""
    records = [
        Record(7, j, seed, applied, math.nan, math.nan, False)
        for j, (seed, applied) in enumerate([(9, 0.25), (4, -0.5)])
    ]
    by_records, by_numbers = arena(), arena()
    apply_steps(by_records, [records], RECIPE)
    update(by_numbers, torch.tensor([9, 4]), torch.tensor([0.25, -0.5]), RECIPE)
    assert_same_bits(by_records.data, by_numbers.data)
    in_turn = arena()
    for record in records:
        apply_steps(in_turn, [[record]], RECIPE)
    assert not torch.equal(in_turn.data, by_records.data), "factors of a step are added up, and then multiplied"


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize(("sharing", "relative"), [("group", True), ("group", False), ("row", True)])
def test_many_steps_in_a_pass_have_the_bits_of_one_after_another(name, sharing, relative, monkeypatch):
    """Seven steps of two directions, one of them skipped, in passes of four and two."""
    passes = []
    monkeypatch.setattr(step, "AT_ONCE", 4)
    monkeypatch.setattr(step, "update", lambda *arguments: passes.append(arguments[1].shape) or update(*arguments))
    recipe = RECIPE | {"sharing": sharing, "relative": relative, "noise": "ih4"}
    steps = [[Record(t, j, 5 * t + j, 0.004 * (t - j), 1.0, 0.5, t == 2) for j in range(2)] for t in range(7)]
    at_once, in_turn = arena(), arena()
    with qzo.backend(name):
        apply_steps(at_once, iter(steps), recipe)
        assert passes == [(4, 2), (2, 2)]
        for t, records in enumerate(steps):
            before = in_turn.data.clone()
            apply_steps(in_turn, [records], recipe)
            assert torch.equal(before, in_turn.data) == (t == 2)
    assert_same_bits(at_once.data, in_turn.data)
