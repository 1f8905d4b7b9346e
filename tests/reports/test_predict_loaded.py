"""The memory of a model that is loaded is predicted as that of its file."""

from argparse import Namespace

import pytest

import qzo
from qzo.reports import memory, models
from qzo.training.loop import choose_layers
from tests.support import tiny
from tests.support.checkpoints import TYPES, write_gguf
from tests.support.paths import FIXTURES


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


def options(folder, group_size=32):
    return Namespace(model=str(folder), group_size=group_size, trust_remote_code=False)


@pytest.mark.parametrize(
    "name", ["gptqmodel-gptq-sym-g64-desc", "bnb-nf4", "hqq-own-g64", "aqlm-2x8-g8", "ct-w4a16-asym-g128-rtn", "m.gguf"]
)
def test_a_file_holds_what_the_loaded_model_does(name, tmp_path):
    """It is read a tensor at a time to predict; the model is as large as the one that from_pretrained makes."""
    path = FIXTURES / name if "." not in name else tmp_path / name
    if "." in name:
        write_gguf(path, TYPES.Q4_1)
    model = qzo.from_pretrained(path, device="cpu")
    forms = {layer: models.form_of(module) for layer, module in memory.layers(model, None).items()}
    _, empty = memory._checkpoint(options(path, None), "int4", "cpu", model.dtype)
    assert {layer: models.form_of(module) for layer, module in memory.layers(empty, None).items()} == forms
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in model.named_parameters()
    }
