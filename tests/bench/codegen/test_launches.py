"""Which launches are compiled: every two flags meet, and of what differs in the parts of K alone there are two."""

import dataclasses
import itertools

import pytest

from qzo.bench.codegen import launches
from qzo.kernels.constants import Constants

CHIPS = ("sm_80", "sm_100", "gfx942")


def met(cases, axes):
    """Every two (axis, value) that meet in one of the cases."""
    held = [[(axis, getattr(case, axis)) for axis in axes] for case in cases]
    return {pair for values in held for pair in itertools.combinations(values, 2)}


@pytest.mark.parametrize(("axes", "few"), [("OTHER_CODES", 20), ("FOLDED", 20), ("VECTORS", 13), ("CHUNKS", 40)])
def test_every_two_values_meet(axes, few):
    """On one chip, and on one of several, of which each has every value."""
    axes = getattr(launches, axes)
    there = met(launches.product("sm_90", axes), axes)
    alone, several = launches.pairwise("sm_90", axes), launches.spread(CHIPS, axes)
    assert met(alone, axes) == met(several, axes) == there
    assert {case.arch for case in alone} == {"sm_90"}
    for axis in axes:
        every = {getattr(case, axis) for case in alone}
        assert {(case.arch, getattr(case, axis)) for case in several} == set(itertools.product(CHIPS, every))
    assert len(alone) <= few
    assert len(several) <= 1.5 * few


def test_what_meets_in_a_case_that_is_held_needs_no_other():
    """A held case is one of those that are covered, but for its outputs: one of another law counts for nothing."""
    axes = launches.OTHER_CODES
    every, every_axis = launches.spread(CHIPS, axes), ("arch", *axes)
    held = [dataclasses.replace(case, n=512) for case in every[::3]]
    kept = launches.spread(CHIPS, axes, held)
    assert len(kept) < len(every)
    assert met([*kept, *held], every_axis) == met(every, every_axis)
    assert len(launches.spread(CHIPS, axes, [dataclasses.replace(case, law="ih4") for case in held])) == len(every)


def test_no_chip_has_no_cases():
    assert launches.spread([], launches.OTHER_CODES, [launches.Case("sm_90")]) == []


def launch(splits, tile=128):
    held = ((1, Constants(BM=tile, BN=128, SPLITS=splits)),)
    signature = (("x_ptr", "*bf16"), ("C", "constexpr"))
    return launches.Launch("qmm", "sm_90", signature, held, (), warps=8, stages=3, registers=None)


def test_of_many_numbers_of_parts_the_fewest_and_the_most_are_kept():
    one = [launch(splits) for splits in (4, 1, 8, 3)]
    kept = launches.few_splits([*one, launch(2, tile=64), launch(2, tile=64)])
    assert sorted((k.constant("BM"), k.constant("SPLITS")) for k in kept) == [(64, 2), (128, 1), (128, 8)]
