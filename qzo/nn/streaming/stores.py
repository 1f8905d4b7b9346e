"""Where blocks are kept while they are not on the device: in the host's memory, or in a file.

Both are written once, and read from then on: codes and zero points never change.
"""

import contextlib
import fcntl
import itertools
import mmap
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from ...system.memory import free_bytes

PAGE = mmap.PAGESIZE


class StoreError(ValueError):
    """Blocks cannot be kept, or are no longer what was written; the message says which, and what to do."""


class Store(Protocol):
    """Keeps blocks of these sizes in bytes; nbytes: all of them, each on whole pages."""

    sizes: Sequence[int]
    nbytes: int

    def write(self, block: int, data: torch.Tensor) -> None:
        """Keep the block's bytes, uint8 on the CPU."""

    def read(self, block: int, into: torch.Tensor, start: int = 0) -> None:
        """Fill `into`, contiguous uint8 on the CPU, with the block's bytes from `start` on; what it has beyond the
        block stays as it is."""

    def close(self) -> None:
        """Let go of memory or file. It is not read again."""


def check_memory(needed: int) -> None:
    """StoreError where the host has less memory than `needed` bytes."""
    free = free_bytes("cpu")
    if free is not None and needed > free:
        raise StoreError(
            f"--offload cpu needs {needed:,} bytes of the host's memory, {free:,} are available: take --offload disk, "
            "or auto, which takes the disk where memory does not suffice"
        )


def spilled(tensor: torch.Tensor, folder: str | os.PathLike[str]) -> torch.Tensor:
    """The same values in a file without a name in `folder`, whose pages the system can write back when memory is short;
    it is gone with the tensor. tensor: on the CPU."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(tensor.contiguous().numpy().data)
        file.flush()
        return torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)


class HostStore:
    """Blocks in one anonymous mapping of the host's memory, registered with CUDA as a whole if asked (`pin`).

    torch's own pinned memory comes in powers of two, up to twice what is needed; a mapping has the size that it is
    given, and takes its pages when they are written, so that a model can be moved into it layer by layer.

    Raises StoreError where the host has less memory than `needed` bytes: those that come on top of what it holds now.
    """

    def __init__(self, sizes: Sequence[int], needed: int) -> None:
        check_memory(needed)
        self.sizes = sizes
        self._starts = starts_of(sizes)
        self.nbytes = self._starts[-1]
        self.memory = torch.frombuffer(mmap.mmap(-1, max(self.nbytes, PAGE)), dtype=torch.uint8)
        self._unregister: Callable[[], object] = lambda: None

    def view(self, block: int) -> torch.Tensor:
        """The block's bytes themselves."""
        return self.memory[self._starts[block] :][: self.sizes[block]]

    def write(self, block: int, data: torch.Tensor) -> None:
        self.view(block).copy_(data)

    def read(self, block: int, into: torch.Tensor, start: int = 0) -> None:
        some = self.view(block)[start : start + len(into)]
        into[: len(some)].copy_(some)

    def pin(self, cuda: ModuleType = torch.cuda) -> None:
        """Register the mapping, so that the device copies from it while it computes. StoreError where that is refused.
        cuda: stands for torch.cuda in tests."""
        runtime: Any = cuda.cudart()
        code = int(runtime.cudaHostRegister(self.memory.data_ptr(), self.memory.nbytes, 0))
        if code != 0:
            raise StoreError(
                f"CUDA does not register {self.memory.nbytes:,} bytes of host memory (error {code}): the system limits "
                "locked memory (ulimit -l, a container, WSL2); raise the limit, or take --offload disk"
            )
        self._unregister = weakref.finalize(self, runtime.cudaHostUnregister, self.memory.data_ptr())

    def close(self) -> None:
        self._unregister()
        self.memory = self.memory[:0].clone()


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Where each block begins, on a page, and the end of all."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // PAGE) * PAGE)
    return starts


class FileStore:
    """Blocks in a file of our own in `folder`, which is removed when the process or the store ends.

    It is locked as long as it is used, so that the file that a killed process has left is taken again.
    It is read by pread, never mapped: a mapping of a file that is cut ends the process without a word. Before each read
    its size and time of change are looked at; from the first change of the time on, each block is compared with the
    checksum that it was written with.

    Raises StoreError where the disk has too little room; OSError for a folder that cannot be written.
    """

    def __init__(self, sizes: Sequence[int], folder: str | os.PathLike[str]) -> None:
        self.sizes = sizes
        self._starts = starts_of(sizes)
        self.nbytes = self._starts[-1]
        Path(folder).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if self.nbytes > free:
            raise StoreError(
                f"--offload disk needs {self.nbytes:,} bytes in {folder}, {free:,} are available: free some, or name "
                "another folder (--offload-dir)"
            )
        self._file, self.path = _locked(Path(folder))
        self.close = weakref.finalize(self, _remove, self._file, self.path)
        self._checksums = [0] * len(sizes)
        os.ftruncate(self._file, self.nbytes)
        self._stamp = self._now()

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns

    def write(self, block: int, data: torch.Tensor) -> None:
        left, at = data.numpy().data, self._starts[block]
        self._checksums[block] = zlib.crc32(left)
        while left:
            written = os.pwrite(self._file, left, at)
            left, at = left[written:], at + written
        self._stamp = self._now()

    def read(self, block: int, into: torch.Tensor, start: int = 0) -> None:
        some = into[: self.sizes[block] - start]
        now = self._now()
        if now != self._stamp:
            self._check(block, now[0])
        self._read(block, some, start)

    def _read(self, block: int, into: torch.Tensor, start: int) -> None:
        left, at = into.numpy().data, self._starts[block] + start
        while left:
            count = os.preadv(self._file, [left], at)
            if not count:
                raise self._changed(f"ends at byte {at:,}")
            left, at = left[count:], at + count

    def _check(self, block: int, size: int) -> None:
        """StoreError unless the file, which somebody has written to, still has the block."""
        if size != self.nbytes:
            raise self._changed(f"has {size:,} bytes")
        whole = torch.empty(self.sizes[block], dtype=torch.uint8)
        self._read(block, whole, 0)
        if zlib.crc32(whole.numpy().data) != self._checksums[block]:
            raise self._changed(f"has other bytes in block {block}")

    def _changed(self, how: str) -> StoreError:
        return StoreError(
            f"{self.path} was changed while the model streams from it: it {how}, {self.nbytes:,} bytes were written. "
            "The run has stopped before it used them, and the steps in its journal are whole: keep other programs off "
            "this file, and go on with --resume"
        )


def _locked(folder: Path) -> tuple[int, Path]:
    """The first of offload.bin, offload-2.bin, ... that nobody uses, open and locked."""
    for number in itertools.count(1):
        path = folder / f"offload{f'-{number}' if number > 1 else ''}.bin"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        break
    return file, path


def _remove(file: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(file)
