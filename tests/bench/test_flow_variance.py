"""Designs of a step's rows: what each draws, and figures that are those of known distributions."""

import json
import math

import pytest
import torch

from tests.support.paths import FIXTURES, ROOT

pytest.importorskip("diffusers", reason="diffusers is of the extra 'test'")
pytest.importorskip("sklearn", reason="scikit-learn is of the extra 'test'")

from examples.shared import flow
from qzo.bench import flow_variance
from qzo.bench.flow_variance import DESIGNS, FIGURES, Design, Importance
from qzo.nn.evaluations import Evaluations
from qzo.nn.layers import evaluating

RESULTS = ROOT / "bench/results/flow-variance-2026-12-01.jsonl"
DATA = flow.Prompted(torch.randn(40, 1, 2, 2), torch.randn(40, 3))
SMALL = ["--cases", "emoji", "--data", str(FIXTURES / "emoji"), "--rows", "16", "--batches", "3", "--directions", "2"]


def drawn(design, step=0):
    law = flow.FlowLaw(shift=2.0, draws=design.draws, stratified=design.stratified)
    return flow_variance.batch_of(design, law, DATA, 16, 5, step)


@pytest.mark.parametrize("name", DESIGNS)
def test_every_design_gives_as_many_rows(name):
    """Of different pictures, each as often as the design says, noise of its own; another batch has others."""
    design = DESIGNS[name]
    batch, other = drawn(design), drawn(design, step=1)
    assert [len(part) for part in (batch.shown, *batch.rows, batch.weights)] == [16] * 5
    assert torch.equal(batch.shown, batch.shown[:: design.of_picture].repeat_interleave(design.of_picture))
    assert len(batch.shown.unique()) == 16 // design.of_picture
    assert len(batch.rows.noise.flatten(1).unique(dim=0)) == 16
    assert not torch.equal(batch.shown, other.shown)
    assert not torch.equal(batch.rows.times, other.rows.times)


@pytest.mark.parametrize("opposite", ["same", "another"])
def test_opposite_noise_at_one_time(opposite):
    batch = drawn(Design(opposite=opposite))
    assert torch.equal(batch.rows.noise[0::2], -batch.rows.noise[1::2])
    assert torch.equal(batch.rows.times[0::2], batch.rows.times[1::2])
    assert torch.equal(batch.shown[0::2], batch.shown[1::2]) == (opposite == "same")


def test_importance_keeps_the_mean_of_everything():
    """More rows where the chance is greater, in the place of which they weigh less."""
    law = Importance(shift=3.0, chances=(0.4, 0.1, 0.2, 0.3))
    assert bool((law.times(torch.linspace(0, 1, 999, dtype=torch.float64)).diff() > 0).all())
    times = flow.draw(law, 0, 0, 20_000, ()).times
    weights = law.weights(times)
    for share in (0.1, 0.25, 0.6, 0.9):
        below = times < float(flow.FlowLaw(shift=3.0).times(torch.tensor(share, dtype=torch.float64)))
        assert float((weights * below).mean()) == pytest.approx(share, abs=1e-3)
    assert float((weights == weights.min()).float().mean()) == pytest.approx(0.4, abs=1e-3)


def normal_rows(batches=400, pictures=8, draws=2, mean=0.5, directions=2):
    """Rows of variance 1, a quarter of it common to those of a picture: [directions, batches, pictures * draws]."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(directions, batches, pictures, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(directions, batches, pictures, draws, generator=generator, dtype=torch.float64)
    return (mean + 0.5 * common + math.sqrt(0.75) * own).flatten(2)


def test_figures_of_rows_that_are_known():
    """1 + (K - 1) / 4 times the variance of independent rows; each figure within three of its own errors."""
    each = normal_rows()
    found = flow_variance.with_errors(each, torch.ones(each.shape[1:]), "mean", 2)
    wanted = {"variance": 1.25 / 16, "ratio": 1.25, "squared_mean": 0.25, "kept": 1, "foretold": 1}
    assert list(found) == list(wanted)
    for name, (figure, error) in found.items():
        assert abs(figure - wanted[name]) < 3 * error + 1e-9, name
        assert error < 0.1 * wanted[name]
    assert found["ratio"][1] == pytest.approx(1.25 * math.sqrt(2 / 399 / 2), rel=0.2)  # of chi-squared variances


def test_the_squared_mean_has_nothing_of_the_variance():
    each = normal_rows(batches=20, mean=0, directions=400)
    found = dict(zip(FIGURES, flow_variance.figures(each, torch.ones(20, 16), each.mean(2), 2).tolist(), strict=True))
    assert abs(found["squared_mean"]) < 0.3 * found["variance"] / 20


def test_rows_that_share_a_picture_foretell_too_small_an_error_one_by_one():
    each = normal_rows()
    found = flow_variance.with_errors(each, torch.ones(each.shape[1:]), "mean", 1)
    assert found["foretold"][0] == pytest.approx(1 / 1.25, abs=3 * found["foretold"][1])


def test_weighted_rows_are_held_against_those_without():
    """Times of which half have all of the derivative: drawn at 3 of 4, they have 2/3 of the independent variance."""
    generator = torch.Generator().manual_seed(1)
    often = torch.rand(400, 16, generator=generator) < 0.75
    weights = torch.where(often, 2 / 3, 2.0).double()
    each = often * torch.randn(2, 400, 16, generator=generator, dtype=torch.float64) * weights
    figure, error = flow_variance.with_errors(each, weights, "mean", 1)["ratio"]
    assert figure == pytest.approx(2 / 3, abs=3 * error)


def test_robust_means_leave_an_outlier_out():
    rows = torch.tensor([[*range(-7, 8), 1000.0]], dtype=torch.float64)
    assert flow_variance.trimmed(rows).tolist() == [0.5]  # without -7, -6, 7 and 1000
    assert 0 < float(flow_variance.huber(rows)) < 1.2
    symmetric = torch.tensor([[*range(-7, 8)]], dtype=torch.float64)
    assert flow_variance.huber(symmetric).tolist() == pytest.approx([0.0])
    heavy = torch.cat([normal_rows(), 3 + 30 * normal_rows(batches=400, pictures=1, draws=1)], 2)
    plain, robust = (flow_variance.with_errors(heavy, torch.ones(400, 17), m, 1) for m in ("mean", "Huber's mean"))
    assert robust["variance"][0] < 0.2 * plain["variance"][0]
    assert robust["kept"][0] < 0.8


def test_the_derivative_of_each_row(monkeypatch):
    """However many stand beside it; of nines and as many other digits."""
    case = flow_variance.digits_case()
    nines = (case.data.prompts == flow_variance.digits.prompts()[flow_variance.digits.UNSEEN]).all(1)
    assert int(nines.sum()) * 2 == len(nines)
    batch = flow_variance.batch_of(Design(), flow.LAW, case.data, 8, 0, 0)
    shown, signs = flow.Prompted(*(part[batch.shown] for part in case.data)), []
    for coef in (1e-2, -1e-2):
        with torch.no_grad(), evaluating(case.model, Evaluations([4], [coef])):
            signs.append(flow.losses(case.model, shown, batch.rows))
    monkeypatch.setattr(flow_variance, "AT_ONCE", 3)
    found = flow_variance.derivatives(case, batch.shown, batch.rows, [3, 4])
    torch.testing.assert_close(found[1], (signs[0] - signs[1]).double() / 2e-2, atol=1e-4, rtol=0)
    assert float(found.abs().mean()) > 0.01


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_measurement_that_was_stopped_goes_on(tmp_path, capsys):
    """It ends in what an unbroken one has, and measures nothing twice."""
    out = tmp_path / "r.jsonl"
    flow_variance.main([*SMALL, "--out", str(out)])
    whole = lines_of(out)
    assert [row["design"] for row in whole] == list(DESIGNS)
    capsys.readouterr()
    out.write_text("".join(json.dumps(row) + "\n" for row in whole[:-1]))
    flow_variance.main([*SMALL, "--out", str(out)])
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert without_time(lines_of(out)) == without_time(whole)


@pytest.mark.parametrize(("arguments", "told"), [(["--rows", "12"], "--rows 12"), (["--batches", "1"], "--batches 1")])
def test_sizes_that_cannot_be_are_refused(arguments, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        flow_variance.main([*SMALL, *arguments])
    assert told in capsys.readouterr().err


def test_the_emoji_need_a_folder():
    with pytest.raises(SystemExit, match="2"):
        flow_variance.main([])


def committed(mean="mean"):
    """{(case, design): figures} of the results file."""
    return {(row["case"], row["design"]): row["means"][mean] for row in lines_of(RESULTS)}


def test_the_committed_file_has_every_design_and_one_derivative():
    """Its squared mean is that of independent rows, within four errors."""
    found = committed()
    assert list(found) == [(case, design) for case in flow_variance.CASES for design in DESIGNS]
    for (case, design), figures in found.items():
        (one, error), (other, its_error) = figures["squared_mean"], found[case, "independent"]["squared_mean"]
        assert abs(one - other) < 4 * math.hypot(error, its_error), (case, design)
        assert 0.9 < figures["foretold"][0] < 1.2, (case, design)


def test_the_default_is_what_the_committed_file_has_least_variance_of():
    """Nothing is below it by more than the errors allow; what was taken out is far above it on one case."""
    found, law = committed(), flow.FlowLaw()
    assert (law.draws, law.stratified) == (DESIGNS["stratified"].draws, DESIGNS["stratified"].stratified)
    for (case, design), figures in found.items():
        (ratio, error), (ours, our_error) = figures["ratio"], found[case, "stratified"]["ratio"]
        assert ratio > ours - 2 * math.hypot(error, our_error), (case, design)
    assert found["emoji", "antithetic"]["ratio"][0] > 1.3
    assert min(found[case, "stratified, 8 draws of a picture"]["ratio"][0] for case in flow_variance.CASES) > 2.5


def test_robust_means_lose_some_of_the_mean():
    for mean in ("trimmed mean", "Huber's mean"):
        for case in flow_variance.CASES:
            kept, error = committed(mean)[case, "stratified"]["kept"]
            assert 0.8 < kept < 1 - 3 * error
