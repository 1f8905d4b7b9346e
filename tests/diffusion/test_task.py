"""Pictures as a run's task: the same rows for all evaluations, bits that a resumed run finds again."""

import json

import pytest
import torch

from qzo.diffusion import cache
from qzo.diffusion.metrics import STRATA
from qzo.diffusion.objective import FlowLaw, draw
from qzo.diffusion.pipeline import open_pipeline
from qzo.diffusion.task import DiffusionTask
from qzo.diffusion.transformer import load_transformer
from qzo.nn.evaluations import Evaluations
from qzo.nn.layers import arena_of, evaluating
from qzo.optim.journal import JournalError
from qzo.training.loop import Interrupted, fit
from qzo.training.settings import Settings
from qzo.training.validation import Validation
from tests.support import pipelines
from tests.support.journals import read_whole

CPU = torch.device("cpu")
LAW = FlowLaw(shift=3.0, draws=2, dropout=0.3)


@pytest.fixture(scope="module")
def latents(pipeline_dir, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    pipeline = open_pipeline(pipeline_dir)
    return cache.build(pipeline, pictures, folder, pipelines.RESOLUTION, pipelines.PROMPT_TOKENS, CPU, torch.float32)


@pytest.fixture
def make(pipeline_dir, latents):
    pipeline = open_pipeline(pipeline_dir)

    def made(law=LAW, directions=2):
        model, _ = load_transformer(pipeline, CPU, torch.float32, 32)
        return DiffusionTask(model, pipeline.family, latents["train"], law, 2 * directions)

    return made


def settings(**changes):
    return Settings(**{"max_steps": 6, "batch_size": 3, "directions": 2, "learning_rate": 1e-3, **changes})


def scales(task):
    return arena_of(task.model, exact=True).data.clone()


def test_all_evaluations_of_a_step_see_the_same_rows(make):
    task = make()
    batch = task.batch(task.indices(4, 3, seed=1), 4)
    for name, value in batch.items():
        assert len(value) == 4 * 3 * 2, name
        assert all(torch.equal(part, value[:6]) for part in value.split(6)), name
    rows = draw(LAW, 1, 4, 3, (4, 8, 8))
    assert torch.equal(batch["times"][:6], rows.times)
    x0 = torch.stack([task.examples.latent(i) for i in task.indices(4, 3, 1).pictures]).repeat_interleave(2, 0)
    assert torch.allclose(batch["target"][:6], rows.noise - x0)
    empty = task.examples.prompt(None)["encoder_hidden_states"]
    dropped = [torch.equal(row, empty) for row in batch["prompt.encoder_hidden_states"][:6]]
    assert dropped == rows.dropped.tolist()
    assert 0 < sum(dropped) < 6


def test_stacked_evaluations_are_those_one_after_another(make):
    """Paired = sequential to 1e-6, of the mean and of each row."""
    task = make()
    evaluations = Evaluations([5, 5, 9, 9], [1e-2, -1e-2, 1e-2, -1e-2])
    drawn = task.indices(0, 3, 0)
    with evaluating(task.model, evaluations):
        paired = task.compiled_losses(task.batch(drawn, 4), 4)
    rows = task.kept.clone()
    task.kept.zero_()
    batch, single = task.batch(drawn, 1), []
    for e in range(4):
        with evaluating(task.model, evaluations[e : e + 1]):
            single.append(task.compiled_losses(batch, 1))
    assert len(set(paired.tolist())) == 4
    assert torch.allclose(paired, torch.cat(single), rtol=1e-6, atol=1e-6)
    assert torch.allclose(rows, task.kept, rtol=1e-6, atol=1e-6)
    assert torch.allclose(rows.mean(1), paired, rtol=1e-6)
    of_pictures = ((rows[0::2] - rows[1::2]) / 2e-2).view(2, 3, 2).mean(2)
    assert torch.allclose(task.derivative_error(1e-2), of_pictures.std(1) / 3**0.5, rtol=1e-3)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(make, tmp_path, sequential, monkeypatch):
    chosen = settings(sequential=sequential)
    whole = make()
    fit(whole, chosen, tmp_path / "whole", show=False)
    first = make()
    steps: list[int] = []
    real = first.batch

    def stopping(*given):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(0)
        return real(*given)

    monkeypatch.setattr(first, "batch", stopping)
    with pytest.raises(Interrupted):
        fit(first, chosen, tmp_path / "part", show=False)
    second = make()
    assert fit(second, chosen, tmp_path / "part", resume=True, show=False) == 3
    assert torch.equal(scales(second), scales(whole))
    assert not torch.equal(scales(second), scales(make()))
    assert (tmp_path / "part/journal.qzo").read_bytes() == (tmp_path / "whole/journal.qzo").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "part/metrics.jsonl").read_text().splitlines()]
    assert [len(line["row_losses"]) for line in lines] == [4] * 6
    for line in lines:
        assert line["times"] == pytest.approx(draw(LAW, 0, line["step"], 3, (4, 8, 8)).times.tolist(), abs=1e-5)
        means = [sum(rows) / len(rows) for rows in line["row_losses"]]
        assert sum(means) / 4 == pytest.approx(line["loss"], rel=1e-4)


def test_another_law_is_another_run(make, tmp_path):
    fit(make(), settings(max_steps=2), tmp_path, show=False)
    assert len(read_whole(tmp_path / "journal.qzo")[1]) == 2
    with pytest.raises(JournalError, match="data"):
        fit(make(FlowLaw(shift=2.0, draws=2)), settings(max_steps=2), tmp_path, resume=True, show=False)


def test_held_out_losses_are_paired(make):
    """The same times and noise however many rows run at once, and whatever the run draws; one time in each interval."""
    task = make()
    each = task.measure(rows=64)
    assert each.shape == (8, STRATA)
    other = make(FlowLaw(shift=3.0, draws=1, stratified=False), directions=1)
    assert torch.allclose(other.measure(rows=8), each, rtol=1e-5)
    assert task.evaluate()["loss"] == pytest.approx(float(each.mean()), rel=1e-5)
    rows = draw(FlowLaw(shift=3.0, draws=STRATA), 0, 2, 1, ())
    assert len(set(rows.times.tolist())) == STRATA


def test_a_run_lowers_the_loss_of_its_pictures(make, tmp_path):
    """Beyond three standard errors of the paired difference, on the very pictures; validation is in the metrics."""
    task = make(FlowLaw(shift=3.0), directions=4)
    before = task.measure().mean(1)
    chosen = settings(max_steps=40, batch_size=8, directions=4, learning_rate=8e-2)
    fit(task, chosen, tmp_path, show=False, validation=Validation(task.evaluate, 20))
    difference = task.measure().mean(1) - before
    assert float(difference.mean()) < -3 * float(difference.std() / len(difference) ** 0.5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid" in line] == [19, 39]
