"""What copiers ask of a CPU's thread and of a CUDA device, in which order; the device is a stand-in with a log."""

import contextlib
import types

import pytest
import torch

from qzo.nn.streaming.copiers import StagedCopier, StreamCopier, ThreadCopier, copier_of
from qzo.nn.streaming.stores import FileStore, HostStore

SIZES = [300, 200, 300]


def stores(tmp_path):
    for store in (HostStore(SIZES, 0), FileStore(SIZES, tmp_path)):
        for block, size in enumerate(SIZES):
            store.write(block, torch.full((size,), block + 1, dtype=torch.uint8))
        yield store


def empty_slots():
    return [torch.zeros(300, dtype=torch.uint8) for _ in range(2)]


class Cuda(types.ModuleType):
    """torch.cuda as the copiers use it: streams and events are names in a log."""

    def __init__(self):
        super().__init__("cuda")
        self.log, self.events = [], 0

    def Stream(self, device):
        return _Stream(self, "side")

    def current_stream(self, device):
        return _Stream(self, "main")

    def Event(self):
        self.events += 1
        return _Event(self, self.events)

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append(f"{stream.name} copies")
        yield

    def cudart(self):
        return types.SimpleNamespace(cudaHostRegister=lambda *given: 0, cudaHostUnregister=lambda *given: None)


class _Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_event(self, event):
        self.cuda.log.append(f"{self.name} waits for {event.number}")

    def synchronize(self):
        self.cuda.log.append(f"host waits for {self.name}")


class _Event:
    def __init__(self, cuda, number):
        self.cuda, self.number = cuda, number

    def record(self, stream):
        self.cuda.log.append(f"{stream.name} records {self.number}")

    def synchronize(self):
        self.cuda.log.append(f"host waits for {self.number}")


def test_a_thread_fills_the_slots_of_a_cpu(tmp_path):
    for store in stores(tmp_path):
        copier = copier_of(store, slots := empty_slots())
        assert isinstance(copier, ThreadCopier)
        copier.start(0, 0)
        copier.start(1, 1)
        copier.wait(1)
        copier.start(2, 0)
        copier.wait(0)
        assert slots[0].tolist() == [3] * 300
        assert slots[1].tolist() == [2] * 200 + [0] * 100
        copier.close()


def test_what_a_read_raises_comes_out_where_it_is_waited_for(tmp_path):
    *_, store = stores(tmp_path)
    store.path.write_bytes(b"")
    copier = ThreadCopier(store, empty_slots())
    copier.start(0, 0)
    for _ in range(2):
        with pytest.raises(ValueError, match="was changed"):
            copier.wait(0)
    copier.close()


def test_a_stream_copies_behind_the_last_use_of_a_slot_and_compute_waits_for_the_copy(tmp_path):
    store, _ = stores(tmp_path)
    cuda, slots = Cuda(), empty_slots()
    copier = StreamCopier(store, slots, cuda)
    copied, consumed = 1, 3  # the events of slot 0
    assert cuda.log == ["main records 3", "main records 4"], "what had the memory before is waited for"
    cuda.log.clear()
    copier.start(1, 0)
    copier.wait(0)
    copier.done(0)
    filling = [f"side waits for {consumed}", "side copies", f"side records {copied}"]
    using = [f"main waits for {copied}", f"main records {consumed}"]
    assert cuda.log == filling + using
    assert slots[0].tolist() == [2] * 200 + [0] * 100, "a block is sent, not the slot"
    assert cuda.events == 4, "two to a slot, made once"
    copier.close()


def test_a_file_goes_through_pinned_stages_that_only_the_thread_waits_for(tmp_path):
    *_, store = stores(tmp_path)
    cuda, slots = Cuda(), empty_slots()
    copier = StagedCopier(store, slots, cuda)
    for block, slot in ((0, 0), (1, 1), (2, 0)):
        copier.start(block, slot)
        copier.wait(slot)
        copier.done(slot)
    assert slots[0].tolist() == [3] * 300
    assert slots[1].tolist() == [2] * 200 + [0] * 100
    sent = [5, 6]  # the events of the two stages
    for number, line in enumerate(("side waits for 3", "side waits for 4", "side waits for 3")):
        stage = sent[number % 2]
        at = cuda.log.index(f"host waits for {stage}")
        assert cuda.log[at : at + 5] == [
            f"host waits for {stage}",
            line,
            "side copies",
            f"side records {number % 2 + 1}",
            f"side records {stage}",
        ]
        del cuda.log[: at + 5]
    copier.close()
