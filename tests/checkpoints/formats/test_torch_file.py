"""torch.save's container: what is read without being run, and files that are patched in place."""

import struct
import zipfile
import zlib
from typing import Any

import pytest
import torch

from qzo.checkpoints.formats.torch_file import TorchFile
from tests.support.close import assert_same_bits


@pytest.mark.parametrize("written_with", ["descriptor", "local header"])
def test_checksums_of_both_kinds_of_record(tmp_path, written_with):
    """torch puts the CRC-32 behind the bytes, zipfile before them; the patch follows either."""
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(4.0), "b": torch.zeros(3)}, path)
    if written_with == "local header":
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
    file = TorchFile(path)
    offset, _ = file.place(file.content["a"], "a")
    patched = bytearray(path.read_bytes())
    for at, chunk in file.patches([(offset + 4, b"\0\0\0\0")]):
        patched[at : at + len(chunk)] = chunk
    path.write_bytes(patched)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    if written_with == "descriptor":
        assert patched[offset + 16 : offset + 24] == b"PK\x07\x08" + struct.pack(
            "<I", zlib.crc32(patched[offset : offset + 16])
        )
    assert torch.load(path, weights_only=True)["a"].tolist() == [0, 0, 2, 3]
    assert TorchFile(path).read(TorchFile(path).content["a"], "a").tolist() == [0, 0, 2, 3]


def test_bytes_that_an_entry_does_not_hold_are_not_read(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data[:4] if name.endswith("data/0") else data)
    file = TorchFile(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"a in x\.pt: the bytes of torch\.float32 \[4\] are not where torch\.save"):
        file.read(file.content["a"], "a")


class Harmful:
    """An object whose pickle makes a file when it is loaded freely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_tensors_are_known_without_a_byte_of_them_and_read_one_by_one(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    content: dict[str, Any] = {
        "a": whole,
        "part": whole[1:],
        "b": [torch.ones(2, dtype=torch.bfloat16)],
        "n": 4,
        "empty": torch.ones(0),
    }
    torch.save(content, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    assert file.content["n"] == 4
    assert (file.content["a"].shape, file.content["a"].dtype) == ((3, 4), torch.float32)
    for name, tensor in (("a", content["a"]), ("part", content["part"]), ("empty", content["empty"])):
        assert_same_bits(file.read(file.content[name], name), tensor)
    assert_same_bits(file.read(file.content["b"][0], "b"), content["b"][0])
    (start, size), (inside, rest) = (file.place(file.content[name], name) for name in ("a", "part"))
    assert (inside - start, size, rest) == (16, 48, 32)
    assert (tmp_path / "x.pt").read_bytes()[start : start + size] == whole.numpy().tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda path: {"a": Harmful(path)},
            r"x\.pt: its pickle asks for .*open.*; only tensors, numbers and containers",
        ),
        (lambda path: {"a": torch.nn.Linear(1, 1)}, "its pickle asks for 'torch.nn.modules.linear Linear'"),
        (lambda path: {"a": torch.nn.functional.relu}, "its pickle asks for 'torch.nn.functional relu'"),
    ],
)
def test_nothing_is_run(tmp_path, content, message):
    torch.save(content(tmp_path / "made"), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        TorchFile(tmp_path / "x.pt")
    assert not (tmp_path / "made").exists()


def rewritten(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The archive with each entry's bytes changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def big_endian(name, data):
    return b"big" if name.endswith("byteorder") else data


def cut_pickle(name, data):
    return data[:-9] if name.endswith("data.pkl") else data


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: rewritten(path, compression=zipfile.ZIP_DEFLATED),
            r"entry 'x/data\.pkl' is compressed or encrypted",
        ),
        (lambda path: rewritten(path, big_endian), "its numbers are not little-endian"),
        (lambda path: rewritten(path, cut_pickle), r"x\.pt: its pickle is damaged \(.*\); fetch it again"),
        (
            lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
            "not a whole torch file, which is a zip",
        ),
        (
            lambda path: zipfile.ZipFile(path, "w").close(),
            r"x\.pt holds 0 entries data\.pkl; a file of torch\.save has one",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "not a whole torch file"),
    ],
)
def test_other_and_damaged_containers_are_refused(tmp_path, spoil, message):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    spoil(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message) as error:
        TorchFile(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_a_tensor_that_is_turned_is_named_and_one_storage_is_patched_once(tmp_path):
    shared = torch.arange(4.0)
    torch.save({"turned": torch.ones(2, 3).T, "a": shared, "b": shared}, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"^turned in x\.pt is not contiguous; call \.contiguous\(\) on it"):
        file.place(file.content["turned"], "turned")
    places = [file.place(file.content[name], name) for name in "ab"]
    with pytest.raises(ValueError, match="two layers share the bytes of their scales, which cannot be saved apart"):
        file.patches([(offset, bytes(size)) for offset, size in places])
