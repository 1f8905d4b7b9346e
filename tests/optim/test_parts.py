"""Steps of ranks that each have a part of every layer: one arena on all, one journal, that of one process."""

import json

import pytest
import torch

import qzo
from qzo.nn.layers import arena_of
from qzo.optim.journal import read
from qzo.optim.shares import TENSOR
from tests.support import ranks
from tests.support.small_layers import block

PLAN = {"up": "colwise", "down": "rowwise"}
STEPS = 5
X = torch.randn(8, 64, generator=torch.Generator().manual_seed(6))


def steps_of(journal, parallel, plan=PLAN, resume=False, noise="ih4", steps=STEPS):
    """A run of a user's own loop -> (its scales, the losses of the last step, bytes sent)."""
    module = block()
    if parallel == TENSOR:
        qzo.shard_(module, plan)
    optimizer = qzo.QZO(
        module, 2.0, directions=2, noise=noise, journal=journal, resume=resume, parallel=parallel, check_every=2
    )
    while optimizer.param_groups[0]["step"] < steps:
        optimizer.step(lambda: module(X.repeat(4, 1)).double().square().view(4, -1).mean(1))
    optimizer.check_ranks()
    optimizer.close()
    assert optimizer.last is not None
    return arena_of(module).data.tolist(), optimizer.last.losses, optimizer.ranks.sent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process's run: (folder with its journal, its scales)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, torch.tensor(steps_of(folder / "journal.qzo", None)[0])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """That of two ranks: (folder with the journal, what they found)."""
    folder = tmp_path_factory.mktemp("parts")
    return folder, ranks.run(folder / "ranks", 2, steps_of, folder / "journal.qzo", TENSOR)


def test_all_ranks_hold_the_same_scales_near_those_of_one_process(whole, parts):
    """Only the sums over the inputs of `down` round otherwise, and the losses by that."""
    (first, losses, _), (second, others, _) = parts[1]
    assert (first, losses) == (second, others)
    start = arena_of(block()).data
    moved = (whole[1] - start).abs().max()
    assert moved > 0.01 * start.abs().max()
    assert (torch.tensor(first) - whole[1]).abs().max() < 1e-3 * moved


def test_parts_by_outputs_alone_have_the_bits_of_one_process(tmp_path):
    plan = {"up": "colwise_gather_output"}
    one = steps_of(tmp_path / "one.qzo", None)[:2]
    for found in ranks.run(tmp_path / "ranks", 2, steps_of, tmp_path / "two.qzo", TENSOR, plan):
        assert found[:2] == [*one]
    assert (tmp_path / "one.qzo").read_bytes() == (tmp_path / "two.qzo").read_bytes()


def test_the_journal_is_that_of_one_process(whole, parts):
    """Header and form; one process replays it to the ranks' bits, and goes on with it."""
    found, other = read(parts[0] / "journal.qzo"), read(whole[0] / "journal.qzo")
    assert found is not None
    assert other is not None
    mine, steps, _ = found
    assert mine == other[0]
    assert len(steps) == STEPS
    base = block()
    assert qzo.replay(base, parts[0] / "journal.qzo") == STEPS
    assert arena_of(base).data.tolist() == parts[1][0][0]


@pytest.mark.parametrize("then", ["one process", "two ranks"])
def test_a_run_goes_on_in_parts_or_whole(then, parts, tmp_path):
    journal = tmp_path / "journal.qzo"
    journal.write_bytes((parts[0] / "journal.qzo").read_bytes())
    if then == "one process":
        got = steps_of(journal, None, resume=True, steps=STEPS + 1)[0]
    else:
        cut = journal.read_bytes()[: -2 * 32 * 2]  # two directions a step: two steps are gone
        journal.write_bytes(cut)
        (got, _, _), (same, _, _) = ranks.run(
            tmp_path / "ranks", 2, lambda: steps_of(journal, TENSOR, resume=True, steps=STEPS)
        )
        assert got == same == parts[1][0][0]
        assert journal.read_bytes() == (parts[0] / "journal.qzo").read_bytes()
    found = read(journal)
    assert found is not None
    assert len(found[1]) == STEPS + (then == "one process")
    base = block()
    qzo.replay(base, journal)
    assert arena_of(base).data.tolist() == got


def refusals():
    """What is said of a model and a `parallel` that do not go together."""
    found = []
    module = block()
    for cut in (False, True):
        if cut:
            qzo.shard_(module, PLAN)
        for parallel in ("data", "directions", None, TENSOR):
            try:
                qzo.QZO(module, 0.1, parallel=parallel)
                found.append("")
            except ValueError as error:
                found.append(str(error))
    return found


def test_parts_and_a_division_of_steps_do_not_go_together(tmp_path):
    [first, second] = ranks.run(tmp_path, 2, refusals)
    assert first == second
    assert first[:3] == [""] * 3
    assert first[3].startswith("parallel='tensor': no layer is cut in parts")
    for given, told in zip(("'data'", "'directions'", "None"), first[4:7], strict=True):
        assert told.startswith(f"parallel={given}: the model's layers are cut in parts (qzo.shard_)")
    assert first[7] == ""


def test_noise_shared_by_rows_needs_whole_inputs(tmp_path):
    """A part by inputs would make the row's noise from its own first scale."""

    def refused():
        module = block()
        qzo.shard_(module, PLAN)
        with pytest.raises(ValueError) as error:
            qzo.QZO(module, 0.1, sharing="row", parallel=TENSOR)
        return str(error.value)

    for told in ranks.run(tmp_path, 2, refused):
        assert told.startswith("sharing='row' has one z for each output row")
        assert "down" in told


def test_alone_nothing_is_cut(tmp_path):
    """A process without others: shard_ leaves the model whole, and the run is the same."""
    one = steps_of(tmp_path / "one.qzo", None)
    assert json.dumps(steps_of(tmp_path / "two.qzo", TENSOR)) == json.dumps(one)
