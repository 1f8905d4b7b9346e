"""Label biases: the fit, the losses that leave them out, and where a model keeps them."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from qzo.loss.label_bias import Centred, add_biases_, biases_of, fit_label_bias, set_biases_
from tests.support.float_models import ONE_BLOCK


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**ONE_BLOCK))


COPIES, ROWS, OPTIONS, EPS = 4, 6, 3, 1e-4


def loss_of(scores, label):
    return torch.nn.functional.cross_entropy(scores, label).item()


def test_label_bias_is_the_best_there_is():
    torch.manual_seed(0)
    scores, label = torch.randn(200, 4) + torch.tensor([3.0, 0, -2, 0]), torch.randint(0, 4, (200,))
    bias = fit_label_bias(scores, label)
    best = loss_of(scores + bias, label)
    assert best < loss_of(scores, label) - 0.5
    assert (bias.dtype, bias.mean().abs() < 1e-6) == (torch.float32, True)
    for i in range(4):
        for move in (-0.05, 0.05):
            assert loss_of(scores + bias + move * torch.eye(4)[i], label) > best - 1e-5


def test_the_bias_of_an_option_that_no_example_chooses_is_finite():
    torch.manual_seed(0)
    scores, label = torch.randn(200, 4), torch.randint(0, 3, (200,))
    bias = fit_label_bias(scores, label)
    assert bias[3] == bias.min()
    assert -20 < bias[3] - bias[:3].mean() < -5


def evaluations(pushed):
    """(scores [E * B, O] of evaluations +, -, +, - of two directions along which scores move, label); pushed: float64
    [2, O], by how much each direction moves all rows alike beside."""
    generator = torch.Generator().manual_seed(1)
    base, label = torch.randn(ROWS, OPTIONS, generator=generator, dtype=torch.float64), torch.arange(ROWS) % OPTIONS
    moves = torch.randn(2, ROWS, OPTIONS, generator=generator, dtype=torch.float64) + pushed[:, None]
    scores = torch.stack([base + sign * EPS * move for move in moves for sign in (1, -1)])
    return scores.flatten(0, 1), label.repeat(COPIES), moves


def derivatives(losses):
    return (losses[0::2] - losses[1::2]) / (2 * EPS)


def test_centred_losses_have_the_gradient_of_centred_residuals():
    scores, label, moves = evaluations(torch.zeros(2, OPTIONS))
    losses = Centred(COPIES)(scores, label, COPIES)
    base = scores.view(2, 2, ROWS, OPTIONS).mean((0, 1))
    residuals = base.softmax(1) - torch.eye(OPTIONS)[label[:ROWS]]
    wanted = ((residuals - residuals.mean(0)) * moves).sum(2).mean(1)
    assert derivatives(losses).tolist() == pytest.approx(wanted.tolist(), abs=5 * EPS)
    plain = torch.nn.functional.cross_entropy(scores, label, reduction="none").view(COPIES, -1).mean(1)
    assert (derivatives(losses) - derivatives(plain)).abs().min() > 0.01, "the common part is another number"
    assert losses[0] == plain[0]
    assert losses.mean() == pytest.approx(plain.mean().item(), abs=5 * EPS)


def test_a_push_of_all_rows_alike_changes_nothing():
    pushed = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, 0.0]])
    still, moved = (derivatives(Centred(COPIES)(*evaluations(by)[:2], COPIES)) for by in (0 * pushed, pushed))
    assert moved.tolist() == pytest.approx(still.tolist(), abs=10 * EPS)


def test_evaluations_in_turn_have_the_bits_of_all_at_once():
    centred = Centred(COPIES)
    for scores, label in (evaluations(torch.zeros(2, OPTIONS))[:2], evaluations(torch.ones(2, OPTIONS))[:2]):
        together = Centred(COPIES)(scores, label, COPIES)
        parts = zip(scores.chunk(COPIES), label.chunk(COPIES), strict=True)
        each = [centred(some, of_some, 1) for some, of_some in parts]  # a second step begins anew
        assert torch.equal(torch.cat(each), together)


def test_a_model_keeps_biases_in_its_generation_config():
    model = llama()
    assert biases_of(model) == {}
    assert add_biases_(model, [5, 3], [0.5, -1.25]) == [(5, 0.5), (3, -1.25)]
    assert add_biases_(model, [3], [0.25]) == [(5, 0.5), (3, -1.0)], "they are added to what is there"
    assert model.generation_config.sequence_bias == [[[5], 0.5], [[3], -1.0]]
    ids = torch.tensor([[1, 2]])
    plain = llama()
    with torch.no_grad():
        logits = plain(ids).logits[0, -1]
    chosen = int(logits.argmax())
    set_biases_(model, [((chosen + 1) % 16, 1e4)])
    written = model.generate(ids, max_new_tokens=1, do_sample=False)
    assert written[0, -1] == (chosen + 1) % 16, "transformers adds them when it writes text"


def test_biases_of_several_tokens_stay():
    model = llama()
    model.generation_config = GenerationConfig(sequence_bias={(4, 5): 2.0, (6,): 1.0})
    assert biases_of(model) == {6: 1.0}
    set_biases_(model, [(7, 3.0)])
    assert model.generation_config.sequence_bias == [[[4, 5], 2.0], [[7], 3.0]]
    assert biases_of(model) == {7: 3.0}
