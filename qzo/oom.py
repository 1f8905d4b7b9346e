"""Out of memory, in one line: what was asked for, what was free, what lowers it."""
import re

import torch


def is_out_of_memory(error):
    """Whether torch raised this because a device, or the machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def explain(error, advice):
    """One line about such an error; advice: which options ask for less."""
    text = " ".join(str(error).split())
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    free = re.search(r"of which ([\d.]+ \w+) is free", text)
    wanted = f"{_size(asked[1])} more were asked for" if asked else text[:160]
    left = _size(free[1]) if free else f"{_available() / 1e9:.2f} GB of this machine's memory"
    return f"out of memory: {wanted}, {left} free; {advice}"


def _size(text):
    """As torch says it, "2.00 GiB" or "1234 bytes", in GB of 1e9 bytes."""
    number, unit = text.split()
    power = {"bytes": 0, "KiB": 10, "MiB": 20, "GiB": 30}.get(unit)
    return text if power is None else f"{float(number) * 2**power / 1e9:.2f} GB"


def _available():
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
