"""Steps that are evaluated before those ahead are taken: on which scales, resumed, and with a rank that is late."""

import math
import time

import pytest
import torch

import qzo
from qzo.nn.layers import arena_of
from qzo.optim.journal import JournalError
from qzo.optim.optimizer import QZO
from qzo.optim.replay import replay
from tests.support import ranks
from tests.support.close import assert_same_bits
from tests.support.journals import read_whole
from tests.support.small_layers import block

OPTIONS = {"lr": 0.1, "directions": 2, "check_every": 3}


def made(**options):
    """(module, optimizer, closure that makes the loss of each evaluation of a batch)."""
    module = block()
    torch.manual_seed(3)
    x, optimizer = torch.randn(8, 64), QZO(module, **{**OPTIONS, **options})

    def closure():
        count = len(optimizer.evaluations())
        return module(x.repeat(count, 1)).double().square().view(count, -1).mean(1)

    return module, optimizer, closure


def run(calls, **options):
    """The scales after so many calls of `step`, and `drain`."""
    module, optimizer, closure = made(**options)
    for _ in range(calls):
        optimizer.step(closure)
    optimizer.drain()
    optimizer.close()
    return arena_of(module).data


def test_a_step_is_evaluated_on_the_scales_of_so_many_steps_before(tmp_path):
    module, optimizer, closure = made(staleness=2, parallel=None, journal=tmp_path / "j")
    seen, told = [], []
    for _ in range(6):
        seen.append(arena_of(module).data.clone())
        told.append(optimizer.step(closure))
    assert [math.isnan(loss) for loss in told] == [True] * 2 + [False] * 4
    assert optimizer.param_groups[0]["step"] == 4
    optimizer.drain()
    optimizer.close()
    header, steps, _ = read_whole(tmp_path / "j")
    assert (header["recipe"], len(steps)) == ({"staleness": 2}, 6)
    for t, records in enumerate(steps):
        base, _, losses = made(parallel=None)
        replay(base, tmp_path / "j", max(0, t - 2))
        assert_same_bits(seen[t], arena_of(base).data)
        seeds = [record.seed for record in records for _ in range(2)]
        with qzo.evaluating(base, qzo.Evaluations(seeds, [0.01, -0.01] * 2)):
            want = losses()
        torch.testing.assert_close(
            torch.tensor([loss for record in records for loss in (record.loss_plus, record.loss_minus)]),
            want.float(),
            rtol=1e-6,
            atol=0,
        )
    assert not torch.equal(arena_of(module).data, run(6, parallel=None))


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_a_run_that_was_broken_off_goes_on_to_the_same_bits(calls, tmp_path):
    """Broken off before the first step is taken, at the first, and later: none of those that are evaluated is kept."""
    options = {"staleness": 2, "parallel": None}
    whole = run(7, journal=tmp_path / "whole", **options)
    _, optimizer, closure = made(journal=tmp_path / "j", **options)
    for _ in range(calls):
        optimizer.step(closure)
    optimizer.close()
    held = len(read_whole(tmp_path / "j")[1])
    assert held == max(0, calls - 2)
    assert_same_bits(run(7 - held, journal=tmp_path / "j", resume=True, **options), whole)
    assert (tmp_path / "j").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_journal_of_another_staleness(tmp_path):
    run(1, journal=tmp_path / "j", staleness=2, parallel=None)
    with pytest.raises(JournalError, match="its staleness is 2, this run's is null"):
        run(1, journal=tmp_path / "j", resume=True, parallel=None)


def while_one_is_late(folder):
    """Rank 1 makes its first evaluation when rank 0 is at its second."""
    module, optimizer, closure = made(staleness=1, parallel="directions")
    ahead, until = folder / "ahead", time.monotonic() + 60
    for call in range(5):
        if optimizer.ranks.rank == 0 and call == 1:
            ahead.touch()
        while optimizer.ranks.rank == 1 and not ahead.exists():
            assert time.monotonic() < until, "rank 0 waits for the first step of rank 1"
            time.sleep(0.02)
        optimizer.step(closure)
    optimizer.drain()
    optimizer.check_ranks()
    return arena_of(module).data.tolist()


def test_a_rank_may_be_late_and_the_bits_are_those_of_one_process(tmp_path):
    found = ranks.run(tmp_path, 2, while_one_is_late, tmp_path)
    alone = run(5, staleness=1, parallel=None)
    for scales in found:
        assert_same_bits(torch.tensor(scales), alone)
