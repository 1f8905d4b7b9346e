"""Label biases: what one number per option can do for a classification, fitted instead of learned.

Most of what an untouched model's first gradient asks for is that it should favour other options, whatever the input.
One bias per option does that; it is fitted from scores in closed form, so the steps need not find it, nor bear the
noise that it adds to each small batch's loss. A model keeps its biases where generation reads them: in
`generation_config.sequence_bias`, of one token each.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Biases = list[tuple[int, float]]  # of tokens
PRIOR = 0.01  # pulls biases to 0, less than an example would: that of an option which none chooses stays finite


def uncentred(scores: torch.Tensor, label: torch.Tensor, copies: int) -> torch.Tensor:
    """Cross entropy of E = `copies` evaluations: scores float32 [E * B, O], label int64 [E * B] -> float32 [E]."""
    return functional.cross_entropy(scores, label, reduction="none").view(copies, -1).mean(1)


class Centred:
    """Losses of options, without the part that a bias per option would take away.

    With residuals r_i = softmax(scores_i) - onehot(label_i) and their mean R over the rows of the step's first
    evaluation, evaluation e has the loss

        L_e = mean_i CE(scores_e,i, label_i) - R . (mean_i scores_e,i - mean_i scores_0,i)

    whose derivative along a perturbation is the mean of (r_i - R) . d scores_i: pushing all rows' scores alike changes
    nothing. At the best biases R is 0 in the mean over the data, so this is the gradient there with the noise of R in
    each batch, its largest part, left out: a control variate. The mean over the evaluations stays the cross entropy but
    for terms of the order of eps.

    evaluations : of a step, 2 J; they come in one call or in several, in turn
    """

    def __init__(self, evaluations: int):
        self.evaluations, self._seen = evaluations, 0
        self._residual = self._origin = torch.empty(0)

    def __call__(self, scores: torch.Tensor, label: torch.Tensor, copies: int) -> torch.Tensor:
        """scores float32 [E * B, O] of the coming E = `copies` evaluations, label int64 [E * B] -> losses [E]."""
        options = scores.shape[1]
        means = scores.view(copies, -1, options).mean(1)
        if self._seen % self.evaluations == 0:
            right = torch.arange(options, device=label.device) == label[:, None]  # one_hot reads it on the host
            residuals = (scores.softmax(1) - right.float()).view(copies, -1, options)
            self._residual, self._origin = residuals[0].mean(0), means[0]
        self._seen += copies
        return uncentred(scores, label, copies) - ((means - self._origin) * self._residual).sum(1)


def fit_label_bias(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """One additive bias per option that minimizes the cross entropy of a model's scores: with the untouched model's,
    the control. A tuned model has learned something about the inputs only where it beats this.

    scores float [B, O], label int64 [B] -> float32 [O], mean 0.
    """
    scores = scores.double()
    bias = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device, requires_grad=True)
    solver = torch.optim.LBFGS([bias], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(scores + bias, label) + PRIOR / len(label) * bias.square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return (bias - bias.mean()).detach().float()


def biases_of(model: "PreTrainedModel") -> dict[int, float]:
    """Token -> bias, of the model's generation_config; {} without. Biases of several tokens are left to generation."""
    return {tokens[0]: bias for tokens, bias in _all_of(model) if len(tokens) == 1}


def set_biases_(model: "PreTrainedModel", biases: Iterable[Sequence[Any]]) -> None:
    """Give these (token, bias) to the model's generation_config, in place of its biases of one token."""
    assert model.generation_config is not None, "a model with options writes text"
    others = [[tokens, bias] for tokens, bias in _all_of(model) if len(tokens) > 1]
    model.generation_config.sequence_bias = others + [[[token], bias] for token, bias in biases]


def add_biases_(model: "PreTrainedModel", tokens: Sequence[int], biases: Sequence[float]) -> Biases:
    """Add a bias to that of each of these tokens; returns all that the model has then."""
    sums = biases_of(model)
    for token, bias in zip(tokens, biases, strict=True):
        sums[token] = sums.get(token, 0.0) + bias
    set_biases_(model, sums.items())
    return list(sums.items())


def _all_of(model: "PreTrainedModel") -> list[tuple[list[int], float]]:
    """(tokens, bias) of the model's generation_config, whichever of its two forms they have there."""
    found = getattr(getattr(model, "generation_config", None), "sequence_bias", None) or []
    return [(list(tokens), bias) for tokens, bias in (found.items() if isinstance(found, dict) else found)]
