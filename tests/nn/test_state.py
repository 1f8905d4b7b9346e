"""A state of another form than its layer's is refused, saying what it holds."""

import pytest
import torch

import qzo
from qzo.nn.state import NAMES, packed_of
from tests.support import small_layers

FORM = {"bits": 4, "in_features": 128, "out_features": 24, "group_size": 64, "books": 0}


def state():
    layer = qzo.QZOLinear.from_linear(small_layers.linear(), group_size=64)
    return layer, dict.fromkeys(NAMES) | layer.state_dict()


def test_a_state_is_what_the_layer_holds():
    layer, held = state()
    assert torch.equal(packed_of(held, **FORM).dequantize(), layer.dequantize())


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"bits": 8}, "codes of 4 bits, the layer has 8"),
        ({"out_features": 25}, "24 outputs in groups of 64, the layer has 25 in groups of 64"),
        ({"group_size": 32}, "24 outputs in groups of 64, the layer has 24 in groups of 32"),
        ({"books": 2}, "0 codebooks, the layer has 2"),
    ],
)
def test_a_state_of_another_form_is_refused(other, told):
    with pytest.raises(ValueError, match=f"holds {told}"):
        packed_of(state()[1], **FORM | other)
