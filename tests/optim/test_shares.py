"""How a step is divided among ranks, and that its losses are put together in one order."""

import itertools
import types
from typing import Any, cast

import pytest
import torch

from qzo.nn.layers import arena_of
from qzo.optim.optimizer import QZO
from qzo.optim.shares import Share, check_parallel
from qzo.system.ranks import Ranks
from tests.support import ranks
from tests.support.close import assert_same_bits
from tests.support.small_layers import block


def share(rank, count, evaluations, parallel, gathered=None):
    fake = types.SimpleNamespace(rank=rank, count=count, send=lambda values: lambda: gathered)
    return Share(cast(Ranks, fake), evaluations, parallel)


@pytest.mark.parametrize(
    ("count", "evaluations", "parallel", "examples"),
    [(1, 2, "data", 3), (3, 4, "data", 8), (3, 4, "directions", 5), (6, 4, "3x2", 7), (6, 6, "2x3", 2)],
)
def test_each_example_meets_each_evaluation_on_one_rank(count, evaluations, parallel, examples):
    met: list[tuple[int, int]] = []
    for rank in range(count):
        one = share(rank, count, evaluations, parallel)
        met += itertools.product(range(examples)[one.rows(examples)], range(evaluations)[one.mine])
    assert sorted(met) == [*itertools.product(range(examples), range(evaluations))]


def test_ranks_with_a_part_of_the_layers_run_everything_and_go_by_the_first():
    gathered = torch.tensor([[[3.0, 2.0]], [[5.0, 2.0]]], dtype=torch.float64)
    one = share(1, 2, 1, "tensor", gathered)  # of the second
    assert (one.rows(7), one.mine) == (slice(0, 7), slice(0, 1))
    assert one.combine(torch.ones(1)).tolist() == [1.5]


def test_parts_are_added_in_the_order_of_the_ranks():
    """1 + 1e16 - 1e16 is 0 in float64: another order of the ranks has other bits."""
    gathered = torch.tensor([[[1.0, 1.0]], [[1e16, 1.0]], [[-1e16, 1.0]]], dtype=torch.float64)
    assert share(0, 3, 1, "data", gathered).combine(torch.ones(1)).tolist() == [0.0]


def test_sums_and_counts_are_weighed_by_their_counts():
    """2 x 3 ranks: the part of rank r is r // 3, its evaluations those of group r % 3, of which the last has two."""
    gathered = torch.zeros(6, 2, 2, dtype=torch.float64)
    for rank in range(6):
        part, group = divmod(rank, 3)
        gathered[rank, 0] = torch.tensor([10.0 * group + part, 1 + part])
    gathered[2, 1], gathered[5, 1] = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0])
    got = share(4, 6, 4, "2x3", gathered).combine(torch.zeros(1, 2))
    sums = torch.tensor([1.0, 21.0, 41.0, 1.0], dtype=torch.float64)
    assert torch.equal(got, (sums / 3).float().double())


def test_a_loss_that_is_not_finite_on_one_rank_is_so_on_all():
    gathered = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[torch.nan, 1.0], [2.0, 1.0]]], dtype=torch.float64)
    assert [x == x for x in share(0, 2, 2, "data", gathered).combine(torch.ones(2)).tolist()] == [False, True]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ((4, 4, "2x3"), r"parallel='2x3' is for 6 ranks, there are 4"),
        ((1, 4, "2x2"), r"for 4 ranks, there are 1"),
        ((8, 4, "directions"), r"8 groups of evaluations, but a step has 4"),
        ((4, 4, "both"), r"parallel='both': expected data, directions, tensor, or .* such as 2x4"),
        ((4, 4, "0x4"), r"parallel='0x4': expected"),
    ],
)
def test_what_cannot_be_divided_is_refused(wrong, text):
    count, evaluations, parallel = wrong
    with pytest.raises(ValueError, match=text):
        share(0, count, evaluations, parallel)


def test_fewer_examples_than_parts_are_refused():
    with pytest.raises(ValueError, match="a batch of 2 examples cannot be divided over 3 ranks"):
        share(2, 3, 4, "data").rows(2)


def test_a_division_is_a_text():
    with pytest.raises(ValueError, match="parallel=4"):
        check_parallel(cast(Any, 4))


def steps_of(parallel, paired=True):
    """Six steps of a library's user, whose examples lie on the ranks as `rows` says; (scales, bytes sent a step)."""
    torch.manual_seed(3)
    x, module = torch.randn(8, 64), block()
    optimizer = QZO(module, 0.1, directions=2, parallel=parallel, paired=paired, check_every=0)
    mine = x[optimizer.share.rows(8)]

    def closure():
        count = len(optimizer.evaluations()) if paired else 1
        return module(mine.repeat(count, 1)).double().square().view(count, -1).mean(1)

    before = optimizer.ranks.sent
    for _ in range(6):
        optimizer.step(closure)
    return arena_of(module).data.tolist(), (optimizer.ranks.sent - before) / 6


@pytest.mark.parametrize(("parallel", "evaluations"), [("data", 4), ("directions", 1), ("2x2", 2)])
def test_a_step_sends_16_bytes_for_each_evaluation_of_a_rank(parallel, evaluations, tmp_path):
    found = ranks.run(tmp_path, 4, steps_of, parallel)
    assert [sent for _, sent in found] == [16 * evaluations] * 4
    assert all(scales == found[0][0] for scales, _ in found)
    whole, nothing = steps_of(None)
    assert nothing == 0
    if parallel == "directions":
        assert_same_bits(torch.tensor(found[0][0]), torch.tensor(whole))
    else:  # means of means in float64 round otherwise than the mean of all
        torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(whole), rtol=1e-4, atol=0)


def test_a_rank_that_asks_to_be_alone_is_no_part_of_the_group(tmp_path):
    alone, whole = ranks.run(tmp_path, 2, steps_of, None, False), steps_of(None)
    assert [sent for _, sent in alone] == [0, 0]
    assert alone[0][0] == alone[1][0] == whole[0]
