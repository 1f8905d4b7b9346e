"""The emoji: what the committed runs reached, and its scripts on a few emoji.

tests/fixtures/emoji is 120 of Google's emoji in the npm package's own layout (Apache-2.0).
"""

import json

import pytest
import torch

from tests.support.paths import FIXTURES, ROOT

pytest.importorskip("diffusers", reason="diffusers is of the extra 'test'")

from examples.emoji import emoji, tune
from examples.shared import flow

RESULTS = [json.loads(line) for line in (ROOT / "examples/emoji/results.jsonl").read_text().splitlines()]
GAP = 0.3  # the share of it that is to be closed


@pytest.fixture(scope="module")
def google():
    """(96 for training, 24 held out)"""
    return emoji.split(FIXTURES / "emoji", "google", held_out=24)


def runs_of(method):
    return [run for run in RESULTS if run["method"] == method]


def test_the_committed_runs_are_of_the_recipes():
    assert {run["method"] for run in RESULTS} == set(tune.METHODS)
    for run in RESULTS:
        recipe = tune.METHODS[run["method"]].recipe
        assert {field: run[field] for field in recipe._fields} == recipe._asdict()
    assert [run["seed"] for run in runs_of("QZO")] == [0, 1, 2]


SEEDS = pytest.mark.parametrize("run", runs_of("QZO"), ids=lambda run: f"seed {run['seed']}")


@SEEDS
def test_forward_passes_move_the_base_towards_the_other_style(run):
    """On 200 emoji that no training saw, 32 rows each."""
    assert run["loss"]["z"] <= -5
    assert run["training_seconds"] <= 60 * 60


def test_forward_passes_close_thirty_percent_of_the_gap():
    [gradients] = runs_of("first-order, scales")
    assert max(run["loss"]["mean"] for run in runs_of("QZO")) <= GAP * gradients["loss"]["mean"] < 0


@pytest.mark.xfail(strict=True, reason="README.md: nor does it under gradients on the same scales")
def test_kid_falls():
    assert all(run["kid"][0] < run["kid_before"][0] for run in runs_of("QZO"))


def test_pictures_lie_on_white_where_the_sheet_has_them(google):
    training, held_out = google
    names = training.names + held_out.names
    pictures = torch.cat([training.data.pictures, held_out.data.pictures])
    assert (len(training.names), len(held_out.names), len(set(names))) == (96, 24, 120)
    [red] = [p for name, p in zip(names, pictures, strict=True) if name.startswith("down-pointing red triangle")]
    assert red[:, 6, 8].tolist() == pytest.approx([1, -0.6, -0.6], abs=0.3)  # inside
    assert red[:, -1, 0].tolist() == [1, 1, 1]  # a corner


def test_prompts_share_what_names_share():
    cat, cats, tram = (emoji.prompt(text) for text in ("cat face", "cat face grinning", "tram car"))
    assert torch.equal(cat, emoji.prompt("Cat FACE"))
    assert torch.cosine_similarity(cat, cats, dim=0) > 0.6 > torch.cosine_similarity(cat, tram, dim=0).abs() + 0.2


def test_the_official_objective_is_that_of_the_papers_script(google):
    """A model that gives back the noise has no loss, at whole timesteps of the whole range."""
    training, _ = google
    rows = flow.draw(tune.METHODS["QZO, the official objective"].objective.law, 0, 0, 96, (3, 16, 16))
    seen = []

    class Noise(torch.nn.Module):
        def forward(self, hidden_states, timestep, **_):
            seen.append(timestep)
            return (rows.noise,)

    assert tune.official_losses(Noise(), training.data, rows).tolist() == [0.0] * 96
    assert seen[0].dtype == torch.int64
    assert (int(seen[0].min()) < 20, int(seen[0].max()) > 980) == (True, True)


@pytest.mark.parametrize("method", tune.METHODS)
def test_every_method_trains_the_base(google, method, monkeypatch):
    training, held_out = google
    monkeypatch.setitem(
        tune.METHODS, method, tune.METHODS[method]._replace(recipe=tune.METHODS[method].recipe._replace(steps=2))
    )
    rows = flow.rows_to_measure(held_out.data.pictures, 8)
    before = flow.losses(flow.load_base(emoji.BASE, emoji.GROUP), held_out.data, rows)
    with tune.trained(method, training.data, seed=0) as (model, took):
        assert not torch.equal(flow.losses(model, held_out.data, rows), before)
    assert took["steps"] == 2
