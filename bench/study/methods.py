"""What the study compares: zeroth-order recipes as `qzo train` runs them, and gradients on the same layers.

Cost is counted in forward rows: a row of the batch in one evaluation. A backward counts as two of them.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from ...checkpoints.load import from_pretrained
from ...checkpoints.tokenizer import load_tokenizer
from ...loss.head import logits_at
from ...loss.label_bias import fit_label_bias
from ...loss.losses import label_places, model_inputs
from ...nn.layers import layers
from ...training import auto_rate, demo, loop
from ...training.controls import controls
from ...training.data import Batch
from ...training.settings import PAPER, Settings
from ...training.task import Measure, measure
from ...training.validation import Base
from . import readout
from .tasks import Rows

BATCH = 32  # of gradients
FORWARD_AND_BACKWARD = 3
RANK = 8
ZERO_SHOT, BIASES, PROBE = "zero-shot", "label biases only", "linear probe"
UNTRAINED = (ZERO_SHOT, BIASES, PROBE, *readout.NAMES)
Scores = dict[str, Measure]
Rate = float | Literal["auto"]


class Study:
    """The demo's model with a task's rows; each method starts from its untouched scales."""

    def __init__(self, rows: Rows, train_layers: int):
        path = demo.model_file()
        self.model, tokenizer = from_pretrained(path, device="cpu"), load_tokenizer(path)
        self.train_layers, prefix = train_layers, loop.choose_layers(self.model, train_layers)
        self.training, self.validation, self.held_out = (
            loop.build_task(self.model, records, tokenizer, Settings(train_layers=train_layers), prefix)
            for records in (rows.training, rows.validation, rows.held_out)
        )
        self.has_options = self.training.examples[0].options is not None
        self.base = Base(self.model)
        self.controls = (ZERO_SHOT, BIASES, PROBE) if self.has_options else (ZERO_SHOT, *readout.NAMES)
        self.learning_rate: float | None = None  # of the last run

    def measured(self, bias: torch.Tensor | float = 0.0) -> Scores:
        """Both splits, with biases of the options added to the scores; of texts without options as they are."""
        splits = {"validation": self.validation, "held_out": self.held_out}
        if not self.has_options:
            return {name: task.evaluate() for name, task in splits.items()}
        return {name: measure(task.scores() + bias, task.labels()) for name, task in splits.items()}

    def untrained(self) -> dict[str, Scores]:
        """Of the untouched model, and what its controls give: of texts readout.py's."""
        if not self.has_options:
            return {ZERO_SHOT: self.measured(), **readout.controls(self.training, self.validation, self.held_out)}
        looks = {"validation": self.validation.look(), "held_out": self.held_out.look()}
        found = controls(self.training.look(), looks)
        names = {"control": BIASES, "linear_probe": PROBE}
        return {ZERO_SHOT: self.measured(), **{names[name]: scores for name, scores in found.items()}}

    def zeroth_order(self, rows: int, seed: int, options: dict[str, Any]) -> Scores:
        """A run of `qzo train` over so many forward rows, those that measure its learning rate among them."""
        settings = Settings(seed=seed, train_layers=self.train_layers, **options)
        if settings.learning_rate is None:
            rows -= 2 * auto_rate.DIRECTIONS * settings.batch_size
        settings.max_steps = rows // (settings.evaluations * settings.batch_size)
        try:
            with tempfile.TemporaryDirectory() as out:
                loop.fit(self.training, settings, Path(out), show=False)
            self.learning_rate = settings.learning_rate
            if loop.fits_biases(self.training, settings):
                self.training.fit_biases_()
            return self.measured()
        finally:
            self.base.restore()
            assert self.model.generation_config is not None
            self.model.generation_config.sequence_bias = None

    def first_order(self, rows: int, seed: int, rate: float, adapt: "Adapter") -> Scores:
        """Adam over so many rows, the learning rate falling linearly to a tenth; label biases are fitted at the end, as
        of a zeroth-order run, where there are options."""
        self.learning_rate, steps = rate, rows // (BATCH * FORWARD_AND_BACKWARD)
        with adapted(self.model, adapt, seed) as parameters:
            optimizer = torch.optim.Adam(parameters, lr=rate)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = rate * (1 - 0.9 * step / steps)
                batch = self.training.batch(self.training.indices(step, BATCH, seed), 1)
                optimizer.zero_grad()
                self._loss(batch).backward()
                optimizer.step()
            if not self.has_options:
                return self.measured()
            return self.measured(fit_label_bias(self.training.scores(), self.training.labels()))

    def _loss(self, batch: Batch) -> torch.Tensor:
        """What a training batch gives to be minimized, with its graph."""
        if self.has_options:
            return functional.cross_entropy(self.training.scores_of(batch), batch["label"])
        row, column, target, _ = label_places(self.model, batch)
        with self.training.starting(batch):
            logits = [*logits_at(self.model, model_inputs(self.model, batch), row, column)]
        return functional.cross_entropy(torch.cat(logits, 1)[0], target)


class Differentiable(nn.Module):
    """A QZOLinear whose weight, float32 [N, K], is kept, and multiplied by one factor [N, G] per scale, which starts at
    1, as relative perturbations have it."""

    weight: torch.Tensor

    def __init__(self, layer: Any):
        super().__init__()
        self.register_buffer("weight", layer.dequantize())
        self.bias, self.group_size = layer.bias, layer.group_size
        self.factor = nn.Parameter(torch.ones(layer.out_features, layer.in_features // layer.group_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., K] -> [.., N]."""
        return functional.linear(x, self.weight * self.factor.repeat_interleave(self.group_size, 1), self.bias)


class LowRank(nn.Module):
    """A QZOLinear with a low-rank update beside it, LoRA (arXiv 2106.09685) with alpha twice the rank, as is usual."""

    def __init__(self, layer: Any):
        super().__init__()
        self.weight, self.bias = layer.dequantize(), layer.bias
        self.down = nn.Parameter(torch.empty(RANK, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, RANK))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., K] -> [.., N]."""
        return functional.linear(x, self.weight, self.bias) + 2 * (x @ self.down.T) @ self.up.T


Adapter = Callable[[Any], nn.Module]


@contextmanager
def adapted(model: nn.Module, adapt: Adapter, seed: int) -> Iterator[list[nn.Parameter]]:
    """Inside, adapters stand in the trained layers' places; yields their parameters."""
    torch.manual_seed(seed)
    found = layers(model)
    made = {name: adapt(layer) for name, layer in found.items()}
    try:
        for name, module in made.items():
            model.set_submodule(name, module)
        yield [parameter for module in made.values() for parameter in module.parameters() if parameter.requires_grad]
    finally:
        for name, layer in found.items():
            model.set_submodule(name, layer)


@dataclasses.dataclass(frozen=True)
class Method:
    """A recipe, and the learning rates that are tried (runs.py chooses)."""

    rates: tuple[Rate, ...]
    options: dict[str, Any] | None = None  # of Settings; None: gradients
    adapt: Adapter | None = None

    def run(self, study: Study, rows: int, seed: int, rate: Rate) -> Scores:
        """The scores after so many forward rows."""
        if self.options is None:
            assert self.adapt is not None
            assert not isinstance(rate, str)
            return study.first_order(rows, seed, rate, self.adapt)
        return study.zeroth_order(rows, seed, {**self.options, "learning_rate": rate})


PAPERS_RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
PAIRS = {"directions": 2, "one_sided": False}
METHODS = {
    "default": Method(("auto",), {}),
    "default, 1 step late": Method(("auto",), {"staleness": 1}),
    "default, 4 steps late": Method(("auto",), {"staleness": 4}),
    "pairs, 2 directions x 16 rows": Method((8e-2, 16e-2, 32e-2, 64e-2), PAIRS),
    "pairs, biases learned": Method((8e-2, 16e-2), {**PAIRS, "label_bias": "none"}),
    "paper's recipe": Method(PAPERS_RATES, {key: PAPER[key] for key in PAPER.keys() - {"learning_rate"}}),
    "first-order, scales": Method((1e-3, 3e-3), None, Differentiable),
    "first-order, LoRA": Method((3e-4, 1e-3), None, LowRank),
}
