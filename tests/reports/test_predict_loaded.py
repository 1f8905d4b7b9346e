"""The memory of a model that is loaded is predicted as that of its file."""

from argparse import Namespace

import pytest

import qzo
from qzo.reports import memory
from qzo.training.loop import choose_layers
from tests.support import tiny


@pytest.mark.parametrize("blocks", [None, 1])
def test_what_is_predicted(blocks, tmp_path):
    folder = tiny.save_checkpoint(tmp_path)
    model = qzo.from_pretrained(folder, group_size=32, device="cpu")
    choose_layers(model, blocks)
    run = memory.Run(4, 16, directions=2)
    found = memory.predict_loaded(model, run)
    weights = sum(layer.codes.nbytes for layer in memory.layers(model, None).values())
    assert found["codes"] == pytest.approx(weights, rel=0.05)
    arenas = {id(layer.arena): layer.arena.data.nbytes for layer in memory.layers(model, None).values()}
    assert found["scales"] == pytest.approx(sum(arenas.values()), rel=0.05)
    assert found["total"] > found["codes"] + found["dense"] > 0
    if blocks is None:
        wanted = memory.predict(memory._checkpoint(options(folder), "int4", "cpu", model.dtype)[1], run, "cpu", "sm_90")
        assert found == wanted


def options(folder):
    return Namespace(model=str(folder), group_size=32, trust_remote_code=False)
