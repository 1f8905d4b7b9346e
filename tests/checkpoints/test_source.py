"""Where a model is and where it came from: paths that are found, sources that are still what they were."""

import copy
import shutil

import pytest
import torch

import qzo
from qzo.checkpoints import source
from qzo.checkpoints.formats import FORMATS
from tests.support import tiny
from tests.support.checkpoints import write_gguf
from tests.support.paths import FIXTURES

CT = FIXTURES / "ct-w4a16-sym-g64-bias-tied"


def load(path):
    return qzo.from_pretrained(path, device="cpu")


@pytest.mark.parametrize("name", ["m.gguf", "ct/model.safetensors", "ct/config.json"])
def test_source_changed_or_gone(tmp_path, name):
    write_gguf(tmp_path / "m.gguf")
    shutil.copytree(CT, tmp_path / "ct")
    model, file = load(tmp_path / name.split("/")[0]), tmp_path / name
    with open(file, "ab") as handle:
        handle.write(b" ")
    with pytest.raises(ValueError, match=rf"{file.name} had \d+ bytes when this model was loaded"):
        qzo.save_pretrained(model, tmp_path / "out")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file.name}, which this model was loaded from, is gone"):
        qzo.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["./nothing", "/no/such/model", "nothing.gguf", "nothing", "a/b/c"])
def test_no_such_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", None)  # nothing is asked of the Hub
    with pytest.raises(FileNotFoundError, match=f"no such file or folder: {name}; give a checkpoint folder, a .gguf"):
        source.locate(name)


def test_a_hub_id_that_cannot_be_fetched_says_why(monkeypatch):
    def offline(name, allow_patterns):
        raise OSError("cannot reach\nthe Hub")

    monkeypatch.setattr(source, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"^no such .* Hub id \(a/model could not be fetched: cannot reach\)$"):
        source.locate("a/model")


def test_a_hub_id_is_the_folder_that_is_fetched(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(source, "snapshot_download", lambda name, allow_patterns: asked.append(name) or str(tmp_path))
    assert source.locate("a/model") == tmp_path
    assert asked == ["a/model"]


def test_folders_without_one_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"neither config\.json with weights nor a \.gguf file"):
        source.locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a config\.json and no weights: fetch its"):
        source.locate(tmp_path)
    (tmp_path / "a.gguf").write_text("")
    assert source.locate(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_text("")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\); give the path of one"):
        source.locate(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    assert source.locate(tmp_path) == tmp_path
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"a\.txt is a file but no \.gguf"):
        source.locate(tmp_path / "a.txt")


def test_a_link_keeps_its_own_name(tmp_path):
    (tmp_path / "blob").write_text("")
    (tmp_path / "named.gguf").symlink_to(tmp_path / "blob")
    assert source.locate(tmp_path / "named.gguf") == tmp_path / "named.gguf"


def test_what_saving_needs_to_know(tmp_path):
    """A name stands for the format, so that a copy or a pickle of a model has it too."""
    checkpoint = source.open_checkpoint(CT)
    found = source.Source.of(checkpoint)
    assert (found.method, found.path, found.dtype, found.names) == ("compressed-tensors", CT, torch.float16, ())
    assert found.format is found.copied is FORMATS["compressed-tensors"]
    assert found.files == tuple((file, file.stat().st_size) for file in (CT / "config.json", CT / "model.safetensors"))
    assert checkpoint.quantization is not None
    assert checkpoint.quantization["quant_method"] == "compressed-tensors"
    floats = source.Source.of(source.open_checkpoint(tiny.save_checkpoint(tmp_path / "float")))
    assert floats.format is FORMATS["float"]
    assert floats.copied is None
    model = torch.nn.Linear(1, 1)
    assert source.source_of(model) is None
    source.set_source(model, found)
    assert source.source_of(copy.deepcopy(model)) == found
