"""The digits: what the committed runs reached, that the committed base learns a 9, and its scripts."""

import json

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("diffusers", reason="diffusers is of the extra 'test'")
pytest.importorskip("sklearn", reason="scikit-learn is of the extra 'test'")

from examples.digits import digits, train_base, tune
from examples.shared import flow

RESULTS = [json.loads(line) for line in (ROOT / "examples/digits/results.jsonl").read_text().splitlines()]


def test_the_committed_runs_are_of_the_recipe():
    assert [run["seed"] for run in RESULTS] == [0, 1, 2]
    for run in RESULTS:
        assert {field: run[field] for field in tune.RECIPE._fields} == tune.RECIPE._asdict()


@pytest.mark.parametrize("run", RESULTS, ids=lambda run: f"seed {run['seed']}")
def test_half_of_the_nines_are_read_and_the_other_digits_stay(run):
    """Of 200 nines and 50 samples of each other digit, by a reader that reads real ones."""
    before, after = run["before"], run["after"]
    assert run["reader_accuracy"] >= 0.95
    assert sum(before["nines_read_as"]) == sum(after["nines_read_as"]) == 200
    assert before["read_right"][9] <= 0.05
    assert after["read_right"][9] >= 0.5
    assert max(was - now for was, now in zip(before["read_right"][:9], after["read_right"][:9], strict=True)) <= 0.05
    assert run["loss_of_nines"]["mean"] < -5 * run["loss_of_nines"]["error"]


def test_a_run_takes_minutes():
    """A row says so where other programs had most of its core: its seconds are theirs."""
    seconds = [run["training_seconds"] for run in RESULTS if not run.get("shared_core") and run["threads"] <= 2]
    assert len(seconds) >= 2
    assert max(seconds) <= 5 * 60


def test_a_few_steps_teach_the_base_something_about_nines():
    """On held-out nines, paired on the same rows: beyond what their number leaves to chance."""
    training, held_out = digits.load()
    nines = held_out.where(held_out.labels == digits.UNSEEN).prompted()
    rows = flow.rows_to_measure(nines.pictures, tune.DRAWS)
    model = flow.load_base(digits.BASE, digits.GROUP)
    before = flow.losses(model, nines, rows)
    flow.tune(model, tune.RECIPE._replace(steps=8), tune.batches(training), seed=0)
    found = flow.compared(before, flow.losses(model, nines, rows), tune.DRAWS)
    assert found["z"] < -5, found


def test_a_step_shows_as_many_nines_as_others():
    training, _ = digits.load()
    shown = tune.batches(training)(torch.Generator().manual_seed(0))
    nines = (shown.prompts == digits.prompts()[digits.UNSEEN]).all(1)
    assert nines.sum() == tune.RECIPE.batch // 2 == len(nines) // 2


def test_the_base_is_never_shown_a_nine():
    training, held_out = digits.load()
    assert train_base.shown(training).labels.unique().tolist() == list(range(9))
    assert len(training.labels) + len(held_out.labels) == 1797
    assert not {tuple(p.flatten().tolist()) for p in training.pictures} & {
        tuple(p.flatten().tolist()) for p in held_out.pictures
    }
