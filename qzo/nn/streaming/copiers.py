"""What fills the slots of a device: a thread on a CPU, a stream of its own on a CUDA device (`slots.Copier`)."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType

import torch

from .slots import Copier
from .stores import HostStore, Store

STAGES = 2  # pieces of pinned memory between a file and a CUDA device: one is read into while the other is sent


def copier_of(store: Store, slots: Sequence[torch.Tensor]) -> Copier:
    """The Copier from this store into these slots, uint8 on one device. StoreError where memory cannot be pinned."""
    if slots[0].device.type != "cuda":
        return ThreadCopier(store, slots)
    if isinstance(store, HostStore):
        store.pin()
        return StreamCopier(store, slots)
    return StagedCopier(store, slots)


class ThreadCopier:
    """Fills slots of a CPU's memory in a thread. What runs there runs at once, so a slot is free when its block is
    left."""

    def __init__(self, store: Store, slots: Sequence[torch.Tensor]) -> None:
        self.store, self.slots = store, slots
        self._thread = ThreadPoolExecutor(1, "qzo-offload")
        self._copies: dict[int, Future[None]] = {}

    def start(self, block: int, slot: int) -> None:
        self._copies[slot] = self._thread.submit(self.store.read, block, self.slots[slot])

    def wait(self, slot: int) -> None:
        self._copies[slot].result()

    def done(self, slot: int) -> None:
        pass

    def close(self) -> None:
        self._thread.shutdown()


class StreamCopier:
    """Sends blocks from registered host memory on a stream beside the one that computes; two events to a slot order the
    two. Nothing is allocated, and nobody waits on the host.

    cuda: stands for torch.cuda in tests.
    """

    def __init__(self, store: Store, slots: Sequence[torch.Tensor], cuda: ModuleType = torch.cuda) -> None:
        self.store, self.slots, self.cuda = store, slots, cuda
        self.device = slots[0].device
        self.side = cuda.Stream(self.device)
        self.copied = [cuda.Event() for _ in slots]
        self.consumed = [cuda.Event() for _ in slots]
        for slot in range(len(slots)):
            self.done(slot)  # what had the memory before may still be read

    def start(self, block: int, slot: int) -> None:
        assert isinstance(self.store, HostStore)
        self._send(self.store.view(block), slot)

    def _send(self, block: torch.Tensor, slot: int) -> None:
        self.side.wait_event(self.consumed[slot])
        with self.cuda.stream(self.side):
            self.slots[slot][: len(block)].copy_(block, non_blocking=True)
        self.copied[slot].record(self.side)

    def wait(self, slot: int) -> None:
        self.cuda.current_stream(self.device).wait_event(self.copied[slot])

    def done(self, slot: int) -> None:
        self.consumed[slot].record(self.cuda.current_stream(self.device))

    def close(self) -> None:
        self.side.synchronize()


class StagedCopier(StreamCopier):
    """The same from a file: a thread reads a block into one of STAGES pieces of pinned memory and sends it from
    there. Only that thread waits for a piece to be sent before it reads into it again."""

    def __init__(self, store: Store, slots: Sequence[torch.Tensor], cuda: ModuleType = torch.cuda) -> None:
        super().__init__(store, slots, cuda)
        sizes = [max(store.sizes)] * STAGES
        self._stages = HostStore(sizes, sum(sizes))
        self._stages.pin(cuda)
        self._sent = [cuda.Event() for _ in sizes]
        self._turn = 0
        self._thread = ThreadPoolExecutor(1, "qzo-offload")
        self._reads: dict[int, Future[None]] = {}

    def start(self, block: int, slot: int) -> None:
        self._reads[slot] = self._thread.submit(self._read, block, slot)

    def _read(self, block: int, slot: int) -> None:
        turn, self._turn = self._turn, (self._turn + 1) % STAGES
        self._sent[turn].synchronize()
        stage = self._stages.view(turn)[: self.store.sizes[block]]
        self.store.read(block, stage)
        self._send(stage, slot)
        self._sent[turn].record(self.side)

    def wait(self, slot: int) -> None:
        self._reads[slot].result()
        super().wait(slot)

    def close(self) -> None:
        self._thread.shutdown()
        super().close()
        self._stages.close()
