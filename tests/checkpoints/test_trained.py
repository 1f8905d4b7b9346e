"""A model's layers as they are saved: by the names of their files, and only while their numbers are finite."""

import dataclasses

import pytest
import torch

import qzo
from qzo.checkpoints.source import source_of
from qzo.checkpoints.trained import Trained
from tests.support import tiny
from tests.support.aqlm_checkpoints import folder_of

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return qzo.from_pretrained(tiny.save_checkpoint(tmp_path_factory.mktemp("float")), device="cpu", group_size=32)


@pytest.fixture
def renamed(model):
    """As if the files called the model's layers old.*, and its one ownerless tensor `gain`."""
    names = (("old.mlp.up", UP), ("gain", "model.gain"))
    source = source_of(model)
    assert source is not None
    return Trained(model, dataclasses.replace(source, names=names))


def test_names_in_the_files_and_in_new_ones(renamed):
    assert renamed.inside("old.mlp.up") == UP
    assert renamed.inside("model.norm") == "model.norm"
    assert renamed.renamed("old.mlp.up.weight_scale") == f"{UP}.weight_scale"
    assert renamed.renamed("model.norm.weight") == "model.norm.weight"
    assert renamed.renamed("gain") == "model.gain"
    assert renamed.outside(UP) == UP


def test_a_layer_is_found_by_its_name_in_the_files(renamed, model):
    layer = model.get_submodule(UP)
    for name in ("old.mlp.up.weight", f"{UP}.weight"):
        assert torch.equal(renamed.find(name).scales, layer.packed().scales)
    assert renamed.find("lm_head.weight") is None  # dense
    assert renamed.find("a.head.that.is.not.there.weight") is None


def test_every_layer_and_every_linear_that_stays_dense(model):
    trained = Trained(model, None)
    packed = trained.packed()
    assert len(packed) == 14
    assert torch.equal(packed[UP].unpacked(), model.get_submodule(UP).packed().unpacked())
    assert trained.dense_linears() == ["lm_head"]
    assert trained.inside(UP) == UP


def test_a_scale_that_is_not_finite_is_named(model):
    layer = model.get_submodule(UP)
    scales = layer.read_scales()
    bad = scales.clone()
    bad[1, 2] = torch.inf
    layer.arena.write(layer.arena_name, bad)
    try:
        for give in (lambda: Trained(model, None).packed(), lambda: Trained(model, None).find(f"{UP}.weight")):
            with pytest.raises(
                ValueError, match=rf"^{UP}: a scale is NaN or infinite; the run has diverged, nothing was"
            ):
                give()
    finally:
        layer.arena.write(layer.arena_name, scales)


def test_a_codebook_that_is_not_finite_is_named(tmp_path):
    model = qzo.from_pretrained(folder_of(tmp_path / "source")[0], device="cpu")
    model.get_submodule(UP).codebooks[1, 7, 3] = torch.nan
    with pytest.raises(ValueError, match=rf"^{UP}: a number of a codebook is NaN or infinite"):
        Trained(model, None).packed()
