"""What of a model can stream: the blocks of its lists, and where a block's codes and zero points lie in its bytes."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ...kernels.forms import form_of
from ..linear import QZOLinear
from ..weights import to_planes, to_rows

ALIGNMENT = 64  # bytes that a tensor begins on: kernels load 16 at a time, a CPU's vector units 64


@dataclasses.dataclass(frozen=True)
class Piece:
    """The codes, or the zero points, of a layer: `nbytes` bytes from `start` on of its block's."""

    layer: QZOLinear
    what: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def within(self, block: torch.Tensor) -> torch.Tensor:
        """The piece as a view into its block's bytes, uint8 [nbytes of the block]."""
        return block[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)


@dataclasses.dataclass(frozen=True)
class Block:
    """An entry of a list of blocks: its name in the model, and the pieces of its quantized layers, `nbytes` in all."""

    name: str
    module: nn.Module
    pieces: tuple[Piece, ...]
    nbytes: int

    def layers(self) -> list[QZOLinear]:
        return [piece.layer for piece in self.pieces if piece.what == "codes"]


def blocks_of(module: nn.Module, lists: Sequence[nn.ModuleList] | None = None, in_rows: bool = True) -> list[Block]:
    """The blocks of a model, in the order of their lists, each with what it can stream.

    Parameters
    ----------
    module
        Holds the lists; it may be on the meta device.
    lists
        Whose entries are the blocks; None: the outermost lists that hold quantized layers, as the decoder's in a
        language model, or both lists of a diffusion transformer.
    in_rows
        Whether codes are to be a CPU's rows, or planes (kernels/codes.py), whatever they are now.

    Returns
    -------
    list[Block]
        Those with quantized layers.

    Raises
    ------
    ValueError
        There is no such list; a list that is not the module's; a layer that two blocks share.
    """
    found: list[Block] = []
    names = {id(child): name for name, child in module.named_modules()}
    owners: dict[int, str] = {}
    for blocks in _outermost(module) if lists is None else lists:
        if id(blocks) not in names:
            raise ValueError(f"a list of {len(blocks)} blocks was given that is no part of {type(module).__name__}")
        for entry in blocks:
            name = names[id(entry)]
            layers = [child for child in entry.modules() if isinstance(child, QZOLinear)]
            for layer in layers:
                if id(layer) in owners:
                    raise ValueError(
                        f"blocks {owners[id(layer)]} and {name} share the layer {names[id(layer)]}: a block is to have "
                        "layers of its own to stream; leave this list out, or do not offload"
                    )
                owners[id(layer)] = name
            if layers:
                found.append(_block(name, entry, layers, in_rows))
    if not found:
        raise ValueError(
            f"{type(module).__name__} holds no list of blocks (nn.ModuleList) with quantized layers: name the lists "
            "(blocks=), or do not offload"
        )
    return found


def _outermost(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and any(isinstance(inner, QZOLinear) for inner in child.modules()):
            yield child
        else:
            yield from _outermost(child)


def _block(name: str, module: nn.Module, layers: Sequence[QZOLinear], in_rows: bool) -> Block:
    pieces, end = [], 0
    for layer in layers:
        form = form_of(layer.bits, layer.table, layer.codebooks)
        kind = torch.uint8 if in_rows and layer.codebooks is None else torch.int16
        wanted = [("codes", tuple(form.shape(layer.out_features, layer.in_features, in_rows)), kind)]
        if layer.zeros is not None:
            wanted.append(("zeros", tuple(layer.zeros.shape), layer.zeros.dtype))
        for what, shape, dtype in wanted:
            pieces.append(Piece(layer, what, end, shape, dtype))
            end += -(-pieces[-1].nbytes // ALIGNMENT) * ALIGNMENT
    return Block(name, module, tuple(pieces), end)


def packed_into(block: Block, buffer: torch.Tensor) -> torch.Tensor:
    """The block's bytes, made of what its layers hold now: the first `nbytes` of buffer, uint8 on the CPU."""
    filled = buffer[: block.nbytes]
    for piece in block.pieces:
        layer = piece.layer
        held = layer.codes if piece.what == "codes" else layer.zeros
        assert held is not None
        if piece.what == "codes" and layer.codebooks is None:
            form = to_rows if piece.dtype == torch.uint8 else to_planes
            held = form(held, layer.in_features, layer.bits)
        piece.within(filled).copy_(held)
    return filled
