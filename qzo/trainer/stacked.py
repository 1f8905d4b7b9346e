"""What stands for the model inside a loss function: one forward of the stacked batch serves every evaluation.

A loss function of a trainer calls its model and makes one number of the outputs. Here it is called once for each
evaluation, with a `StackedModel` in place of the model: in the first turn a call runs the inputs stacked E times, and
gives the part of the outputs that is the first evaluation's; in turn e the same call gives the part of evaluation e,
and nothing runs. So the loss function stays as it is, whatever it computes, and never sees two evaluations at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..loss.head import row_count
from ..loss.losses import pair

_SEQUENTIAL = "use paired=False, which runs the evaluations in turn"


class StackedModel:
    """A model in the turns of a loss function, one turn for each of E evaluations; attributes are the model's own."""

    def __init__(self, model: nn.Module, E: int) -> None:
        self._model, self._E = model, E
        self._outputs: list[tuple[Any, int]] = []  # of each call in the first turn: the stacked output, its rows
        self._turn = self._calls = 0
        self.mixed: set[str] = set()  # outputs that are one number of all evaluations: NaN in their place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def losses(self, loss: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """[E]: loss(model) in each turn. ValueError where a loss needs an output that cannot be taken apart."""
        found = []
        for turn in range(self._E):
            self._turn, self._calls = turn, 0
            found.append(loss(self))
            if self._calls != len(self._outputs):
                raise ValueError(
                    f"the loss called the model {len(self._outputs)} times under the first evaluation and "
                    f"{self._calls} times under another: {_SEQUENTIAL}"
                )
            if not isinstance(found[-1], torch.Tensor) or found[-1].numel() != 1:
                got = list(found[-1].shape) if isinstance(found[-1], torch.Tensor) else type(found[-1]).__name__
                raise ValueError(f"compute_loss must return one number, the loss of the batch; got {got}")
        losses = torch.stack([each.reshape(()) for each in found])
        if self.mixed and losses.isnan().any() and self._finite_rows():
            raise ValueError(
                f"the loss reads {', '.join(sorted(self.mixed))} of the model's output, one number of the whole "
                f"stacked batch, in which the evaluations are mixed (a fused or inline loss): {_SEQUENTIAL}"
            )
        return losses

    def _finite_rows(self) -> bool:
        """Whether all outputs that were taken apart are finite: then a NaN is not the model's."""
        return all(bool(t.isfinite().all()) for output, _ in self._outputs for t in _tensors(output) if t.dim())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._turn == 0:
            self._outputs.append(self._run(args, kwargs))
        if self._calls >= len(self._outputs):
            raise ValueError(f"the loss called the model more often than under the first evaluation: {_SEQUENTIAL}")
        output, rows = self._outputs[self._calls]
        self._calls += 1
        return self._part(output, rows, "output")

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        ragged = sorted(name for name in kwargs if name.startswith("cu_seq_lens"))
        if ragged:
            raise ValueError(
                f"the batch has {', '.join(ragged)}: rows of several lengths in one, which cannot be stacked; "
                f"{_SEQUENTIAL}"
            )
        inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        stacked = pair(inputs, self._E)
        rows = row_count({str(key): value for key, value in stacked.items()})
        placed = [stacked.pop(i) for i in range(len(args))]
        with _loss_of_each(self._model, self._E, rows):
            output = self._model(*placed, **stacked)
        return output, rows

    def _part(self, value: Any, rows: int, name: str) -> Any:
        """Of an output, what is this turn's evaluation's."""
        if isinstance(value, torch.Tensor):
            return self._part_of_tensor(value, rows, name)
        if isinstance(value, ModelOutput):
            return type(value)(**{key: self._part(each, rows, key) for key, each in value.items()})
        if isinstance(value, Mapping):
            return {key: self._part(each, rows, str(key)) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._part(each, rows, name) for each in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"{name} of the model's output is a {type(value).__name__}, not tensors: {_SEQUENTIAL}")

    def _part_of_tensor(self, value: torch.Tensor, rows: int, name: str) -> torch.Tensor:
        if name == "loss" and value.shape == (self._E,):
            return value[self._turn]
        if value.dim() and len(value) and len(value) % rows == 0:
            return value.tensor_split(self._E)[self._turn]
        if value.dim() == 0 and value.is_floating_point():
            self.mixed.add(name)
            return torch.full_like(value, torch.nan)
        raise ValueError(
            f"{name} of the model's output is {list(value.shape)}, which does not begin with the {rows} rows of the "
            f"stacked batch: {_SEQUENTIAL}"
        )


@contextlib.contextmanager
def _loss_of_each(model: nn.Module, E: int, rows: int) -> Iterator[None]:
    """Inside, a transformers model's own `loss_function` gives the loss of each evaluation, [E]."""
    own = getattr(model, "loss_function", None)
    if not callable(own):
        yield
        return

    def losses(*args: Any, **kwargs: Any) -> torch.Tensor:
        def part(value: Any, e: int) -> Any:
            if not isinstance(value, torch.Tensor) or not value.dim():
                return value
            if not len(value) or len(value) % rows:
                raise ValueError(
                    f"the model's loss_function is given {list(value.shape)}, which does not begin with the {rows} "
                    f"rows of the stacked batch: {_SEQUENTIAL}"
                )
            return value.tensor_split(E)[e]

        return torch.stack(
            [own(*(part(a, e) for a in args), **{k: part(v, e) for k, v in kwargs.items()}) for e in range(E)]
        )

    with shadowed(model, "_loss_function", losses):
        yield


@contextlib.contextmanager
def shadowed(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, thing.name is `value`, for this object only."""
    own = thing.__dict__
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        own.pop(name)
        if before is not None:
            own[name] = before


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
