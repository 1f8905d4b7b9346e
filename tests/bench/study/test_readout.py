"""The controls of texts: they find what there is, count what validation says, and leave the model alone."""

import pytest
import torch

import qzo
from qzo.bench.study import readout
from qzo.bench.study.readout import BIASES, NORM, Readout, fitted, measured, tokens_of
from qzo.training.data import tokenize
from qzo.training.task import Task
from tests.support import tiny

VOCABULARY, FEATURES = 6, 4


def tokens(count, shares, seed):
    """Tokens drawn with these shares behind states that say nothing of them."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.multinomial(torch.tensor(shares), count, replacement=True, generator=generator)
    return torch.randn(count, FEATURES, generator=generator), label


def loss_of(scores):
    """Its loss, which is never None here."""
    assert scores["loss"] is not None
    return scores["loss"]


def test_token_biases_come_to_the_entropy_of_the_tokens(monkeypatch):
    monkeypatch.setattr(readout, "EPOCHS", 200)
    shares = [0.4, 0.3, 0.1, 0.1, 0.05, 0.05]
    entropy = -sum(share * torch.tensor(share).log().item() for share in shares)
    training, validation = tokens(4096, shares, 0), tokens(4096, shares, 1)
    model = Readout(torch.zeros(VOCABULARY, FEATURES))
    assert loss_of(measured(model, validation)) == pytest.approx(torch.tensor(6.0).log().item())
    scores = fitted(model, BIASES, training, {"validation": validation, "held_out": tokens(4096, shares, 2)})
    assert loss_of(scores["held_out"]) == pytest.approx(entropy, abs=0.02)
    assert scores["held_out"]["accuracy"] is None
    assert (model.parts[NORM] == 0).all()


def test_a_factor_takes_a_feature_away_that_misleads():
    weight = torch.eye(VOCABULARY, FEATURES) * 4
    label = torch.arange(2048) % 3
    states = torch.eye(VOCABULARY, FEATURES)[label]
    states[:, 3] = torch.randn(2048, generator=torch.Generator().manual_seed(0))  # pushes the fourth token
    model = Readout(weight)
    scores = fitted(model, NORM, (states, label), {"validation": (states, label), "held_out": (states, label)})
    assert loss_of(scores["held_out"]) < 0.9 * loss_of(measured(Readout(weight), (states, label)))
    assert model.parts[NORM][3] < -0.1 < 0 < model.parts[NORM][:3].min()
    assert (model.parts[BIASES] == 0).all()


def test_the_best_epoch_on_validation_counts():
    """Validation tokens of other shares: the first epoch already makes them worse."""
    training, validation = tokens(4096, [1, 0, 0, 0, 0, 0.0], 0), tokens(512, [0, 1, 1, 1, 1, 1.0], 1)
    model = Readout(torch.zeros(VOCABULARY, FEATURES))
    before = measured(model, validation)
    scores = fitted(model, BIASES, training, {"validation": validation, "held_out": training})
    assert scores["validation"] == before
    assert loss_of(measured(model, validation)) > loss_of(before), "it was fitted for one epoch"


def test_tokens_are_those_of_the_loss(tmp_path):
    base = tiny.save_checkpoint(tmp_path / "base")
    model = qzo.from_pretrained(base, device="cpu", group_size=32)
    texts = [{"text": record["prompt"] + " one" * (number % 3)} for number, record in enumerate(tiny.RECORDS)]
    task = Task(model, tokenize(texts, qzo.load_tokenizer(base)), 0)
    found = tokens_of(task)
    plain = Readout(model.get_output_embeddings().weight.detach())
    assert loss_of(measured(plain, found)) == pytest.approx(loss_of(task.evaluate()), rel=1e-5)
    controls = readout.controls(task, task, task)
    assert list(controls) == ["token biases", "final norm"]
    for scores in controls.values():
        assert loss_of(scores["held_out"]) < 0.99 * loss_of(task.evaluate())
    assert measured(plain, tokens_of(task)) == measured(plain, found), "the model is as it was"
