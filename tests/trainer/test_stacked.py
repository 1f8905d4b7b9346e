"""One forward for all evaluations: each output is taken apart, or refused; never a mix of evaluations."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from qzo.trainer.stacked import StackedModel


@dataclasses.dataclass
class Output(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    parts: tuple | None = None
    note: str | None = None


class Model(nn.Module):
    """Outputs made of its inputs; `calls` are the shapes that it has seen."""

    def __init__(self, make):
        super().__init__()
        self.make, self.calls, self.scale = make, [], 2.0

    def forward(self, x, **_):
        self.calls.append(list(x.shape))
        return self.make(x)


def turns(make, loss, E=3, x=None):
    """Losses [E] of a loss function whose model sees rows that differ between the evaluations."""
    x = torch.arange(6.0).view(2, 3) if x is None else x

    def marked(stacked):  # as perturbed scales would: what is computed depends on the evaluation
        blocks = torch.arange(E).repeat_interleave(len(stacked) // E)
        return make(stacked + 10 * blocks.view(-1, *[1] * (stacked.dim() - 1)))

    model = Model(marked)
    return StackedModel(model, E).losses(lambda stands: loss(stands, x)), model.calls


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda x: x, lambda out: out),
        (lambda x: {"logits": x}, lambda out: out["logits"]),
        (lambda x: Output(logits=x, note="as it is"), lambda out: out.logits),
        (lambda x: (None, [x]), lambda out: out[1][0]),
        (lambda x: {"router": x.repeat_interleave(4, 0)}, lambda out: out["router"][::4]),  # rows x 4, in their order
    ],
    ids=["tensor", "dict", "ModelOutput", "tuple", "several a row"],
)
def test_each_turn_sees_its_own_rows(make, read):
    seen = []

    def loss(model, x):
        assert model.scale == 2.0  # attributes are the model's
        seen.append(read(model(x)))
        return seen[-1].sum()

    losses, calls = turns(make, loss)
    assert losses.tolist() == [15.0 + 60 * e for e in range(3)]
    assert calls == [[6, 3]]
    for e, part in enumerate(seen):
        assert torch.equal(part, torch.arange(6.0).view(2, 3) + 10 * e)


def test_several_calls_of_a_loss():
    losses, calls = turns(lambda x: x, lambda model, x: model(x).sum() - 2 * model(x=x[:1]).sum())
    assert losses.tolist() == [15 + 60 * e - 2 * (3 + 30 * e) for e in range(3)]
    assert calls == [[6, 3], [3, 3]]


class WithLoss(nn.Module):
    """As transformers' models: a loss of logits and labels by `loss_function`."""

    def __init__(self):
        super().__init__()
        self._loss_function = lambda logits, labels, num_items_in_batch: (logits - labels).sum() / num_items_in_batch

    @property
    def loss_function(self):
        return self._loss_function

    def forward(self, x, labels, num_items_in_batch):
        x = x + torch.arange(len(x)).view(-1, 1)
        return Output(loss=self.loss_function(x, labels=labels, num_items_in_batch=num_items_in_batch), logits=x)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_models_own_loss_is_one_of_each_evaluation(rows):
    model, x = WithLoss(), torch.zeros(rows, 3)
    labels, own = torch.ones(rows, 3), model._loss_function
    items = torch.tensor(3 * rows)
    losses = StackedModel(model, 2).losses(lambda m: m(x=x, labels=labels, num_items_in_batch=items).loss)
    first = sum(range(rows)) / rows - 1
    assert losses.tolist() == [first, first + rows]
    assert model._loss_function is own


@pytest.mark.parametrize(
    ("make", "loss", "told"),
    [
        (lambda x: {"loss": x.mean()}, lambda m, x: m(x)["loss"], "the loss reads loss .*use paired=False"),
        (lambda x: {"a": x, "b": x.sum()}, lambda m, x: (lambda o: o["a"].sum() + o["b"])(m(x)), "reads b"),
        (lambda x: {"flat": x.flatten()[:5]}, lambda m, x: m(x)["flat"].sum(), r"flat .* is \[5\].*6 rows"),
        (lambda x: {"count": torch.tensor(6)}, lambda m, x: m(x)["count"], r"count .* is \[\]"),
        (lambda x: {"cache": object()}, lambda m, x: m(x)["cache"], "cache .* is a object"),
        (lambda x: x, lambda m, x: m(x).sum(1), r"one number.*\[2\]"),
        (lambda x: x, lambda m, x: m(x).sum().item(), "one number.*float"),
        (lambda x: x, lambda m, x: m(x, cu_seq_lens_q=x).sum(), "cu_seq_lens_q: rows of several lengths"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(make, loss, told):
    with pytest.raises(ValueError, match=told):
        turns(make, loss)


def test_a_loss_that_calls_its_model_unevenly_is_refused():
    for first, later in ((2, 1), (1, 2)):
        left = [first, later, later]

        def loss(model, x, left=left):
            return sum(model(x).sum() for _ in range(left.pop(0)))

        with pytest.raises(ValueError, match=r"times under another|more often"):
            turns(lambda x: x, loss)


def test_a_scalar_that_is_not_read_is_no_matter():
    losses, _ = turns(lambda x: {"logits": x, "loss": x.mean()}, lambda m, x: m(x)["logits"].sum())
    assert losses.tolist() == [15.0, 75.0, 135.0]


def test_a_nan_of_the_model_is_not_taken_for_a_mix():
    losses, _ = turns(lambda x: {"logits": x / 0, "loss": x.mean()}, lambda m, x: (0 * m(x)["logits"]).sum())
    assert losses.isnan().all()


def test_a_models_loss_of_what_is_no_row_is_refused():
    class Weighted(WithLoss):
        def forward(self, x, labels, num_items_in_batch):
            return Output(loss=self.loss_function(x, labels[:1], num_items_in_batch))

    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"loss_function is given \[1, 3\].*4 rows"):
        StackedModel(Weighted(), 2).losses(lambda m: m(x=x, labels=x, num_items_in_batch=1).loss)
