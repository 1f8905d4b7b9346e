"""Which block lies in which slot, and which is copied next: the same on every device, and in simulated time.

A slot is a fixed piece of a device's memory. A block always comes to the same slot, so that its tensors keep their
addresses and nothing that was planned with them is planned again. While a block computes, those that are expected next
are copied into the other slots; its own is free again when all that reads it has been queued.

Terms (slot): docs/glossary.md.
"""

from collections.abc import Sequence
from typing import Protocol


class Copier(Protocol):
    """Fills the slots of a device, in the order that it is asked to (copiers.py)."""

    def start(self, block: int, slot: int) -> None:
        """Begin to fill the slot with a block, once what was queued before the last `done` of the slot has run."""

    def wait(self, slot: int) -> None:
        """What is queued from now on finds the slot filled. Raises what the copy has raised."""

    def done(self, slot: int) -> None:
        """All that reads what the slot holds has been queued."""

    def close(self) -> None:
        """Let what was begun end; nothing is begun any more."""


def assign(blocks: int, slots: int) -> list[int]:
    """The slot of each block: in turn; where the last would share the first's, which follows it in the next forward, it
    takes the one behind it, if there are three."""
    chosen = [block % slots for block in range(blocks)]
    if blocks > slots > 2 and chosen[-1] == 0:
        chosen[-1] = 1
    return chosen


class Slots:
    """The blocks of a model on their way through the slots of a device.

    Parameters
    ----------
    sizes
        Bytes of each block.
    slot_of
        The slot of each block (`assign`).
    copier
        Fills the slots.

    Attributes
    ----------
    copied_bytes : int
        That were sent to the device since the start; there is no way back.
    """

    def __init__(self, sizes: Sequence[int], slot_of: Sequence[int], copier: Copier) -> None:
        self.sizes, self.slot_of, self.copier = sizes, slot_of, copier
        self.copied_bytes = 0
        self.current: int | None = None  # the block whose slot is in use
        self._last: int | None = None  # the block that was entered last
        self._held: list[int | None] = [None] * len(set(slot_of))
        self._next = [(block + 1) % len(sizes) for block in range(len(sizes))]  # what followed each, the last time

    def enter(self, block: int) -> None:
        """Have the block in its slot for what is queued from now on. Raises what its copy has raised."""
        if block == self.current:
            return
        if self.current is not None:
            self.leave()
        if self._last is not None:
            self._next[self._last] = block
        self._last = block
        self._fetch(block)
        self.current = block
        self._fetch_ahead(block)
        try:
            self.copier.wait(self.slot_of[block])
        except BaseException:
            self.current = self._held[self.slot_of[block]] = None
            raise

    def leave(self) -> None:
        """Let the slot of the current block, if there is one, go: nothing more will be queued that reads it."""
        if self.current is not None:
            block, self.current = self.current, None
            self.copier.done(self.slot_of[block])
            self._fetch_ahead(block)

    def _fetch(self, block: int) -> None:
        slot = self.slot_of[block]
        if self._held[slot] != block:
            self._held[slot] = block
            self.copied_bytes += self.sizes[block]
            self.copier.start(block, slot)

    def _fetch_ahead(self, block: int) -> None:
        """Fetch the blocks that are expected behind this one, a slot each, but not into the slot that is in use."""
        taken = set() if self.current is None else {self.slot_of[self.current]}
        while len(taken) < len(self._held):
            block = self._next[block]
            if self.slot_of[block] in taken:
                return
            taken.add(self.slot_of[block])
            self._fetch(block)
