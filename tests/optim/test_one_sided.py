"""One-sided steps: a direction's loss against the mean of the others', in every way that a step can run."""

import functools
import math

import pytest
import torch

import qzo
from qzo.kernels.noise import LAWS, noise, step_seed
from qzo.nn.layers import arena_of
from qzo.optim.journal import JournalError
from qzo.optim.step import project
from tests import oracle
from tests.support import graphs, small_layers
from tests.support.close import assert_same_bits
from tests.support.journals import read_whole

J = 4
LAW = "rademacher"


def squares(model, batch):
    """The loss of each evaluation that a stacked batch holds."""
    return model(batch["x"]).float().square().view(J, -1).mean(1)


def run(journal=None, steps=3, model=None, resume=False, **options):
    model = small_layers.block() if model is None else model
    given = {"directions": J, "one_sided": True, "seed": 3, "cuda_graph": False, **options}
    optimizer = qzo.QZO(model, 0.05, journal=journal, resume=resume, **given)
    losses, chance = functools.partial(squares, model), torch.Generator().manual_seed(0)
    for step in range(steps):
        x = torch.randn(6, 64, generator=chance)
        if step < optimizer.param_groups[0]["step"]:
            continue
        if optimizer.paired:
            optimizer.step(losses, batch={"x": qzo.pair(x, J)})
        else:
            optimizer.step(lambda x=x: model(x).float().square().mean())
    optimizer.close()
    return optimizer, arena_of(model).data.clone()


def test_a_derivative_is_a_loss_less_the_mean_of_the_others_over_eps():
    losses, lr, eps, clip = [1.0, 0.75, 2.0, 2.125], 0.08, 1e-2, 90.0
    derivatives, applied = project(torch.tensor(losses, dtype=torch.float64), (lr / J, eps, clip), LAWS[LAW], True)
    want = [(loss - (sum(losses) - loss) / (J - 1)) / eps for loss in losses]
    assert derivatives.tolist() == pytest.approx(want, rel=1e-12)
    assert derivatives.abs().max() > clip
    wanted = [oracle.raw_coef(LAW, -(lr / J) * min(max(d, -clip), clip)) for d in want]
    assert applied.tolist() == pytest.approx(wanted, rel=1e-6)


def test_what_all_losses_share_moves_nothing():
    """The curve of the loss, for the most part: a pair's difference leaves it out, and so does the mean."""
    losses = torch.tensor([0.5, 0.75, 0.125, 0.25], dtype=torch.float64)
    here, higher = (project(losses + shared, (0.1, 1e-2, 5.0), LAWS[LAW], True)[0] for shared in (0.0, 8.0))
    assert higher.tolist() == pytest.approx(here.tolist(), rel=1e-12)


def test_the_estimate_is_the_gradient_in_the_mean():
    """Of a linear loss g . s, over many steps: the mean of d_j z_j is g; its variance is that of J - 1 comparisons."""
    size, steps = 8, 4000
    g, index = torch.linspace(-1, 1, size).double(), torch.arange(size)
    sums, squared = torch.zeros(size).double(), 0.0
    for step in range(steps):
        z = torch.stack([noise(LAW, step_seed(0, step, j), index) for j in range(J)]).double()
        d, _ = project((z @ g) * 1e-2 + 1.0, (0.1, 1e-2, math.inf), LAWS[LAW], True)
        estimate = (d[:, None] * z).mean(0)
        sums += estimate
        squared += float((estimate - g).square().sum())
    assert (sums / steps - g).abs().max() < 4 * (squared / steps / size / steps) ** 0.5
    assert squared / steps < 0.6 * (size - 1) * g.square().sum(), "less than two pairs, which as many evaluations make"


def test_a_step_evaluates_each_direction_once_and_writes_what_it_was_compared_with(tmp_path):
    optimizer, _ = run(tmp_path / "j", steps=1)
    evaluations = optimizer.evaluations()
    assert len(evaluations) == len(set(evaluations.seeds.tolist())) == J
    assert evaluations.coefs.tolist() == pytest.approx([1e-2] * J)
    header, [records], _ = read_whole(tmp_path / "j")
    losses = [record.loss_plus for record in records]
    assert header["recipe"] == {"one_sided": True}
    assert [r.loss_minus for r in records] == pytest.approx([(sum(losses) - x) / (J - 1) for x in losses], rel=1e-6)
    run(tmp_path / "pairs", steps=1, one_sided=False, directions=J // 2)
    assert read_whole(tmp_path / "pairs")[0]["recipe"] == {}, "a journal of pairs is what it was"


def test_stacked_in_turn_resumed_and_replayed_have_the_same_bits(tmp_path):
    _, whole = run(tmp_path / "whole")
    _, single = run(tmp_path / "single", paired=False)
    assert_same_bits(single, whole)
    assert (tmp_path / "single").read_bytes() == (tmp_path / "whole").read_bytes()
    run(tmp_path / "cut", steps=2)
    _, resumed = run(tmp_path / "cut", resume=True)
    assert_same_bits(resumed, whole)
    again = small_layers.block()
    assert qzo.replay(again, tmp_path / "whole") == 3
    assert_same_bits(arena_of(again).data, whole)


def test_a_captured_step_has_the_bits_of_a_plain_one(tmp_path, monkeypatch):
    _, plain = run(tmp_path / "plain", steps=5)
    graphs.stand_in(monkeypatch)
    optimizer, captured = run(tmp_path / "graph", steps=5, cuda_graph=None)
    assert len(optimizer.graphs.captured) == 1
    assert_same_bits(captured, plain)
    assert (tmp_path / "graph").read_bytes() == (tmp_path / "plain").read_bytes()


def test_a_loss_that_is_not_finite_skips_the_step(tmp_path):
    model = small_layers.block()
    before = arena_of(model).data.clone()
    optimizer = qzo.QZO(model, 0.05, directions=3, one_sided=True, journal=tmp_path / "j")
    with pytest.warns(UserWarning, match="NaN or infinite loss"):
        optimizer.step(lambda: torch.tensor([1.0, math.nan, 2.0]))
    optimizer.close()
    assert_same_bits(arena_of(model).data, before)
    assert all(record.skipped and record.applied == 0 for record in read_whole(tmp_path / "j")[1][0])


def test_one_direction_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="one_sided_directions=1: expected an int >= 2, whose losses are compared"):
        qzo.QZO(small_layers.block(), 0.05, one_sided=True)


@pytest.mark.parametrize("first", [True, False])
def test_a_journal_of_pairs_does_not_go_on_one_sided_nor_the_other_way(tmp_path, first):
    run(tmp_path / "j", steps=1, one_sided=first, directions=J if first else J // 2)
    with pytest.raises(JournalError, match="one_sided"):
        qzo.QZO(
            small_layers.block(), 0.05, directions=J if first else J // 2, seed=3,
            journal=tmp_path / "j", resume=True, one_sided=not first,
        )  # fmt: skip
