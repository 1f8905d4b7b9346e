"""Folders of safetensors files: where tensors lie, dense ones in, new scales out, and what travels along."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from qzo.checkpoints.formats import folder as folders
from qzo.checkpoints.formats import safetensors_file
from qzo.nn.weights import PackedWeight
from tests.support.close import assert_same_bits

INDEX = "model.safetensors.index.json"


@pytest.fixture
def shards(tmp_path):
    """A folder of two shards, beside a file that is none of its own."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, file in (("a", "1.safetensors"), ("b", "2.safetensors")):
        save_file({name: torch.ones(2)}, folder / file)
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")

    def write(weight_map):
        content = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
        (folder / INDEX).write_bytes(content)
        return folder

    return write


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, "names '../outside.safetensors', which is no file of this folder"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd', which is no file of this folder"),
        ({"a": "x/../1.safetensors"}, "which is no file of this folder"),
        ({"a": ".."}, "is missing or no file"),
        ({"a": "pipe"}, "is missing or no file"),
        ({"a": "loop"}, "is missing or no file"),
        ({"a": "3.safetensors"}, "3.safetensors is missing or no file, though model.safetensors.index.json names it"),
        ({"a": "1.safetensors\n"}, "which is no file of this folder"),
        ({"a": "1.safetensors", "c": "2.safetensors"}, "2.safetensors holds no tensor 'c', though"),
        ({"a": "2.safetensors", "b": "1.safetensors"}, "holds no tensor 'a', though"),
        ({"a": "1.safetensors", "b": "copy.safetensors"}, "tensor a is in 1.safetensors and in copy.safetensors"),
        ({"a": 1}, "it has no weight_map"),
        ([], "it has no weight_map"),
        ({}, "it has no weight_map"),
        (b"[", "is not JSON: Expecting value"),
        (b"[]", "holds a JSON list, not an object"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON: it is nested too deeply"),
    ],
)
def test_shards_refused(shards, weight_map, message):
    folder = shards(weight_map)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "copy.safetensors")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        folders.tensor_places(folder)
    assert "\n" not in str(error.value)


def test_a_shard_may_be_a_link(shards, tmp_path):
    """The download cache of the Hub is made of links."""
    folder = shards({"a": "linked.safetensors", "b": "2.safetensors"})
    (folder / "linked.safetensors").symlink_to(tmp_path / "outside.safetensors")
    places = folders.tensor_places(folder)
    assert {name: file.name for name, (file, _) in places.items()} == {"a": "linked.safetensors", "b": "2.safetensors"}


def test_without_an_index_every_file_counts(tmp_path):
    """But model.safetensors alone where it is there: others beside it are of older runs."""
    with pytest.raises(FileNotFoundError, match=r"holds a config\.json but no safetensors file"):
        folders.tensor_places(tmp_path)
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    assert {name: file.name for name, (file, _) in folders.tensor_places(tmp_path).items()} == {
        "a": "a.safetensors",
        "b": "b.safetensors",
    }
    save_file({"c": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(folders.tensor_places(tmp_path)) == ["c"]


# ---------------------------------------------------------------------------------------------- layers in, scales out


@pytest.fixture
def layer(tmp_path):
    """(a folder with a layer x of two parts and a norm, its tensors)."""
    folder = tmp_path / "layer"
    folder.mkdir()
    tensors = {
        "x.codes": torch.arange(32).remainder(16).to(torch.uint8).view(2, 16),
        "x.scale": torch.tensor([[0.5], [0.25]], dtype=torch.float16),
        "x.bias": torch.tensor([1.0, 2.0]).bfloat16(),
        "norm.weight": torch.tensor([1.0, 1.5], dtype=torch.float16),
        "steps": torch.tensor([7]),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def packed(name, parts):
    """A layer of test_folder's own format; the scales are [N, G] in its file."""
    assert name == "x"
    return PackedWeight.from_codes(parts["codes"], parts["scale"].float().T.contiguous())


def test_layers_are_made_of_their_parts_and_the_rest_is_dense(layer):
    folder, tensors = layer
    read = {
        name: (value, where)
        for name, value, where in folders.read_weights(folder, torch.float32, ("codes", "scale", "zeros"), packed)
    }
    assert set(read) == {"x.weight", "x.bias", "norm.weight", "steps"}
    assert read["x.weight"][1] == "x.codes in model.safetensors"
    weight = read["x.weight"][0]
    assert isinstance(weight, PackedWeight)
    assert torch.equal(weight.unpacked(), tensors["x.codes"])
    assert read["norm.weight"][1] == "norm.weight in model.safetensors"
    assert_same_bits(read["norm.weight"][0], tensors["norm.weight"].float())
    assert_same_bits(read["steps"][0], tensors["steps"])
    stored = {name: value for name, value, _ in folders.read_dense(folder, None)}
    for name, tensor in tensors.items():
        assert_same_bits(stored[name], tensor)


def test_what_is_wrong_with_a_layer_is_told_with_its_place(layer):
    def refuse(name, parts):
        raise ValueError(f"{sorted(parts)} do not fit")

    with pytest.raises(ValueError, match=r"^x\.codes in model\.safetensors: \['codes', 'scale'\] do not fit$"):
        list(folders.read_weights(layer[0], None, ("codes", "scale", "zeros"), refuse))


@pytest.mark.parametrize("transposed", [False, True])
def test_scales_are_found_by_name_and_written_in_their_place(layer, tmp_path, transposed):
    folder, tensors = layer
    new = torch.tensor([[3.0, 5.0]])  # [G, N]
    weight = PackedWeight.from_codes(tensors["x.codes"], new)
    if not transposed:  # a file with [G, N]
        tensors["x.scale"] = tensors["x.scale"].T.contiguous()
        save_file(tensors, folder / "model.safetensors")
    changes = list(folders.scale_changes(folder, {"x.weight": weight}.get, "scale", transposed))
    assert [(name, scales.dtype, file.name) for name, scales, file, _ in changes] == [
        ("x", torch.float16, "model.safetensors")
    ]
    (tmp_path / "staging").mkdir()
    folders.save_scales(folder, tmp_path / "staging", changes)
    found = {name: safetensors_file.read(*at) for name, at in folders.tensor_places(tmp_path / "staging").items()}
    assert_same_bits(found.pop("x.scale"), (new.T if transposed else new).half().contiguous())
    for name, tensor in found.items():
        assert_same_bits(tensor, tensors[name])
    assert not list(folders.scale_changes(folder, lambda name: None, "scale"))


def test_dense_entries_and_dtypes_of_scales(layer):
    folder, tensors = layer
    found = {n: (dtype, shape, make) for n, dtype, shape, make in folders.dense_entries(folder, lambda n: n[0] != "x")}
    assert set(found) == {"norm.weight", "steps"}
    dtype, shape, make = found["norm.weight"]
    assert (dtype, tuple(shape)) == (torch.float16, (2,))
    assert_same_bits(make(), tensors["norm.weight"])
    assert folders.scale_dtypes(folder, "scale") == {"x": torch.float16}


def test_what_is_copied(tmp_path):
    """Everything into a copy, what holds no weights into a new folder; nothing hidden, and no older config."""
    source, everything, beside = tmp_path / "in", tmp_path / "all", tmp_path / "beside"
    (source / "sub").mkdir(parents=True)
    names = {"tokenizer.json", "LICENSE", "sub/vocab.txt", "model.safetensors", "pytorch_model.bin", "x.gguf"}
    names |= {"model.safetensors.index.json", *folders.CONFIGS}
    for name in (*names, ".gitattributes", ".qzo-1/x"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    for copy, target in ((folders.copy_all, everything), (folders.copy_companions, beside)):
        target.mkdir()
        copy(source, target)
    assert {str(p.relative_to(everything)) for p in everything.rglob("*") if p.is_file()} == names
    assert {str(p.relative_to(beside)) for p in beside.rglob("*")} == {"tokenizer.json", "LICENSE"}
    assert (beside / "LICENSE").read_text() == "LICENSE"
