"""Damaged copies of what the tools themselves have written: each is read, or refused in one line.

Faults and files made on the spot: bench/fuzz, which tests/bench/fuzz runs.
"""

import json
import random
import tracemalloc
import warnings

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from qzo.bench.fuzz import mutations
from qzo.bench.fuzz.runs import refusal, write
from qzo.checkpoints.formats import of_method, safetensors_file
from qzo.checkpoints.formats.folder_format import FolderFormat
from qzo.checkpoints.formats.torch_file import TorchFile
from qzo.system.as_json import parsed
from tests.support.fuzzing import FIXTURES, little_memory

LAYER = "model.layers.0.self_attn.v_proj"
QUANTIZED = sorted(
    path.parent.name for path in FIXTURES.glob("*/config.json") if "quantization_config" in json.loads(path.read_text())
)


def small_folder(source):
    """(quantization_config, tensors) of one layer and one norm of a real checkpoint."""
    tensors = {
        name: tensor
        for name, tensor in load_file(source / "model.safetensors").items()
        if name.startswith(LAYER) or name == "model.norm.weight"
    }
    return json.loads((source / "config.json").read_text())["quantization_config"], tensors


def read(form, folder, text):
    said = parsed(text)
    if not isinstance(said, dict):
        raise ValueError("no quantization_config")
    return list(form.weights(folder, said, torch.half))


@pytest.mark.parametrize("fixture", QUANTIZED)
def test_folders(tmp_path, fixture):
    draws, (config, tensors) = random.Random(fixture), small_folder(FIXTURES / fixture)
    form = of_method(config["quant_method"], fixture)
    assert isinstance(form, FolderFormat)
    messages = []
    for _ in range(100):
        said = mutations.text(config, draws) if draws.random() < 0.4 else json.dumps(config)
        write(tmp_path, {"model.safetensors": save(mutations.tensors(tensors, draws))})
        with little_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            messages.append(refusal(lambda folder, text=said: read(form, folder, text), tmp_path))
    assert messages.count(None) > 5
    assert len(set(messages)) > 10


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda path: save_file({"a": torch.zeros(1 << 20)}, path), safetensors_file.places),
        (lambda path: torch.save({"a": torch.zeros(1 << 20)}, path), TorchFile),
    ],
)
def test_a_header_takes_no_more_than_its_own_bytes(tmp_path, make, read):
    make(tmp_path / "x")
    read(tmp_path / "x")  # imports
    tracemalloc.start()
    try:
        read(tmp_path / "x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18
