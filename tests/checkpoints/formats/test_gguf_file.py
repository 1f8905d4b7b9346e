"""The GGUF container: header and directory as the gguf package reads them, and damage that is refused in one line."""

import struct

import gguf
import numpy as np
import pytest
import torch

from qzo.checkpoints.formats.gguf_file import GGUFFile
from tests.support.checkpoints import TYPES, blocks, write_gguf
from tests.support.close import assert_same_bits
from tests.support.fuzzing import little_memory
from tests.support.paths import FIXTURES

FIXTURE = FIXTURES / "gguf-q4_1"


def test_header_equals_gguf_reader():
    ours, theirs = GGUFFile(FIXTURE / "model.gguf"), gguf.GGUFReader(FIXTURE / "model.gguf")
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert [(t.name, t.type, list(t.shape), t.offset, t.nbytes) for t in ours.tensors.values()] == [
        (t.name, t.tensor_type, t.shape.tolist()[::-1], t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def test_header_strings_and_arrays(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("tokens", ["a", "ä", "", "\n"])
    writer.add_array("kinds", [1, -2, 3])
    writer.add_bool("flag", True)
    writer.add_float64("wide", 0.1)
    writer.add_custom_alignment(64)
    writer.add_tensor("x", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.metadata["tokens"] == ["a", "ä", "", "\n"]
    assert file.metadata["kinds"] == [1, -2, 3]
    assert file.metadata["flag"] is True
    assert file.metadata["wide"] == 0.1
    info = file.tensors["x"]
    assert file.dense(info, torch.float32).tolist() == [0, 1, 2, 3, 4]


def gguf_header(tensors=0, keys=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


def gguf_string(text):
    return struct.pack("<Q", len(text)) + text


def gguf_tensor(name, dims, kind=0, offset=0):
    return gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gguf_header(2**60), "is truncated"),
        (gguf_header(0, 2**60), "is truncated"),
        (gguf_header(0, 1, struct.pack("<Q", 2**60)), "is truncated"),
        (gguf_header(0, 1, gguf_string(b"a") + struct.pack("<IIQ", 9, 0, 2**60)), "is truncated"),
        (
            gguf_header(0, 1, gguf_string(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
            "metadata of unknown type 9",
        ),
        (gguf_header(0, 2, (gguf_string(b"a") + struct.pack("<II", 4, 1)) * 2), "metadata 'a' is there twice"),
        (gguf_header(0, 1, gguf_string(b"general.alignment") + struct.pack("<II", 4, 0)), "general.alignment is 0"),
        (gguf_header(1, 0, gguf_tensor(b"a", [1] * 5)), "has 5 dimensions"),
        (gguf_header(1, 0, gguf_tensor(b"a", [0])), "none of them 0"),
        (gguf_header(1, 0, gguf_tensor(b"a", [2**62, 2**62])), "is truncated"),
        (gguf_header(2, 0, gguf_tensor(b"a", [2]) * 2), "tensor 'a' is there twice"),
        (gguf_header(2, 0, gguf_tensor(b"a", [2]) + gguf_tensor(b"b", [2], offset=4)), "tensors a and b overlap"),
    ],
)
def test_gguf_refused(tmp_path, data, message):
    (tmp_path / "x").write_bytes(data + bytes(64 if "truncated" not in message else 0))
    with little_memory(), pytest.raises(ValueError, match=message):
        GGUFFile(tmp_path / "x")


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_other_versions_are_refused(tmp_path, version):
    data = bytearray(gguf_header())
    data[4:8] = struct.pack("<I", version)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=f"GGUF version {version}; only 2 and 3, little-endian, can be read"):
        GGUFFile(tmp_path / "x")


@pytest.mark.parametrize(
    ("kind", "dims", "message"),
    [
        (23, [256], "tensor a is IQ4_XS; types that can be read are F32, F16, BF16, Q4_0,"),
        (99, [256], "tensor a is type 99; types that can be read"),
        (2, [33, 2], r"tensor a has shape \[2, 33\], which Q4_0 blocks of 32 do not fill"),
        (0, [], r"tensor a has shape \[\], which F32 blocks of 1 do not fill"),
    ],
)
def test_tensors_that_cannot_be_read(tmp_path, kind, dims, message):
    (tmp_path / "x").write_bytes(gguf_header(1, 0, gguf_tensor(b"a", dims, kind)) + bytes(4096))
    with pytest.raises(ValueError, match=message):
        GGUFFile(tmp_path / "x")


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (2, "not a GGUF file"),
        (20, "truncated: its header"),
        (900, "truncated: its header"),
        (-1, "truncated: tensor blk"),
    ],
)
def test_truncated(tmp_path, length, message):
    write_gguf(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:length] if length > 0 else data[:-2000])
    with pytest.raises(ValueError, match=message):
        GGUFFile(tmp_path / "cut.gguf")


# ------------------------------------------------------------------------------------- tensors


@pytest.fixture
def tensors(tmp_path):
    """(the file, its float16 matrix of more than a block of rows, its Q8_0 one as floats)."""
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(40, 65536)).astype(np.float16)  # 16 rows a block
    raw = blocks((6, 64), TYPES.Q8_0, rng)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("wide", wide)
    writer.add_tensor("codes", raw, raw_dtype=TYPES.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    floats = torch.from_numpy(gguf.dequantize(raw, TYPES.Q8_0).astype(np.float32))
    return GGUFFile(tmp_path / "t.gguf"), torch.from_numpy(wide), floats, raw


def test_bytes_and_blocks(tensors):
    file, _, _, raw = tensors
    info = file.tensors["codes"]
    assert (info.type_name, info.quantized, info.shape, info.nbytes) == ("Q8_0", True, (6, 64), 6 * 2 * 34)
    assert not file.tensors["wide"].quantized
    data = file.raw(info)
    assert data.numpy().tobytes() == raw.tobytes()
    assert info.blocks(data).shape == (6, 2, 34)


def test_dense_tensors_are_read_in_blocks_of_rows_in_any_order(tensors):
    file, wide, floats, _ = tensors
    order = torch.randperm(40)
    assert_same_bits(file.dense(file.tensors["wide"], torch.float32, order), wide.float()[order])
    assert_same_bits(file.dense(file.tensors["wide"], torch.bfloat16), wide.bfloat16())
    assert_same_bits(file.dense(file.tensors["codes"], torch.float32), floats)


def test_what_is_taken_off_is_taken_off_in_float32(tensors):
    """Gemma's norms are stored plus one: 1.0001 less 1 is nothing in 16 bits."""
    file, _, floats, _ = tensors
    assert_same_bits(file.dense(file.tensors["codes"], torch.float16, minus=1.0), (floats - 1).half())
