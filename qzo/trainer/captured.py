"""What a CUDA graph is captured of in a trainer: the losses of a micro-batch by the model's own loss, in few shapes.

A graph serves batches of one shape, and nothing in it may depend on the host's view of their values: rows are padded
to one of sixteen widths an octave, and labels become places that are read (`static_batch`). At least one token of
padding is left: models go another way where no row is padded, and cannot look for that while they are captured.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from ..loss.head import has_encoder
from ..loss.losses import losses, static_batch
from ..training.buckets import next_step, padding_bounds

PADDING = "sixteenths/1, as on a CUDA device"  # what a journal says of batches padded so
FILL = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -100}


@dataclasses.dataclass(frozen=True)
class OwnLosses:
    """A closure of a batch, its losses under `copies` evaluations; equal to that of the same model, as graphs ask."""

    model: Any
    copies: int

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """`qzo.losses`: float32 [copies]."""
        return losses(self.model, batch, self.copies)


def padded(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A micro-batch with labels as a CUDA graph wants it, a function of the batch alone; or as it is.

    The losses are the same but for rounding; a row gets one to eight tokens of padding, or at most a sixteenth. Left as
    they are: inputs other than [rows, tokens] under the names of FILL, such as classes, positions or pictures; those of
    an encoder-decoder model; rows as long as the model's table of positions.

    Parameters
    ----------
    model
        A model of transformers.
    inputs
        Of its forward, with labels.

    Returns
    -------
    dict
        Of tensors [rows, width] and, in place of labels, sources, targets, slots int64 [rows, N] and static True.

    Raises
    ------
    ValueError
        No position carries a label.
    """
    labels = inputs["labels"]
    alike = all(isinstance(value, torch.Tensor) and value.shape == labels.shape for value in inputs.values())
    if has_encoder(model) or not alike or "input_ids" not in inputs or not inputs.keys() <= FILL.keys():
        return dict(inputs)
    tokens = labels.shape[1]
    width = min([next_step(tokens + 1, 16), *(bound for bound in padding_bounds(model.config) if tokens <= bound)])
    if width <= tokens:
        return dict(inputs)
    batch = {
        name: functional.pad(value, (0, width - tokens), value=FILL[name])
        for name, value in {"attention_mask": torch.ones_like(labels), **inputs}.items()
    }
    most = int((labels[:, 1:] != -100).sum(1).max())
    return static_batch(batch, min(next_step(most), width - 1))
