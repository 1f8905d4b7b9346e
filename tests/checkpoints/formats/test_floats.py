"""Float folders: read as they are, copied into a new folder, and refused where they hold codes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from qzo.checkpoints.formats import floats
from tests.support import tiny
from tests.support.checkpoints import change_config
from tests.support.gptq_checkpoints import load
from tests.support.paths import FIXTURES


@pytest.mark.parametrize(
    "name", ["gptqmodel-gptq-sym-g128", "ct-w4a16-sym-g128-gptq", "autoround-awq-zp-g128", "bnb-nf4", "aqlm-2x8-g8"]
)
def test_codes_without_a_config_are_refused(tmp_path, name):
    """The files are whole: to fetch them again would change nothing."""
    shutil.copytree(FIXTURES / name, tmp_path / "in", ignore=shutil.ignore_patterns("quant*_config.json"))
    change_config(tmp_path / "in", lambda content: content.pop("quantization_config"))
    with pytest.raises(
        ValueError,
        match=r"holds the quantized tensor model\.layers\..* has no quantization_config "
        r"that tells how to read it; add the one that this model is published with",
    ) as caught:
        load(tmp_path / "in")
    assert "fetch" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["x.codebooks", "x.codes"], "x.codebooks"),  # AQLM's
        (["x.codebooks"], None),  # a model of its own with a tensor of that name
        (["x.weight", "x.weight.absmax"], "x.weight.absmax"),
        (["x.weight", "x.weight_scale"], None),
        (["x.SCB"], "x.SCB"),
    ],
)
def test_what_counts_as_codes(tmp_path, names, refused):
    folder = tiny.save_checkpoint(tmp_path / "in")
    save_file({name: torch.ones(2) for name in names}, folder / "more.safetensors")
    if refused is None:
        assert floats.FORMAT.open(folder, None, False).quantization is None
    else:
        with pytest.raises(ValueError, match=f"in holds the quantized tensor {refused}, and its config.json has no"):
            floats.FORMAT.open(folder, None, False)


def test_an_open_folder_and_what_a_new_one_takes_over(tmp_path):
    folder = tiny.save_checkpoint(tmp_path / "in")
    found = floats.FORMAT.open(folder, None, False)
    size = (folder / "config.json").stat().st_size
    assert (found.path, found.dtype, found.files) == (folder, torch.float32, ((folder / "config.json", size),))
    assert not found.quantized
    read = {name: value for name, value, _ in found.read(torch.bfloat16)}
    assert "model.norm.weight" in read
    assert all(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in read.values())
    (tmp_path / "out").mkdir()
    floats.FORMAT.take_along(folder, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").exists()
    assert not (tmp_path / "out/model.safetensors").exists()
    content = json.loads((folder / "config.json").read_text())
    assert floats.FORMAT.new_config(folder, found.config, torch.float16) == content | {"dtype": "float16"}
    assert not floats.FORMAT.for_servers("model.norm.weight")
