"""The study's methods on a tiny model: each learns, each leaves the model as it was, and rows are counted."""

import dataclasses

import pytest
import torch

import qzo
from qzo.bench.study import methods, runs
from qzo.bench.study.tasks import Rows
from qzo.loss.label_bias import biases_of
from tests.support import tiny

CHEAP = {"max_length": 64, "batch_size": 4}


@pytest.fixture(scope="module")
def study_of(tmp_path_factory):
    """Makes a Study of the tiny model."""
    folder = tmp_path_factory.mktemp("study")
    base = tiny.save_checkpoint(folder / "base")
    with pytest.warns(UserWarning, match="group_size"):
        qzo.save_pretrained(qzo.from_pretrained(base, device="cpu"), folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qzo.training.demo.model_file", lambda: folder / "tiny")
        patch.setattr(methods, "BATCH", 8)
        yield lambda records: methods.Study(Rows(records[:16], records[8:16], records[16:]), 1)


@pytest.fixture(scope="module")
def study(study_of):
    return study_of(tiny.RECORDS)


@pytest.mark.parametrize("name", ["default", "pairs, biases learned", "first-order, scales", "first-order, LoRA"])
def test_a_method_learns_and_leaves_the_model_as_it_was(study, name):
    before = study.measured()
    method = methods.METHODS[name]
    if method.options is not None:
        method = dataclasses.replace(method, options={**method.options, **CHEAP})
    scores = method.run(study, 8 * 24, 0, method.rates[0])
    assert scores.keys() == before.keys() == {"validation", "held_out"}
    assert scores != before
    assert study.measured() == before
    assert biases_of(study.model) == {}
    assert method.run(study, 8 * 24, 0, method.rates[0]) == scores, "a run is its seed"
    assert method.run(study, 8 * 24, 1, method.rates[0]) != scores


def test_texts_without_options_are_measured_by_their_loss(study_of):
    texts = [{"text": record["prompt"]} for record in tiny.RECORDS]
    plain = study_of(texts)
    before = plain.measured()
    found = plain.untrained()
    assert list(found) == list(plain.controls) == ["zero-shot", "token biases", "final norm"]
    assert found["zero-shot"] == before
    assert before["validation"]["accuracy"] is None
    assert before["validation"]["loss"] == plain.validation.evaluate()["loss"]
    scores = plain.zeroth_order(8 * 4 * 4, 0, {**CHEAP, "learning_rate": 0.08})
    assert scores["validation"]["loss"] != before["validation"]["loss"]
    assert plain.measured() == before
    scores = plain.first_order(8 * 3 * 20, 0, 1e-2, methods.LowRank)
    assert scores["validation"]["loss"] < before["validation"]["loss"] - 0.1
    assert plain.measured() == before


def test_controls_leave_the_model_as_it_was(study):
    before = study.measured()
    found = study.untrained()
    assert list(found) == ["zero-shot", "label biases only", "linear probe"] == list(study.controls)
    assert found["zero-shot"] == before == study.measured()
    losses = {name: scores["validation"]["loss"] for name, scores in found.items()}
    assert losses["linear probe"] < losses["label biases only"], "the fixture's validation rows are training rows"


def test_gradients_lower_the_loss_they_are_of(study):
    """The fixture's validation rows are training rows."""
    bias = study.untrained()[methods.BIASES]
    tuned = study.first_order(8 * 3 * 20, 0, 1e-2, methods.LowRank)
    assert tuned["validation"]["loss"] < bias["validation"]["loss"]


@pytest.mark.parametrize(("options", "probe"), [({"learning_rate": 0.1}, 0), ({"learning_rate": "auto"}, 4 * 2 * 16)])
def test_forward_rows_are_what_a_run_costs(study, monkeypatch, options, probe):
    counted = []
    monkeypatch.setattr(methods.loop, "fit", lambda task, settings, out, show: counted.append(settings))
    monkeypatch.setattr(methods.loop, "fits_biases", lambda task, settings: False)
    study.zeroth_order(6144, 0, options)
    [settings] = counted
    assert probe + settings.max_steps * settings.evaluations * settings.batch_size == 6144


def test_runs_that_are_there_are_not_made_again(study, tmp_path):
    made = []

    class Counted(methods.Method):
        def run(self, study, rows, seed, rate):
            made.append((rows, seed, rate))
            loss = abs(rate - 0.2) + 0.01 * seed
            return {split: {"loss": loss, "accuracy": 0.5} for split in ("validation", "held_out")}

    path, method = tmp_path / "r.jsonl", Counted((0.1, 0.2, 0.3), {})
    for _ in range(2):
        found = runs.Runs("headlines", path)
        rate = runs.chosen(found, "default", method, study, 64, 2)
        for seed in range(3):
            runs.run(found, "default", method, study, 64, seed, rate)
    assert rate == 0.2
    assert made == [(64, seed, rate) for rate in (0.1, 0.2, 0.3) for seed in (0, 1)] + [(64, 2, 0.2)]
    assert len(path.read_text().splitlines()) == 7
    assert runs.Runs("movie", path).rows == []


def test_adapters_start_as_the_layer(study):
    layer = next(iter(qzo.scales(study.model)))
    module = study.model.get_submodule(layer)
    x = torch.randn(3, module.in_features)
    for adapt in (methods.LowRank, methods.Differentiable):
        assert torch.allclose(adapt(module)(x), module(x), atol=1e-5)
