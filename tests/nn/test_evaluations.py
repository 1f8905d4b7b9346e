"""The record of evaluations: what it takes, what it refuses, what kernels are given of it."""

import pytest
import torch

from qzo import Evaluations
from qzo.kernels.noise import LAWS, NONE, kernel_coefs
from tests.support.close import assert_same_bits


def test_lists_and_tensors_say_the_same():
    by_lists = Evaluations([1, 2**64 - 1], [0.1, -0.1], "ih4")
    by_tensors = Evaluations(torch.tensor([1, -1]), torch.tensor([0.1, -0.1], dtype=torch.float64), "ih4")
    for evaluations in (by_lists, by_tensors):
        assert evaluations.seeds.tolist() == [1, -1], "seeds are taken modulo 2^64"
        assert_same_bits(evaluations.coefs, torch.tensor([0.1, -0.1]))
        assert (len(evaluations), evaluations.law) == (2, LAWS["ih4"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [0.1, 0.2]), "as many seeds as coefs"),
        (([], []), "at least one"),
        ((torch.tensor([1], dtype=torch.int32), [0.1]), r"got seeds torch.int32 \[1\] and coefs \[1\]"),
        ((torch.tensor([[1]]), [[0.1]]), r"got seeds torch.int64 \[1, 1\]"),
        (([1], [float("nan")]), "finite"),
        (([1], [0.1], "uniform"), "not a noise law"),
        (([1], [0.1], "ih4", True, "column"), "sharing='column'"),
        (([1], [0.1], "ih4", False, "row"), "sharing='row' scales a whole output row, so it is relative"),
    ],
)
def test_bad_evaluations(arguments, message):
    with pytest.raises(ValueError, match=message):
        Evaluations(*arguments)


def test_pairs_are_known_and_travel_with_the_evaluations():
    assert Evaluations([1, 1, 2**64 - 1, -1], [0.1] * 4).pairs
    assert not Evaluations([1, 1, 2], [0.1] * 3).pairs
    assert not Evaluations([1, 2, 2, 1], [0.1] * 4).pairs
    moved = Evaluations([1, 1], [0.1, -0.1], "ih4").to("meta")  # where nothing can be compared
    assert moved.pairs
    assert (moved.seeds.device.type, moved.coefs.device.type, moved.kernel_coefs.device.type) == ("meta",) * 3
    assert moved.perturbation.seeds.is_meta, "what was derived before the move is derived anew"


def test_a_move_to_where_they_are_is_none():
    evaluations = Evaluations([1], [0.1])
    assert evaluations.to("cpu") is evaluations
    derived = evaluations.perturbation, evaluations.unperturbed
    assert evaluations.to("meta").perturbation is not derived[0]
    assert (evaluations.perturbation, evaluations.unperturbed) == derived, "the old ones are left as they were"


def test_a_slice_is_these_evaluations_and_no_others():
    whole = Evaluations([1, 1, 2, 3], [0.1, -0.1, 0.2, 0.3], "ih4", False)
    assert not whole.pairs
    assert len(whole.perturbation) == len(whole.unperturbed) == 4
    part = whole[0:2]
    assert (part.seeds.tolist(), part.noise, part.relative, part.sharing) == ([1, 1], "ih4", False, "group")
    assert part.pairs, "that the whole holds single seeds says nothing of its part"
    assert len(part.perturbation) == len(part.unperturbed) == 2
    assert_same_bits(part.kernel_coefs, whole.kernel_coefs[:2])
    assert not whole[1:3].pairs


@pytest.mark.parametrize("sharing", ["group", "row"])
def test_what_kernels_take(sharing):
    evaluations = Evaluations([5, 5], [0.1, -0.1], "ih4", sharing=sharing)
    given = evaluations.perturbation
    assert (given.law, given.relative, given.shared, given.pair) == (LAWS["ih4"], True, sharing == "row", True)
    assert_same_bits(given.coefs, kernel_coefs(torch.tensor([0.1, -0.1]), LAWS["ih4"]))
    assert not torch.equal(given.coefs, evaluations.coefs), "kernels multiply raw noise, whose unit is another"
    plain = evaluations.unperturbed
    assert (plain.law, plain.shared, plain.pair, len(plain)) == (NONE, False, True, 2)
