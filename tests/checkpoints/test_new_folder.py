"""A checkpoint in a new folder: in which format, in which types, and when nothing is written."""

import json

import pytest
import torch
from safetensors.torch import load_file

import qzo
from qzo.checkpoints import new_folder
from qzo.checkpoints.formats import TARGETS
from qzo.checkpoints.source import Source, source_of
from tests.support import tiny
from tests.support.aqlm_checkpoints import folder_of


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("float"))


def load(path, **options):
    return qzo.from_pretrained(path, device="cpu", group_size=32, **options)


def known_source(model: torch.nn.Module) -> Source:
    """Of a model that was loaded from files."""
    source = source_of(model)
    assert source is not None
    return source


@pytest.mark.parametrize(
    ("table", "method", "dtype"), [(None, "compressed-tensors", torch.float16), ("nf4", "bitsandbytes", torch.float32)]
)
def test_what_a_model_without_a_format_is_saved_as(floats, tmp_path, table, method, dtype):
    model = load(floats, table=table)
    assert new_folder.own_target(model) is TARGETS[method]
    assert new_folder.own_config(model)["quant_method"] == method
    weight = model.model.layers[0].mlp.up_proj.packed()
    assert new_folder.new_scale_dtype(weight) == dtype
    new_folder.write_new(model, known_source(model), tmp_path / "out", TARGETS[method])
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {t.dtype for name, t in stored.items() if name.endswith((".absmax", "_scale"))} == {dtype}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == new_folder.own_config(model)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (floats / "tokenizer.json").read_bytes()
    again = qzo.from_pretrained(tmp_path / "out", device="cpu")
    up = again.model.layers[0].mlp.up_proj.packed()
    assert torch.equal(up.unpacked(), weight.unpacked())
    assert torch.equal(up.scales, weight.scales.to(dtype).float())


@pytest.mark.parametrize(
    ("value", "dtype", "wanted"),
    [
        (torch.tensor([1.0, 0.5]), torch.float16, torch.float16),
        (torch.tensor([1.0, 1e-9]), torch.float16, torch.float32),
        (torch.tensor([1.0, 70000.0]), torch.float16, torch.float32),
        (torch.tensor([1.0]).half(), torch.float32, torch.float32),
        (torch.tensor([1.0009765625]).half(), torch.bfloat16, torch.float16),
        (torch.tensor([7]), torch.float16, torch.int64),
    ],
)
def test_a_tensor_is_stored_in_a_type_that_holds_it(value, dtype, wanted):
    assert new_folder.stored_dtype(value, dtype) == wanted


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("there", "written", "refused"),
    [
        (INDEX, {"model.safetensors"}, INDEX),
        ("model.safetensors", {INDEX, "a.safetensors"}, "model.safetensors"),
        ("model.safetensors", {"model.safetensors"}, None),
        (INDEX, {INDEX, "model.safetensors"}, None),
        ("notes", {"model.safetensors"}, None),
        (INDEX, {"m.gguf"}, None),
    ],
)
def test_weights_that_readers_would_take_for_these(tmp_path, there, written, refused):
    (tmp_path / there).write_text("{}")
    if refused is None:
        new_folder.check_free(tmp_path, written)
    else:
        with pytest.raises(ValueError, match=f"holds the {refused} of another checkpoint, beside which readers would"):
            new_folder.check_free(tmp_path, written)


def test_nothing_is_written_that_the_format_cannot_hold(tmp_path):
    model = qzo.from_pretrained(folder_of(tmp_path / "source")[0], device="cpu")
    with pytest.raises(ValueError, match="has codes that stand for vectors"):
        new_folder.write_new(model, known_source(model), tmp_path / "out", TARGETS["gptq"])
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_overwritten(floats, tmp_path):
    model = load(floats)
    (tmp_path / "link").symlink_to(floats)
    before = {path.name: path.stat().st_mtime_ns for path in floats.iterdir()}
    for folder in (floats, tmp_path / "link"):
        with pytest.raises(ValueError, match="is where this model was loaded from; the source is never overwritten"):
            new_folder.write_new(model, known_source(model), folder, TARGETS["gptq"])
    assert {path.name: path.stat().st_mtime_ns for path in floats.iterdir()} == before
