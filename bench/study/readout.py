"""What can be had of texts without touching a block: controls that change how the last hidden states are read.

Both are fitted on one look at the training rows, by Adam on the cross entropy of what the head makes of the states,
which is convex: *token biases*, a number for each token of the vocabulary, as label biases are; and *final norm*, a
factor for each feature of the head's input. The epoch with the least loss on validation rows counts.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from ...loss.head import output_head
from ...loss.losses import label_places, read_states
from ...training.task import Measure, Task

BIASES, NORM = "token biases", "final norm"
NAMES = (BIASES, NORM)
RATES = {BIASES: 0.05, NORM: 0.02}
EPOCHS, TOKENS = 8, 1024  # of a batch
Tokens = tuple[torch.Tensor, torch.Tensor]  # states [n, H] behind n labelled tokens, and these, int64 [n]


class Readout(nn.Module):
    """A head's weight [V, H], which does not train, with biases [V] and what is added to factors of 1, [H]."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.parts = nn.ParameterDict({BIASES: torch.zeros(len(weight)), NORM: torch.zeros(weight.shape[1])})

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[n, H] -> logits [n, V]."""
        return functional.linear(states * (1 + self.parts[NORM]), self.weight, self.parts[BIASES])


def controls(training: Task, validation: Task, held_out: Task) -> dict[str, dict[str, Measure]]:
    """NAMES -> "validation" and "held_out", measured; of a model whose head is a float nn.Linear without a bias."""
    head = output_head(training.model)
    assert isinstance(head, nn.Linear)
    seen, splits = tokens_of(training), {"validation": tokens_of(validation), "held_out": tokens_of(held_out)}
    return {name: fitted(Readout(head.weight.detach().float()), name, seen, splits) for name in NAMES}


@torch.no_grad()
def tokens_of(task: Task) -> Tokens:
    """All labelled tokens of a task without options."""
    states, labels = [], []
    for number in range(len(task.examples)):
        batch = task.batch([number], 1)
        with task.starting(batch):
            states.append(read_states(task.model, batch).float())
        labels.append(label_places(task.model, batch)[2])
    return torch.cat(states), torch.cat(labels)


def fitted(readout: Readout, name: str, training: Tokens, splits: Mapping[str, Tokens]) -> dict[str, Measure]:
    """The scores of each split after the best epoch of fitting one part of a readout."""
    optimizer = torch.optim.Adam([readout.parts[name]], lr=RATES[name])
    order = torch.Generator().manual_seed(0)
    best = {split: measured(readout, tokens) for split, tokens in splits.items()}
    for _ in range(EPOCHS):
        for some in torch.randperm(len(training[1]), generator=order).split(TOKENS):
            optimizer.zero_grad()
            functional.cross_entropy(readout(training[0][some]), training[1][some]).backward()
            optimizer.step()
        scores = {split: measured(readout, tokens) for split, tokens in splits.items()}
        if not _loss(scores) < _loss(best):
            break
        best = scores
    return best


def _loss(scores: Mapping[str, Measure]) -> float:
    loss = scores["validation"]["loss"]
    assert loss is not None
    return loss


@torch.no_grad()
def measured(readout: Readout, tokens: Tokens) -> Measure:
    """The mean loss of a token."""
    parts = zip(tokens[0].split(TOKENS), tokens[1].split(TOKENS), strict=True)
    total = sum(float(functional.cross_entropy(readout(states), label, reduction="sum")) for states, label in parts)
    return {"loss": total / len(tokens[1]), "accuracy": None}
