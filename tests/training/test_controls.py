"""The controls beside a run, and the look at the examples that they are made of."""

import pytest
import torch

import qzo
from qzo.loss import head
from qzo.loss.label_bias import fit_label_bias
from qzo.loss.linear_probe import fit_linear_probe
from qzo.training.controls import NAMES, controls
from qzo.training.data import tokenize
from qzo.training.task import Task, measure
from tests.support import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("controls") / "base")


@pytest.fixture
def task_of(base):
    """Makes a Task of records, on one model."""
    model, tokenizer = qzo.from_pretrained(base, device="cpu", group_size=32), qzo.load_tokenizer(base)
    return lambda records, **more: Task(model, tokenize(records, tokenizer), 0, **more)


def longer(records):
    """Some of the prompts made longer, so that batches by length mix the order."""
    return [{**one, "prompt": "stone " * (i % 3) + one["prompt"]} for i, one in enumerate(records)]


@torch.no_grad()
@pytest.mark.parametrize("packing", ["off", "auto"])
def test_a_look_has_the_states_behind_the_scores_in_the_order_of_the_examples(task_of, packing):
    task = task_of(longer(tiny.RECORDS), packing=packing)
    look = task.look(batch_size=5)
    assert torch.equal(look.scores, task.scores(batch_size=5))
    assert torch.equal(look.label, task.labels())
    for number, example in enumerate(task.examples):
        ids = torch.tensor([example.ids])
        want = task.model.base_model(ids).last_hidden_state[0, -1]
        assert torch.allclose(look.states[number], want, atol=1e-5)
        scores = task.model(ids).logits[0, -1, list(look.classes)]
        assert torch.allclose(look.scores[number], scores, atol=1e-5)


def test_a_look_at_some_is_at_the_first(task_of):
    task = task_of(longer(tiny.RECORDS))
    some, all_ = task.look(first=7), task.look()
    assert [len(part) for part in (some.scores, some.label, some.states)] == [7, 7, 7]
    assert torch.allclose(some.states, all_.states[:7], atol=1e-5)
    assert task.look(with_states=False).states is None


def test_both_controls_are_fitted_on_the_ones_and_measured_on_the_others(task_of):
    fitted, held_out = task_of(tiny.RECORDS[:16]).look(), task_of(tiny.RECORDS[16:]).look()
    bias = fit_label_bias(fitted.scores, fitted.label)
    probe = fit_linear_probe(fitted.scores, fitted.states, fitted.label)
    assert controls(fitted, {"valid": held_out, "train": fitted}) == {
        "control": {name: measure(of.scores + bias, of.label) for name, of in (("valid", held_out), ("train", fitted))},
        "linear_probe": {
            "valid": measure(probe(held_out.scores, held_out.states), held_out.label),
            "train": measure(probe(fitted.scores, fitted.states), fitted.label),
        },
    }
    assert list(NAMES) == ["control", "linear_probe"]


def test_a_probe_is_fitted_on_a_bounded_number_of_examples(task_of, monkeypatch):
    fitted, held_out = task_of(tiny.RECORDS[:16]).look(), task_of(tiny.RECORDS[16:]).look()
    monkeypatch.setattr("qzo.training.controls.PROBED", 10)
    probe = fit_linear_probe(fitted.scores[:10], fitted.states[:10], fitted.label[:10])
    wanted = measure(probe(held_out.scores, held_out.states), held_out.label)
    assert controls(fitted, {"valid": held_out})["linear_probe"] == {"valid": wanted}


def test_where_there_is_no_probe(task_of):
    records = tiny.RECORDS
    fitted, held_out = task_of(records[:16]).look(), task_of(records[16:]).look()
    other = task_of([{**one, "options": ["up", "down"]} for one in records[16:]]).look()
    both = controls(fitted, {"valid": held_out, "other": other})
    assert {name: list(splits) for name, splits in both.items()} == {
        "control": ["valid", "other"],
        "linear_probe": ["valid"],
    }
    assert list(controls(fitted, {"other": other})) == ["control"], "its classes are others"
    few = task_of(records[4:11]).look()
    assert list(controls(few, {"valid": held_out})) == ["control"], "seven examples"
    broken = fitted._replace(states=fitted.states.clone().index_fill_(0, torch.tensor(3), torch.inf))
    assert list(controls(broken, {"valid": held_out})) == ["control"], "a state overflowed"
    several = task_of([{**one, "options": ["warm", "very cold"]} for one in records]).look()
    assert (several.classes, several.states) == (None, None)
    assert list(controls(several, {"valid": several})) == ["control"], "an option of two tokens"


def test_a_head_that_cannot_be_read_leaves_the_label_biases(task_of):
    task = task_of(tiny.RECORDS)
    with pytest.warns(UserWarning, match="the logits of all tokens"):
        head.take_whole(task.model, "a test says so")
    look = task.look()
    assert look.states is None
    assert list(controls(look, {"valid": look})) == ["control"]
