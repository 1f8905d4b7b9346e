"""Memory of the machine: what is free, what to say when it runs out, and freed blocks given back to the system."""

import ctypes
import re

import psutil
import torch

TRIM_EVERY_BYTES = 16 << 20


def free_bytes(device: str) -> int | None:
    """Bytes that are free on "cpu" or a CUDA device; None where there is no such device."""
    if device == "cpu":
        return psutil.virtual_memory().available
    return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised this because a device, or the machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def explain(error: BaseException, advice: str) -> str:
    """One line about such an error; advice: which options ask for less."""
    text = " ".join(str(error).split())
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    free = re.search(r"of which ([\d.]+ \w+) is free", text)
    wanted = f"{_size(asked[1])} more were asked for" if asked else text[:160]
    left = _size(free[1]) if free else f"{psutil.virtual_memory().available / 1e9:.2f} GB of this machine's memory"
    return f"out of memory: {wanted}, {left} free; {advice}"


def _size(text: str) -> str:
    """As torch says it, "2.00 GiB" or "1234 bytes", in GB of 1e9 bytes."""
    number, unit = text.split()
    power = {"bytes": 0, "KiB": 10, "MiB": 20, "GiB": 30}.get(unit)
    return text if power is None else f"{float(number) * 2**power / 1e9:.2f} GB"


class Trimmer:
    """Gives freed memory back to the system each time another TRIM_EVERY_BYTES were taken for good.

    glibc keeps the holes that temporaries leave between tensors that stay, and after a first large free it takes
    blocks of up to 32 MB from there too: without this a load takes up to twice what the model holds.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none and keeps no holes
        self._taken = 0

    def took(self, nbytes: int) -> None:
        self._taken += nbytes
        if self._taken >= TRIM_EVERY_BYTES and self._trim is not None:
            self._trim(0)
            self._taken = 0
