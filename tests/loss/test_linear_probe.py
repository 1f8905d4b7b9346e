"""The linear probe: the states it reads, what it finds, and the penalty that cross-validation chooses."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qzo.loss import head, linear_probe
from qzo.loss.label_bias import fit_label_bias
from qzo.loss.linear_probe import PENALTIES, fit_linear_probe, scores_and_states
from qzo.loss.losses import option_scores
from tests.support.float_models import ONE_BLOCK

CLASSES, FEATURES = 3, 12


def examples(count, noise=0.5, seed=0):
    """(scores of a model that guesses, states that tell the class, in features of very different size, label)."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % CLASSES
    states = 0.1 + torch.eye(CLASSES, FEATURES)[label] + noise * torch.randn(count, FEATURES, generator=generator)
    return 0.1 * torch.randn(count, CLASSES, generator=generator), states * torch.logspace(0, 4, FEATURES), label


def loss_of(scores, label):
    return torch.nn.functional.cross_entropy(scores, label).item()


def test_a_probe_finds_what_the_states_tell():
    scores, states, label = examples(120)
    probe = fit_linear_probe(scores, states, label)
    assert (probe.weight.shape, probe.bias.shape) == ((CLASSES, FEATURES), (CLASSES,))
    others = examples(300, seed=1)
    assert loss_of(probe(others[0], others[1]), others[2]) < 0.5 * loss_of(others[0], others[2])
    assert (probe(others[0], others[1]).argmax(1) == others[2]).double().mean() > 0.85


@pytest.mark.parametrize("count", [60, 9])
def test_it_is_the_least_of_the_penalized_loss(count):
    """With more examples than features, and with fewer; written again in numpy: no weight or bias moves it lower."""
    scores, states, label = examples(count)
    probe = fit_linear_probe(scores, states, label)
    s, h, y = scores.double().numpy(), states.double().numpy(), label.numpy()
    spread = h.std(0)

    def penalized(weight, bias):
        z = s + h @ weight.T + bias
        z = z - z.max(1, keepdims=True)
        loss = (np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]).mean()
        own = bias + weight @ h.mean(0)  # that of centred features
        return loss + probe.penalty * ((weight * spread) ** 2).sum() + 0.01 / len(y) * (own**2).sum() / 2

    weight, bias = probe.weight.double().numpy(), probe.bias.double().numpy()
    least = penalized(weight, bias)
    generator = np.random.default_rng(0)
    for _ in range(20):
        move, step = generator.normal(size=weight.shape) / spread, generator.normal(size=CLASSES)
        for size in (1e-2, 1e-1, -1e-2, -1e-1):
            assert penalized(weight + size * move, bias + size * (step - move @ h.mean(0))) > least


@pytest.mark.parametrize(("noise", "among"), [(0.05, PENALTIES[-2:]), (100.0, PENALTIES[:1])])
def test_what_is_not_in_the_states_is_penalized_away(noise, among):
    """States that tell nothing get the largest penalty; those that tell all, a small one."""
    assert fit_linear_probe(*examples(120, noise)).penalty in among


def test_examples_of_a_fold_are_not_fitted_on(monkeypatch):
    counted = []
    fit = linear_probe._fit
    monkeypatch.setattr(linear_probe, "_fit", lambda *given: counted.append(len(given[2])) or fit(*given))
    fit_linear_probe(*examples(42))
    assert counted[-1] == 42
    assert set(counted[:-1]) == {31, 32}


def test_a_large_penalty_leaves_the_label_biases(monkeypatch):
    scores, states, label = examples(90)
    label = torch.where(torch.arange(90) < 60, 0, label)
    monkeypatch.setattr(linear_probe, "PENALTIES", (1e4,))
    probe = fit_linear_probe(scores, states, label)
    biased = scores + fit_label_bias(scores, label)
    assert torch.allclose(probe(scores, states).softmax(1), biased.softmax(1), atol=1e-3)


def test_a_state_that_never_changes_does_no_harm():
    scores, states, label = examples(60)
    states[:, 3] = 0.1
    probe = fit_linear_probe(scores, states, label)
    assert probe.weight.isfinite().all()
    assert (probe.weight[:, 3] == 0).all()


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match="a linear probe needs at least 8 examples, 7 were given"):
        fit_linear_probe(*examples(7))


# ------------------------------------------------------------------------------------------------- what it reads


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**ONE_BLOCK))


def batch():
    """Two rows, of which the second is shorter."""
    return {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "option_ids": torch.tensor([[3, 4], [3, 4]]),
        "label": torch.tensor([0, 1]),
    }


@torch.no_grad()
def test_states_are_those_behind_the_scores(model):
    scores, states = scores_and_states(model, batch())
    assert torch.equal(scores, option_scores(model, batch()))
    assert torch.allclose(model.lm_head(states)[:, [3, 4]], scores, atol=1e-6)
    assert not model.lm_head._forward_pre_hooks


@torch.no_grad()
def test_a_head_whose_input_cannot_be_read_gives_scores_alone(model, monkeypatch):
    want = option_scores(model, batch())
    with pytest.warns(UserWarning, match="the logits of all tokens are computed"):
        head.take_whole(model, "a test says so")
    scores, states = scores_and_states(model, batch())
    assert states is None
    assert torch.allclose(scores, want, atol=1e-6)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    assert scores_and_states(model, batch())[1] is None
