"""A linear probe (arXiv 1610.01644): what logistic regression on an untouched model's last hidden states can do for a
classification.

Its features are what the output head reads where the options are scored, so it costs the forward rows of one look at
the examples, and nothing inside the model is trained. It is a control: where it does better than a run, the run was not
needed for the labels' sake. A checkpoint has no place for it, as the rows of a head are often the embeddings too.
"""

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from .head import inputs_seen, is_whole, output_head
from .label_bias import PRIOR
from .losses import Inputs, option_scores, read_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDS = 4  # of cross-validation, which chooses the penalty
LEAST = 2 * FOLDS  # examples
CONSTANT = 1e-6  # of its largest value: a feature that spreads by no more is left out
PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # on the sum of the squares of weights of standardized features


class LinearProbe(NamedTuple):
    """weight float32 [O, H] and bias float32 [O], of the features as they are; the penalty that was chosen."""

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float

    def __call__(self, scores: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """scores [n, O], states [n, H], on the CPU -> float32 [n, O]."""
        return scores.float() + states.float() @ self.weight.T + self.bias


def scores_and_states(model: "PreTrainedModel", batch: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scores of the options, float32 [B, O], hidden states that the output head has read for them, [B, H]), of a batch
    whose options are of one token each. The states are None where the model's logits are taken whole."""
    head = output_head(model)
    if head is None:
        return option_scores(model, batch), None
    with inputs_seen(head) as seen:
        scores = option_scores(model, batch)
    return scores, None if is_whole(model) else seen[-1][read_places(batch)]


def fit_linear_probe(scores: torch.Tensor, states: torch.Tensor, label: torch.Tensor) -> LinearProbe:
    """Multinomial logistic regression on standardized states, from the model's own scores on, with an L2 penalty on the
    weights and the label biases' prior on the biases; so an infinite penalty gives `fit_label_bias`. Penalties are
    tried from the largest down until the loss of FOLDS-fold cross-validation rises.

    scores float [n, O], states float [n, H], label int64 [n], on the CPU; example i is in fold i % FOLDS. ValueError
    for fewer than LEAST examples.
    """
    if len(label) < LEAST:
        raise ValueError(f"a linear probe needs at least {LEAST} examples, {len(label)} were given")
    scores, states = scores.double(), states.double()
    mean, spread = states.mean(0), states.std(0, correction=0)
    spread = torch.where(spread > CONSTANT * states.abs().amax(0), spread, torch.inf)
    basis, features = torch.linalg.qr(
        ((states - mean) / spread).T
    )  # weights lie in the span of the states: [H, n] -> n
    features = features.T
    penalty = _chosen(scores, features, label)
    fitted = _fit(scores, features, label, penalty)
    weight = fitted[:, :-1] @ basis.T / spread
    return LinearProbe(weight.float(), (fitted[:, -1] - weight @ mean).float(), penalty)


def _chosen(scores: torch.Tensor, features: torch.Tensor, label: torch.Tensor) -> float:
    """The penalty before the first whose cross-validated loss is higher."""
    losses = (_validated(scores, features, label, penalty) for penalty in PENALTIES)
    for (penalty, loss), (_, next_loss) in itertools.pairwise(zip(PENALTIES, losses, strict=True)):
        if next_loss > loss:
            return penalty
    return PENALTIES[-1]


def _validated(scores: torch.Tensor, features: torch.Tensor, label: torch.Tensor, penalty: float) -> float:
    """The cross entropy of examples that a fit has not seen, mean over all of them."""
    fold, total = torch.arange(len(label)) % FOLDS, 0.0
    for number in range(FOLDS):
        inside, out = fold != number, fold == number
        fitted = _fit(scores[inside], features[inside], label[inside], penalty)
        guessed = _applied(fitted, scores[out], features[out])
        total += float(functional.cross_entropy(guessed, label[out], reduction="sum"))
    return total / len(label)


def _fit(scores: torch.Tensor, features: torch.Tensor, label: torch.Tensor, penalty: float) -> torch.Tensor:
    """features [n, F] -> float64 [O, F + 1]: weights and biases of the least penalized loss, which is convex."""
    fitted = torch.zeros(scores.shape[1], features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [fitted], max_iter=200, tolerance_grad=1e-7, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        weight, bias = fitted[:, :-1], fitted[:, -1]
        value = functional.cross_entropy(_applied(fitted, scores, features), label)
        value = value + penalty * weight.square().sum() + PRIOR / len(label) * bias.square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return fitted.detach()


def _applied(fitted: torch.Tensor, scores: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return scores + features @ fitted[:, :-1].T + fitted[:, -1]
