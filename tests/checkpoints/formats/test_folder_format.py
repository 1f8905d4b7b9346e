"""Formats that are a folder and a config.json: what opening one tells, and a format made of a few functions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import qzo
from qzo.checkpoints.formats import folder_format
from qzo.nn.weights import PackedWeight
from tests.support.checkpoints import write_compressed
from tests.support.close import assert_same_bits
from tests.support.fuzzing import little_memory


@pytest.mark.parametrize("depth", [10**6, 2**40])
def test_more_layers_than_the_files_can_hold(tmp_path, depth):
    write_compressed(
        tmp_path,
        {"": (4, 32, True)},
        {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "strategy": "group"}}},
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": depth, "layer_types": None}))
    with little_memory(), pytest.raises(ValueError, match=f"num_hidden_layers is {depth}, the files have"):
        qzo.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(("held", "fits"), [(1024, True), (1023, False)])
def test_a_layer_takes_a_few_hundred_bytes_at_the_least(tmp_path, held, fits):
    config = LlamaConfig(num_hidden_layers=2)
    if fits:
        folder_format.check_depth(config, tmp_path, held)
    else:
        with pytest.raises(ValueError, match=r"config\.json: num_hidden_layers is 2, the files have 1023 bytes in all"):
            folder_format.check_depth(config, tmp_path, held)


# ------------------------------------------------------------------------------------- a format of a few functions


def check(quantization, where):
    if quantization["bits"] != 4:
        raise ValueError(f"{where}: {quantization['bits']} bits")


def packer(quantization, where):
    def make(layer, parts):
        check(quantization, where)
        return PackedWeight.from_codes(parts["codes"], parts["scale"].float().T.contiguous())

    return make


FORMAT = folder_format.gathered("made", check, packer, ("codes", "scale"), "scale", transposed=True)


@pytest.fixture
def folder(tmp_path):
    """One layer x with scales [N, G] in float16, and a norm."""
    path = tmp_path / "in"
    path.mkdir()
    codes = torch.arange(128).remainder(16).to(torch.uint8).view(2, 64)
    scale = torch.tensor([[0.5, -1.0], [0.25, 2.0]]).half()
    save_file({"x.codes": codes, "x.scale": scale, "norm": torch.ones(600)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(LlamaConfig(num_hidden_layers=1, dtype="bfloat16").to_dict()))
    (path / "tokenizer.json").write_text("{}")
    return path


def test_an_open_folder(folder):
    found = FORMAT.open(folder, {"bits": 4}, False)
    assert (found.format, found.quantized, found.dtype) == (FORMAT, True, torch.bfloat16)
    assert found.files == tuple((f, f.stat().st_size) for f in (folder / "config.json", folder / "model.safetensors"))
    entries = {name: value for name, value, _ in found.read(torch.float16)}
    assert set(entries) == {"x.weight", "norm"}
    weight, norm = entries["x.weight"], entries["norm"]
    assert isinstance(weight, PackedWeight)
    assert weight.group_size == 32
    assert isinstance(norm, torch.Tensor)
    assert norm.dtype == torch.float16
    with pytest.raises(ValueError, match="in: 8 bits"):
        FORMAT.open(folder, {"bits": 8}, False)
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    assert FORMAT.open(folder, {"bits": 4}, False).dtype == torch.float16


def test_a_copy_has_the_new_scales_as_the_file_rounds_them(folder, tmp_path):
    [weight] = [value for name, value, _ in FORMAT.weights(folder, {"bits": 4}, None) if name == "x.weight"]
    assert isinstance(weight, PackedWeight)
    new = weight.scales * 1.0001
    weight = PackedWeight.from_codes(weight.unpacked(), new)
    find = {"x.weight": weight}.get
    out = tmp_path / "out"
    out.mkdir()
    FORMAT.save(folder, out, find)
    assert_same_bits(load_file(out / "model.safetensors")["x.scale"], new.half().T.contiguous())
    [(layer, rounded, zeros)] = FORMAT.saved_scales(folder, find)
    assert (layer, zeros) == ("x", None)
    assert_same_bits(rounded.contiguous(), new.half().float())
    assert (out / "tokenizer.json").exists()
    assert FORMAT.new_config(folder, None, torch.float16) == json.loads((folder / "config.json").read_text())
    assert not FORMAT.for_servers("x.scale")
