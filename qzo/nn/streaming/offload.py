"""`offload`: a model that is larger than its device. Blocks of frozen codes stream from the host, one way.

Scales, embeddings, norms and the head stay on the device; codes and zero points come block by block, behind the compute
of the block before, and are never written back. No model's forward is known here: hooks on the layers of each block
say when it begins, one on the block says when it has ended.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ...system.memory import Trimmer
from .. import ops
from ..layers import layers
from ..linear import QZOLinear
from .blocks import Block, Piece, blocks_of, packed_into
from .copiers import copier_of
from .lockstep import Call
from .slots import Slots, assign
from .stores import FileStore, HostStore, Store, StoreError

SLOTS = 3
PLACES = ("cpu", "disk", "auto")
T = TypeVar("T")


class Offload:
    """A model's codes in a store, and the slots that they stream through; `offload` makes it.

    Attributes
    ----------
    blocks : list[Block]
        In the order in which they are listed.
    store : HostStore or FileStore
        Where their codes and zero points are.
    slots : Slots
        Counts the bytes that were sent to the device, `slots.copied_bytes`.
    """

    def __init__(self, module: nn.Module, blocks: list[Block], store: Store, device: torch.device, slots: int) -> None:
        self.module, self.blocks, self.store = module, blocks, store
        sizes, slot_of = [block.nbytes for block in blocks], assign(len(blocks), min(slots, len(blocks)))
        self._memory = [torch.empty(n, dtype=torch.uint8, device=device) for n in slot_sizes(sizes, slot_of)]
        self._running: Call[Any] | None = None
        try:
            self._fill(slot_of)
            self.slots = Slots(sizes, slot_of, copier_of(store, self._memory))
        except BaseException:  # a full disk, memory that cannot be pinned
            self._take_back()
            raise
        nn.Module.to(module, device)  # transformers' own refuses some quantized models
        self._hooks = [hook for number, block in enumerate(blocks) for hook in self._watch(number, block)]

    def _fill(self, slot_of: Sequence[int]) -> None:
        """Move the blocks' bytes into the store, block by block; their layers then have them in their slots."""
        buffer, trimmer = torch.empty(max(block.nbytes for block in self.blocks), dtype=torch.uint8), Trimmer()
        for number, block in enumerate(self.blocks):
            self.store.write(number, packed_into(block, buffer))
            for piece in block.pieces:
                setattr(piece.layer, piece.what, piece.within(self._memory[slot_of[number]]))
            for layer in block.layers():
                layer.stored = _Stored(self, number, [piece for piece in block.pieces if piece.layer is layer])
            trimmer.took(block.nbytes)

    def _watch(self, number: int, block: Block) -> "list[torch.utils.hooks.RemovableHandle]":
        found = [layer.register_forward_pre_hook(functools.partial(self._enter, number)) for layer in block.layers()]
        return [*found, block.module.register_forward_hook(functools.partial(self._left, number))]

    def _enter(self, number: int, *_: object) -> None:
        self.slots.enter(number)

    def _left(self, number: int, *_: object) -> None:
        if self.slots.current == number:  # a block that was skipped has not been entered
            self._leave()

    def _leave(self) -> None:
        """The current block has run: for all, or for one call of `together`, which lets the next one run it."""
        if self._running is None:
            self.slots.leave()
        else:
            self._running.pause()

    def together(self, module: nn.Module, runs: Sequence[Callable[[], T]]) -> list[T]:
        """What the function `together` does."""
        calls = [Call(run) for run in runs]
        state = _State(self.module, module)
        outer, outside = self._running, state.read()
        of_call = [outside] * len(calls)
        try:
            while not all(call.finished for call in calls):
                for number, call in enumerate(calls):
                    if call.finished:
                        continue
                    state.write(of_call[number])
                    self._running = call
                    call.go_on()
                    of_call[number] = state.read()
                    if call.error is not None:
                        raise call.error
                self._running = outer
                state.write(outside)
                self._leave()
        finally:
            self._running = outer
            for call in calls:
                call.abandon()
            state.write(outside)
        return [call.result for call in calls]

    def restore(self) -> None:
        """Bring all codes and zero points back to the device, and stream no longer."""
        for hook in self._hooks:
            hook.remove()
        self._take_back()
        self.slots.copier.close()
        self.store.close()

    def _take_back(self) -> None:
        for block in self.blocks:
            for layer in block.layers():
                layer.codes, layer.zeros = layer.read_codes()
                layer.stored = None

    def __reduce__(self) -> str:
        raise TypeError(
            "an offloaded model cannot be copied or pickled: its codes are in one place; restore() it first"
        )


class _State:
    """What forwards set on modules for as long as they run: evaluations, a forward in place of a module's own, no
    dropout. Each of the calls that run side by side has its own."""

    NAMES = ("evaluations", "forward", "training")

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = {id(child): vars(child) for module in modules for child in module.modules()}.values()

    def read(self) -> list[dict[str, Any]]:
        return [{name: own[name] for name in self.NAMES if name in own} for own in self._modules]

    def write(self, state: Sequence[Mapping[str, Any]]) -> None:
        for own, wanted in zip(self._modules, state, strict=True):
            own.update(wanted)
            if "forward" in own and "forward" not in wanted:
                del own["forward"]


class _Stored:
    """How a layer reads what it has in the store (linear.Stored)."""

    def __init__(self, offload: Offload, block: int, pieces: Sequence[Piece]) -> None:
        self.offload, self.block = offload, block
        self.pieces = {piece.what: piece for piece in pieces}

    def read(self, what: str) -> torch.Tensor | None:
        """A copy of the layer's codes or zeros; None where it has none."""
        piece = self.pieces.get(what)
        if piece is None:
            return None
        found = torch.empty(piece.nbytes, dtype=torch.uint8)
        self.offload.store.read(self.block, found, piece.start)
        return found.view(piece.dtype).view(piece.shape).to(piece.layer.codes.device)


def slot_sizes(sizes: Sequence[int], slot_of: Sequence[int]) -> list[int]:
    """Bytes of each slot: of the largest block that comes there."""
    return [
        max(size for size, slot in zip(sizes, slot_of, strict=True) if slot == wanted) for wanted in sorted({*slot_of})
    ]


def device_bytes(blocks: Sequence[Block], slots: int = SLOTS) -> int:
    """What the slots of these blocks take on the device."""
    sizes = [block.nbytes for block in blocks]
    return sum(slot_sizes(sizes, assign(len(sizes), min(slots, len(sizes)))))


def offload(
    module: nn.Module,
    to: str = "cpu",
    *,
    device: torch.device | str | None = None,
    blocks: Sequence[nn.ModuleList] | None = None,
    folder: str | os.PathLike[str] = ".",
    slots: int = SLOTS,
) -> Offload:
    """Keep a model's codes and zero points in the host's memory or in a file, and stream them to the device as blocks
    are run.

    Every forward has the bits that it has without. The way is one: codes never change. Do it before a QZO makes its
    first step. All of a stacked batch's evaluations run in one visit of a block; `together` does it for forwards one
    after another.

    Parameters
    ----------
    module
        Holds lists of blocks (nn.ModuleList) with quantized layers; on any device, such as the CPU it was loaded on.
    to
        "cpu", "disk" (a file of our own, which is removed at the end), or "auto": the disk where the host's memory does
        not suffice.
    device
        Where the model runs; all but the streamed codes is moved there. None: where its codes are.
    blocks
        The lists to stream; None: the outermost ones that hold quantized layers.
    folder
        Of the file, for "disk".
    slots
        Blocks that the device holds at once, 2 or 3.

    Returns
    -------
    Offload
        It lives as long as the model; `restore()` undoes it.

    Raises
    ------
    ValueError
        There are no such blocks, two share a layer, or the model is offloaded or cut in parts already; too little
        memory or room on the disk: bytes that are needed and that are available are named. Later, in a forward: the
        file was changed.
    """
    check_place(to)
    if slots not in (2, 3):
        raise ValueError(f"slots={slots!r}: 2 or 3 are wanted")
    found = list(layers(module, trainable=None).values())
    if any(layer.stored is not None for layer in found):
        raise ValueError("the model is offloaded already; restore() it first")
    if any(layer.part is not None for layer in found):
        raise ValueError("the model is cut in parts (qzo.shard_), which cannot be offloaded; qzo.unshard_(model) first")
    if any(layer.codes.is_meta for layer in found):
        raise ValueError("the model is on the meta device and has no codes to offload")
    where = torch.device(device or (found[0].codes.device if found else "cpu"))
    streamed = blocks_of(module, blocks, in_rows=not ops.uses_triton(where))
    return Offload(module, streamed, _store(streamed, to, Path(folder)), where, slots)


def check_place(to: str) -> None:
    """ValueError unless it is one of PLACES."""
    if to not in PLACES:
        raise ValueError(f"offload to {to!r}: {', '.join(map(repr, PLACES[:-1]))} or {PLACES[-1]!r} is wanted")


def _store(blocks: Sequence[Block], to: str, folder: Path) -> Store:
    sizes = [block.nbytes for block in blocks]
    if to != "disk":
        found = [tensor for block in blocks for layer in block.layers() for tensor in (layer.codes, layer.zeros)]
        held = sum(tensor.nbytes for tensor in found if tensor is not None and tensor.device.type == "cpu")
        try:
            return HostStore(sizes, max(0, sum(sizes) - held) + max(sizes))
        except StoreError:
            if to == "cpu":
                raise
    return FileStore(sizes, folder)


def offload_of(module: nn.Module) -> Offload | None:
    """The Offload that the module's layers stream through, or None."""
    for child in module.modules():
        if isinstance(child, QZOLinear) and isinstance(child.stored, _Stored):
            return child.stored.offload
    return None


def together(module: nn.Module, runs: Sequence[Callable[[], T]]) -> list[T]:
    """Make calls that run forwards of the module: in one visit of each block where it is offloaded, else one after
    another.

    Offloaded, all of them run a block before any goes on to the next, each in a thread of which one runs at a time.

    Parameters
    ----------
    module
        Holds the layers.
    runs
        Forwards of the module, of micro-batches or under single evaluations; each has the bits it has alone. What they
        hold between blocks, their hidden states, is held for all of them at once.

    Returns
    -------
    list
        What each has returned, in their order.

    Raises
    ------
    Exception
        What the first call to fail has raised; the others are ended.
    """
    found = offload_of(module)
    return [run() for run in runs] if found is None or len(runs) < 2 else found.together(module, runs)
