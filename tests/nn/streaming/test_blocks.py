"""What is found of a model, and where it lies in the bytes of its block."""

import pytest
import torch
from torch import nn

import qzo
from qzo.nn.streaming.blocks import ALIGNMENT, blocks_of, packed_into
from tests.support import offloads, small_layers
from tests.support.aqlm_checkpoints import a_layer


def test_a_block_has_the_codes_and_zeros_of_its_layers_side_by_side():
    model = offloads.tower(3)
    found = blocks_of(model)
    assert [block.name for block in found] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [block.nbytes for block in found] == [block.nbytes for block in blocks_of(model.to("meta"))]
    for block in found:
        pieces = [(piece.start, piece.nbytes) for piece in block.pieces]
        assert len(pieces) == 4
        assert all(start % ALIGNMENT == 0 for start, _ in pieces)
        ends = [start + nbytes for start, nbytes in pieces]
        assert all(0 <= start - end < ALIGNMENT for end, (start, _) in zip(ends, pieces[1:], strict=False))
        assert ends[-1] <= block.nbytes < ends[-1] + ALIGNMENT


@pytest.mark.parametrize("in_rows", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"bits": 2}, {"bits": 8}, {"table": "nf4"}, {"group_size": -1}]
)
def test_bytes_are_what_the_layers_hold_in_the_form_that_is_asked_for(options, in_rows):
    model = qzo.quantize_(nn.Sequential(nn.ModuleList([nn.Linear(160, 24)])), **{"group_size": 32, **options})
    [block] = blocks_of(model, in_rows=in_rows)
    filled, [layer] = packed_into(block, torch.empty(block.nbytes + 7, dtype=torch.uint8)), block.layers()
    held = {piece.what: piece.within(filled) for piece in block.pieces}
    codes = layer.packed()
    codes.codes, codes.zeros = held["codes"], held.get("zeros")
    assert held["codes"].dtype == (torch.uint8 if in_rows else torch.int16)
    assert torch.equal(codes.dequantize(), layer.dequantize())


def test_words_of_vectors_are_what_they_are():
    model = nn.Sequential(nn.ModuleList([a_layer()]))
    [block] = blocks_of(model)
    [piece] = block.pieces
    filled = packed_into(block, torch.empty(block.nbytes, dtype=torch.uint8))
    assert torch.equal(piece.within(filled), block.layers()[0].codes)


def test_the_outermost_lists_are_taken_and_others_can_be_named():
    inner = nn.ModuleList([small_layers.block(), small_layers.block()])
    model = nn.ModuleDict({"first": nn.ModuleList([nn.ModuleList([inner])]), "dense": nn.ModuleList([nn.Linear(2, 2)])})
    model["second"] = nn.ModuleList([small_layers.block(), nn.ReLU()])
    assert [block.name for block in blocks_of(model)] == ["first.0", "second.0"]
    assert [block.name for block in blocks_of(model, [inner])] == ["first.0.0.0", "first.0.0.1"]


def test_what_cannot_stream_is_refused_with_its_name():
    shared = small_layers.block()
    with pytest.raises(ValueError, match=r"blocks 0\.0 and 0\.1 share the layer 0\.0\.0\.up"):
        blocks_of(nn.Sequential(nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)])))
    with pytest.raises(ValueError, match=r"Block holds no list of blocks .* quantized"):
        blocks_of(small_layers.block())
    with pytest.raises(ValueError, match="list of 1 blocks was given that is no part of Block"):
        blocks_of(shared, [nn.ModuleList([shared])])
