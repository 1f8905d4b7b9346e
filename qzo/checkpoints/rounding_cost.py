"""What rounding the scales to a file's own dtype costs: the loss of a batch before and after."""

from collections.abc import Iterator
from typing import Any

from ..loss.losses import losses
from ..nn.arena import codebooks_name
from ..nn.layers import layers
from .formats.protocol import SavedScales
from .formats.rounding import new_scales
from .new_folder import new_scale_dtype
from .source import Source
from .trained import Trained


def rounding_losses(model: Any, source: Source, batch: Any) -> dict[str, float]:
    """{"loss_before", "loss_after"}: the loss of a batch as the model is, and as `save_pretrained` would write it.

    The layers' rounded values are put into the arena for one forward; afterwards the model is as before, bit for bit.
    """
    trained = Trained(model, source)
    before = float(losses(model, batch, 1))
    found = layers(model, trainable=None)
    arenas = {id(layer.arena): (layer.arena, layer.arena.data.clone()) for layer in found.values()}
    zeros = {name: layer.zeros for name, layer in found.items()}
    try:
        for name, scales, zero in _saved_scales(trained, source):
            owner, _, leaf = name.rpartition(".")
            layer = found[trained.inside(owner if leaf == "codebooks" else name)]
            if leaf != "codebooks":
                layer.arena.write(layer.arena_name, scales)
            elif layer.trains_codebooks:
                layer.arena.quads(codebooks_name(layer.arena_name)).copy_(scales.reshape(1, -1, 4))
            if zero is not None and layer.zeros is not None:
                layer.zeros = zero.contiguous().to(layer.zeros.device)
        after = float(losses(model, batch, 1))
    finally:
        for arena, data in arenas.values():
            arena.data.copy_(data)
        for name, layer in found.items():
            layer.zeros = zeros[name]
    return {"loss_before": before, "loss_after": after}


def _saved_scales(trained: Trained, source: Source) -> Iterator[SavedScales]:
    """Each layer as it is written: to a copy of the source or, where there is none, to new files."""
    if source.copied is not None:
        yield from source.copied.saved_scales(source.path, trained.find)
        return
    for name, weight in trained.packed().items():
        yield name, new_scales(weight.scales, new_scale_dtype(weight), name).float(), None
