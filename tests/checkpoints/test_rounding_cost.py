"""What rounding the scales to the file's dtype costs: reported by save_pretrained, measured on the model itself."""

import copy
import shutil

import pytest
import torch

import qzo
from qzo.checkpoints import rounding_cost
from tests.checkpoints.formats.test_compressed_groups import GROUPS, SCHEMES, write_compressed
from tests.checkpoints.formats.test_hqq import write as write_hqq
from tests.support.checkpoints import TYPES, quantized, scale_randomly, write_gguf
from tests.support.close import assert_same_bits
from tests.support.tiny import save_checkpoint

IDS = torch.arange(24).view(2, 12)
BATCH = {"input_ids": IDS, "labels": IDS}


def make_compressed(folder):
    write_compressed(folder, SCHEMES, GROUPS)
    return folder


def make_gguf(kind):
    def make(folder):
        folder.mkdir()
        write_gguf(folder / "m.gguf", kind)
        return folder

    return make


SOURCES = {
    "compressed-tensors": make_compressed,
    "hqq": write_hqq,
    "float": save_checkpoint,
    "gguf q4_0": make_gguf(TYPES.Q4_0),
    "gguf q4_1": make_gguf(TYPES.Q4_1),
    "gguf q8_0": make_gguf(TYPES.Q8_0),
}


few = pytest.mark.parametrize("model", ["compressed-tensors", "gguf q4_1"], indirect=True)


@pytest.fixture(params=SOURCES)
def model(request, tmp_path):
    return qzo.from_pretrained(SOURCES[request.param](tmp_path / "in"), device="cpu", group_size=32)


def test_the_loss_after_is_that_of_the_saved_model(model, tmp_path):
    scale_randomly(model)
    before = copy.deepcopy(model.state_dict())
    arena = next(iter(quantized(model).values())).arena.data.clone()
    report = qzo.save_pretrained(model, tmp_path / "out", BATCH)
    reloaded = qzo.from_pretrained(tmp_path / "out", device="cpu")
    assert set(report) == {"loss_before", "loss_after"}
    assert report["loss_before"] == float(qzo.losses(model, BATCH, 1))
    assert report["loss_after"] == pytest.approx(float(qzo.losses(reloaded, BATCH, 1)), rel=1e-6)
    assert 1e-7 < abs(report["loss_after"] - report["loss_before"]) < 2e-2  # a half moves by 2^-12 or so
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert_same_bits(tensor, before[name])
    assert torch.equal(next(iter(quantized(model).values())).arena.data, arena)


def test_nothing_to_round_costs_nothing(model, tmp_path):
    report = qzo.save_pretrained(model, tmp_path / "out", BATCH)
    assert report["loss_before"] == report["loss_after"]


@few
def test_without_a_batch_nothing_is_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rounding_cost, "losses", None)
    assert qzo.save_pretrained(model, tmp_path / "out") is None


@few
def test_the_model_is_as_before_when_the_second_forward_fails(model, tmp_path, monkeypatch):
    scale_randomly(model)
    before, calls, real = copy.deepcopy(model.state_dict()), [], rounding_cost.losses

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("planted")
        return real(*arguments)

    monkeypatch.setattr(rounding_cost, "losses", fail_at_the_second)
    with pytest.raises(RuntimeError, match="planted"):
        qzo.save_pretrained(model, tmp_path / "out", BATCH)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name])
    assert not (tmp_path / "out").exists()


@few
def test_a_scale_that_does_not_fit_is_refused_before_anything_is_written(model, tmp_path):
    layer = next(iter(quantized(model).values()))
    layer.arena.data[0] = 1e9
    before = layer.arena.data.clone()
    with pytest.raises(ValueError, match="does not fit"):
        qzo.save_pretrained(model, tmp_path / "out", BATCH)
    assert torch.equal(layer.arena.data, before)
    assert not (tmp_path / "out").exists()


def test_the_source_may_not_have_changed(tmp_path):
    folder = make_compressed(tmp_path / "in")
    model = qzo.from_pretrained(folder, device="cpu")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="is gone"):
        qzo.save_pretrained(model, tmp_path / "out", BATCH)
