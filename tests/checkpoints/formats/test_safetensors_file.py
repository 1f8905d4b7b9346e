"""The safetensors container, beside the library's own: read, written, and damage that is refused in one line."""

import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qzo.checkpoints.formats import safetensors_file
from tests.support.close import assert_same_bits
from tests.support.fuzzing import SAFETENSORS, little_memory


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "its header cannot be read"),
        (b'{"a":' * 100_000, "its header cannot be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "its header cannot be read"),
        (b'{"a": {}, "a": {}}', "its header cannot be read"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"has 4 bytes, which are not F32 \[2\]"),
        (
            b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
            "the header's entry of tensor 'a' is damaged",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
            "the header's entry of tensor 'a' is damaged",
        ),
        (b'{"a\\nb": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', r"entry of tensor 'a\\nb' is damaged"),
        (
            b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387904, 4611686018427387904], "data_offsets": [0, 0]}}',
            "the header's entry of tensor 'a' is damaged",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
            b'"b": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]}}',
            "tensors a and b overlap",
        ),
    ],
)
def test_safetensors_refused(tmp_path, text, message):
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=message):
        safetensors_file.places(tmp_path / "x")


def test_a_header_longer_than_the_libraries_limit_is_not_read(tmp_path):
    with open(tmp_path / "x", "wb") as file:  # a sparse file: no disk is taken
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(1 << 30)
    with little_memory(), pytest.raises(ValueError, match="its header cannot be read"):
        safetensors_file.places(tmp_path / "x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "x is truncated: tensor a ends at byte"),
        (lambda data: data[:5], "x is not a whole safetensors file"),
        (lambda data: data[:100], "x is not a whole safetensors file"),
        (lambda data: data[:8] + b"[" + data[9:], "x is not a whole safetensors file"),
    ],
)
def test_a_file_that_is_cut_or_no_json(tmp_path, damage, message):
    (tmp_path / "x").write_bytes(damage(SAFETENSORS))
    with pytest.raises(ValueError, match=message):
        safetensors_file.places(tmp_path / "x")


# ------------------------------------------------------------------------------------- beside the library


def some_tensors():
    tensors = {code: torch.arange(6).to(dtype).view(2, 3) for code, dtype in safetensors_file.DTYPES.items()}
    return tensors | {"empty": torch.zeros(0, 5), "number": torch.tensor(3.0)}


def test_what_the_library_writes_is_read(tmp_path):
    save_file(some_tensors(), tmp_path / "x", {"format": "pt", "a": "b"})
    places = safetensors_file.places(tmp_path / "x")
    assert set(places) == set(some_tensors())
    for name, tensor in some_tensors().items():
        assert places[name][0] == (name if name in safetensors_file.DTYPES else "F32")
        assert_same_bits(safetensors_file.read(tmp_path / "x", places[name]), tensor)
    assert safetensors_file.metadata(tmp_path / "x") == {"format": "pt", "a": "b"}
    with pytest.raises(ValueError, match="x: a tensor of dtype 'F8_E4M3'; supported are F16, BF16,"):
        safetensors_file.read(tmp_path / "x", ("F8_E4M3", (1,), 8, 1))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_what_is_written_the_library_reads(tmp_path, metadata):
    """One tensor is made at a time, in the order of the file; each begins at a multiple of its element's size."""
    made, tensors = [], some_tensors()
    entries = [
        (name, t.dtype, t.shape, lambda name=name, t=t: (made.append(name), t)[1]) for name, t in tensors.items()
    ]
    safetensors_file.write(tmp_path / "x", entries, metadata)
    for name, tensor in load_file(tmp_path / "x").items():
        assert_same_bits(tensor, tensors.pop(name))
    assert not tensors
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == metadata
    places = safetensors_file.places(tmp_path / "x")
    assert made == list(places)
    for code, _, offset, _ in places.values():
        assert offset % safetensors_file.DTYPES[code].itemsize == 0
    assert safetensors_file.metadata(tmp_path / "x") == metadata
