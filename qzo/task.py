"""A task: examples, the batches made of them, and what the model scores on them; with or without a frozen prefix."""
import contextlib

import torch

from .data import check_one_kind, collate
from .losses import losses, option_scores, pair
from .prefix import PrefixCache


class Task:
    """Examples on a model. With a FrozenPrefix, forwards start at the first trained block from cached states."""

    def __init__(self, model, examples, pad_id, prefix=None):
        check_one_kind(examples)       # now, not at the first step whose batch mixes them
        self.model, self.examples, self.pad_id, self.prefix = model, examples, pad_id, prefix
        self.device = next(model.parameters()).device
        if prefix is not None:
            rows, self._first_row = [], []
            for example in examples:
                self._first_row.append(len(rows))
                rows += _token_rows(example)
            self.cache = PrefixCache(prefix, rows, pad_id, self.device)

    def closure(self, indices, count):
        """A function that returns the loss of each of `count` evaluations over these examples, float32 [count].

        The batch and the prefix's states are made here, outside the perturbed forward that calls the function.
        """
        batch, starting = self._prepared(indices, count)

        def run():
            with starting():
                return losses(self.model, batch, count)
        return run

    @torch.no_grad()
    def scores(self, batch_size=32):
        """float32 [examples, options] of a task with options, in the order of the examples."""
        parts = {}
        for indices in self._by_length(batch_size):
            batch, starting = self._prepared(indices, 1)
            with starting():
                parts.update(zip(indices, option_scores(self.model, batch), strict=True))
        return torch.stack([parts[i] for i in range(len(self.examples))])

    def evaluate(self, batch_size=32):
        """{"loss", "accuracy"}: mean over examples; accuracy is None for a task without options."""
        if self.examples[0].options is not None:
            return measure(self.scores(batch_size), self.labels())
        total, count = 0.0, 0
        for indices in self._by_length(batch_size):
            total += float(self.closure(indices, 1)()) * len(indices)
            count += len(indices)
        return {"loss": total / count, "accuracy": None}

    def labels(self):
        """int64 [examples]: the right option of each."""
        return torch.tensor([e.label for e in self.examples], device=self.device)

    def _by_length(self, batch_size):
        """Batches of similar length: little padding."""
        order = sorted(range(len(self.examples)), key=lambda i: (len(self.examples[i].ids), i))
        return [order[at:at + batch_size] for at in range(0, len(order), batch_size)]

    def _prepared(self, indices, count):
        """-> (stacked batch, function making the context in which the model runs it)."""
        batch = collate([self.examples[i] for i in indices], self.pad_id, self.device)
        if self.prefix is None:
            return pair(batch, count), contextlib.nullcontext
        rows = [self._first_row[i] + k for i in indices for k in range(len(_token_rows(self.examples[i])))]
        states = pair(self.cache.batch(rows, batch["input_ids"].shape[1]), count)
        return pair(batch, count), lambda: self.prefix.skipped(states)


def measure(scores, label):
    """{"loss", "accuracy"} of option scores [B, O] against labels [B]."""
    loss = torch.nn.functional.cross_entropy(scores.float(), label)
    return {"loss": float(loss), "accuracy": float((scores.argmax(1) == label).double().mean())}


def fit_label_bias(scores, label):
    """The control: one additive bias per option that minimizes the cross entropy of the untouched model's scores.

    A tuned model has learned something about the inputs only where it beats this. Returns float32 [O], mean 0.
    """
    scores = scores.double()
    bias = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device, requires_grad=True)
    solver = torch.optim.LBFGS([bias], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(scores + bias, label)
        value.backward()
        return value

    solver.step(loss)
    return (bias - bias.mean()).detach().float()


def _token_rows(example):
    """The rows of tokens an example needs: one, or one per option when an option has several tokens."""
    if example.options is None or all(len(o) == 1 for o in example.options):
        return [example.ids]
    return [example.ids + option for option in example.options]
