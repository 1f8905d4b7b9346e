"""A model's layers as they are saved: by their names in the files that they came from, and in new ones."""

from typing import Any

import torch
from torch import nn

from ..nn.experts import file_name, model_name
from ..nn.layers import layers
from ..nn.linear import QZOLinear
from ..nn.weights import PackedWeight
from .source import Source


class Trained:
    """A model and its source, or None. What gives a PackedWeight raises ValueError for a scale that is not finite."""

    def __init__(self, model: Any, source: Source | None) -> None:
        self.model, self.source = model, source
        self._names = dict(source.names) if source else {}

    def inside(self, name: str) -> str:
        """The name in the model of a layer of the source's files."""
        return model_name(self._names.get(name, name))

    def outside(self, name: str) -> str:
        """The name in new files of a layer or tensor of the model."""
        return file_name(name, self.model.config.model_type)

    def renamed(self, tensor: str) -> str:
        """The name in new files of a tensor of the source's: the model's, which its config speaks of."""
        owner, _, leaf = tensor.rpartition(".")
        return self.outside(f"{self.inside(owner)}.{leaf}" if owner else self._names.get(tensor, tensor))

    def find(self, tensor: str) -> PackedWeight | None:
        """The layer whose weight has this name in the source's files; None where the model has no QZOLinear for it."""
        name = self.inside(tensor.removesuffix(".weight"))
        try:
            layer = self.model.get_submodule(name)
        except AttributeError:  # a model without the head that the file has
            return None
        return _packed(name, layer) if isinstance(layer, QZOLinear) else None

    def packed(self) -> dict[str, PackedWeight]:
        """Every layer by its name in new files."""
        found = layers(self.model, trainable=None)
        return {self.outside(name): _packed(name, layer) for name, layer in found.items()}

    def dense_linears(self) -> list[str]:
        """Names in new files of the Linears that stay dense."""
        return [self.outside(name) for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]


def _packed(name: str, layer: QZOLinear) -> PackedWeight:
    for what, values in (("scale", layer.read_scales()), ("number of a codebook", layer.read_codebooks())):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}: a {what} is NaN or infinite; the run has diverged, nothing was written")
    return layer.packed()
