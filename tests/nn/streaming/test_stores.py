"""What is written is what is read; what does not fit, and a file that somebody changes, are told."""

import gc
import os
import types
from pathlib import Path

import pytest
import torch

from qzo.nn.streaming.stores import PAGE, FileStore, HostStore, StoreError, spilled, starts_of

SIZES = [5000, 64, 9000]


def filled(store):
    """The store, and what was written to it."""
    written = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in SIZES]
    for block, data in enumerate(written):
        store.write(block, data)
    return store, written


def read(store, block, start=0):
    into = torch.zeros(SIZES[block] - start + 3, dtype=torch.uint8)
    store.read(block, into, start)
    assert into[-3:].tolist() == [0, 0, 0], "what lies behind the block stays"
    return into[:-3]


@pytest.mark.parametrize("make", [lambda folder: HostStore(SIZES, 0), lambda folder: FileStore(SIZES, folder)])
def test_blocks_and_parts_of_them_are_read_as_they_were_written(make, tmp_path):
    store, written = filled(make(tmp_path))
    for block in (2, 0, 1):
        assert torch.equal(read(store, block), written[block])
        assert torch.equal(read(store, block, 40), written[block][40:])
    assert sum(SIZES) <= store.nbytes < sum(SIZES) + len(SIZES) * PAGE
    store.close()
    assert not list(tmp_path.iterdir())


def test_blocks_begin_on_pages():
    assert starts_of([1, PAGE, PAGE + 1]) == [0, PAGE, 2 * PAGE, 4 * PAGE]


def with_runtime(**calls):
    """A module like torch.cuda whose runtime has these calls."""
    cuda = types.ModuleType("cuda")
    vars(cuda)["cudart"] = lambda: types.SimpleNamespace(**calls)
    return cuda


def test_a_mapping_is_registered_until_it_is_gone():
    calls = []
    cuda = with_runtime(
        cudaHostRegister=lambda *given: calls.append(given) or 0, cudaHostUnregister=lambda *given: calls.append(given)
    )
    store = HostStore(SIZES, 0)
    at, nbytes = store.memory.data_ptr(), store.memory.nbytes
    store.pin(cuda)
    assert calls == [(at, nbytes, 0)]
    assert nbytes == store.nbytes, "no power of two"
    del store
    gc.collect()
    assert calls[1:] == [(at,)]


def test_memory_that_cannot_be_registered_is_told():
    with pytest.raises(StoreError, match=r"4,096 bytes .*\(error 2\).*ulimit -l.*--offload disk"):
        HostStore([10], 0).pin(with_runtime(cudaHostRegister=lambda *given: 2))


def test_a_file_that_was_only_touched_is_read_on(tmp_path):
    store, written = filled(FileStore(SIZES, tmp_path))
    os.utime(store.path, ns=(1, 1))
    assert torch.equal(read(store, 1), written[1])
    assert torch.equal(read(store, 2, 10), written[2][10:])


def cut(path):
    os.truncate(path, PAGE)


def lengthen(path):
    os.truncate(path, 10 * PAGE)


def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"other")


@pytest.mark.parametrize(("change", "told"), [(cut, "has 4,096 bytes"), (lengthen, "has"), (overwrite, "in block 0")])
def test_a_file_that_was_changed_is_not_used(change, told, tmp_path):
    store, _ = filled(FileStore(SIZES, tmp_path))
    change(store.path)
    for start in (0, 200):
        with pytest.raises(StoreError, match=rf"{store.path} was changed while.*{told}.*--resume"):
            read(store, 0, start)


def test_a_file_that_is_cut_while_it_is_read_is_not_used(tmp_path, monkeypatch):
    store, _ = filled(FileStore(SIZES, tmp_path))
    cut(store.path)
    store._stamp = store._now()  # as if it had not been cut when it was looked at
    with pytest.raises(StoreError, match="ends at byte"):
        read(store, 0)


def test_a_file_is_one_stores_own_and_one_that_was_left_is_taken_again(tmp_path):
    (tmp_path / "offload.bin").write_bytes(b"of a process that was killed" * 1000)
    one, two = filled(FileStore(SIZES, tmp_path)), filled(FileStore(SIZES, tmp_path))
    assert [found[0].path.name for found in (one, two)] == ["offload.bin", "offload-2.bin"]
    for store, written in (one, two):
        assert torch.equal(read(store, 2), written[2])


def test_a_disk_without_room_is_told_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=10))
    with pytest.raises(StoreError, match=rf"needs 24,576 bytes in {tmp_path}, 10 are available.*--offload-dir"):
        FileStore(SIZES, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_spilled_tensor_is_the_same_in_a_file_without_a_name(tmp_path):
    codes = torch.randint(0, 256, (6, 50), dtype=torch.uint8).T
    kept = spilled(codes, tmp_path / "new")
    assert torch.equal(kept, codes)
    assert kept.is_contiguous()
    assert not list((tmp_path / "new").iterdir())
    assert str(tmp_path / "new") in Path("/proc/self/maps").read_text(), "its pages are the file's"


def test_memory_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr("qzo.nn.streaming.stores.free_bytes", lambda device: 99)
    HostStore(SIZES, 99)
    with pytest.raises(StoreError, match=r"needs 100 bytes .*, 99 are available.*--offload disk"):
        HostStore(SIZES, 100)
