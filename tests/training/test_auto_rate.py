"""A learning rate that is measured: by the formula, where it is, and once in a run."""

import copy
import math
from unittest import mock

import pytest
import torch

import qzo
from qzo.kernels.noise import step_seed
from qzo.training import auto_rate, loop
from qzo.training.settings import RATE, Settings
from tests.support import tiny
from tests.support.journals import read_whole

TEXTS = [{"text": "red green blue stone"}, {"text": "leaf sky fire water"}] * 4


@pytest.fixture
def loaded(tmp_path):
    base = tiny.save_checkpoint(tmp_path / "base")
    return qzo.from_pretrained(base, group_size=32, device="cpu"), qzo.load_tokenizer(base)


def task_of(loaded, records=tiny.RECORDS):
    return loop.build_task(loaded[0], records, loaded[1], Settings(), None)


def test_the_sensitivity_squared_is_twice_the_divergence_that_a_unit_of_noise_makes(loaded):
    task, settings, eps, divergences = task_of(loaded), Settings(batch_size=12, eps=1e-3), 0.03, []
    for step in range(auto_rate.DIRECTIONS):
        batch = task.batch(task.indices(step, 12, 0), 1)
        before, seed = task.scores_of(batch), step_seed(0, step, 0)
        with qzo.evaluating(task.model, qzo.Evaluations([seed], [eps])):
            moved = task.scores_of(batch) - before
        after = (before + moved - moved.mean(0)).log_softmax(1)
        each = torch.nn.functional.kl_div(after, before.log_softmax(1), log_target=True, reduction="batchmean")
        divergences.append(2 * float(each) / eps**2)
    wanted = math.sqrt(sum(divergences) / len(divergences))
    assert auto_rate.sensitivity(task, settings) == pytest.approx(wanted, rel=0.1)


def test_what_moves_all_rows_or_all_options_alike_counts_for_nothing():
    chance = torch.Generator().manual_seed(0)
    scores, moved = torch.randn(5, 3, generator=chance), torch.randn(5, 3, generator=chance)
    alike = torch.randn(1, 3, generator=chance) + torch.randn(5, 1, generator=chance)
    assert auto_rate.variance(scores, alike.expand(5, 3)) == pytest.approx(0, abs=1e-12)
    assert auto_rate.variance(scores, moved + alike) == pytest.approx(auto_rate.variance(scores, moved), rel=1e-5)
    one_of_two = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert auto_rate.variance(torch.zeros(2, 2), one_of_two) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("s", "directions", "examples", "rate"),
    [
        (1.0, 400, 16, 0.055),
        (0.5, 400, 16, 0.11),
        (1.0, 1600, 64, 0.028),
        (1.0, 4, 16, 0.081),  # a run as short as none that was measured
        (1.0, 400, 4, 0.014),
        (0.001, 400, 16, 1.0),
        (0.0, 400, 8, 0.5),
    ],
)
def test_the_rate_lets_the_scores_walk_as_far_whatever_the_task_and_the_length(
    monkeypatch, s, directions, examples, rate
):
    monkeypatch.setattr(auto_rate, "sensitivity", lambda task, settings: s)
    settings = Settings(max_steps=directions // 4, directions=4, batch_size=examples)
    assert auto_rate.measured_rate(mock.Mock(), settings) == pytest.approx(4 * rate)


@pytest.mark.parametrize(
    ("records", "options", "wanted"),
    [
        (tiny.RECORDS, {}, None),
        (tiny.RECORDS, {"learning_rate": "auto"}, None),
        (tiny.RECORDS, {"learning_rate": 0.03}, 0.03),
        (tiny.RECORDS, {"label_bias": "none"}, 8 * RATE),
        (tiny.RECORDS, {"relative": False}, 8 * RATE),
        (TEXTS, {}, 8 * RATE),
    ],
)
def test_it_is_measured_of_a_classification_that_was_given_none(loaded, tmp_path, capsys, records, options, wanted):
    task, settings = task_of(loaded, records), Settings(max_steps=1, batch_size=4, **options)
    measured = auto_rate.measured_rate(task, settings) if wanted is None else wanted
    loop.fit(task, settings, tmp_path / "run", show=None if wanted is None else False)
    assert settings.learning_rate == measured
    assert read_whole(tmp_path / "run" / "journal.qzo")[0]["recipe"]["learning_rate"] == measured
    assert (f"learning rate {measured:g}, measured" in capsys.readouterr().err) == (wanted is None)


def test_a_run_that_goes_on_does_not_measure_again(loaded, tmp_path, monkeypatch):
    untouched = (copy.deepcopy(loaded[0]), loaded[1])
    first = Settings(max_steps=4, batch_size=4)
    loop.fit(task_of(loaded), first, tmp_path, show=False)
    monkeypatch.setattr(loop, "measured_rate", lambda task, settings: 1 / 0)
    more = Settings(max_steps=6, batch_size=4)
    assert loop.fit(task_of(untouched), more, tmp_path, resume=True, show=False) == 4
    assert more.learning_rate == first.learning_rate
