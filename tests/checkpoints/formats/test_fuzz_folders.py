"""Damaged folders: indexes of shards and configs, each refused in one line (fuzzing.py)."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

import qzo
from qzo.checkpoints.formats import folder as folders
from tests.support.checkpoints import write_compressed
from tests.support.fuzzing import SAFETENSORS, little_memory, mutated, outcome, renew

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
        renew(folder / INDEX, content)
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


def test_index_bytes(shards):
    rng, weight_map = random.Random(5), {"a": "1.safetensors", "b": "2.safetensors"}
    text = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    messages = [
        outcome(lambda data=data: folders.tensor_places(shards(data)))
        for data in (mutated(text, rng, len(text)) for _ in range(1000))
    ]
    assert messages.count(None) > 20
    assert len(set(messages)) > 30


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"[]", "holds a JSON list"),
        (b"3", "holds a JSON int"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON: it is nested too deeply"),
        (b'{"quantization_config": []}', "names no quant_method"),
        (b'{"quantization_config": "x"}', "names no quant_method"),
        (b'{"quantization_config": {"quant_method": ["gptq"]}}', "names no quant_method"),
        (
            b'{"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors"}}',
            "has no config_groups",
        ),
    ],
)
def test_configs_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    with pytest.raises(ValueError, match=message) as error:
        qzo.from_pretrained(tmp_path, device="cpu")
    assert "\n" not in str(error.value)


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
