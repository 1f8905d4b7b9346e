"""What a model holds on its device and beside it where its blocks stream (`qzo.offload`)."""

from collections.abc import Mapping

from torch import nn

from ..nn.streaming.blocks import blocks_of
from ..nn.streaming.copiers import STAGES
from ..nn.streaming.offload import device_bytes
from ..nn.streaming.stores import starts_of
from .footprint import allocated


def streamed_bytes(
    model: nn.Module, weights: Mapping[str, int], device: str, offload: str
) -> tuple[dict[str, int], dict[str, int]]:
    """(the weights_bytes of a model whose blocks stream, {"host", "disk"}: what is held beside the device).

    The slots, which hold zero points too, count as codes. On a CPU, host and device are the same memory.
    """
    blocks = blocks_of(model, in_rows=device == "cpu")
    sizes = [block.nbytes for block in blocks]
    pieces = [piece for block in blocks for piece in block.pieces]
    held = {
        what: sum(allocated(piece.nbytes, device) for piece in pieces if piece.what == what)
        for what in ("codes", "zeros")
    }
    left = {what: size - held.get(what, 0) for what, size in weights.items()}
    left["codes"] += device_bytes(blocks)
    kept = starts_of(sizes)[-1]
    if offload == "cpu":
        return left, {"host": kept}
    stages = STAGES if device == "cuda" else 0
    return left, {"host": stages * max(sizes), "disk": kept}
