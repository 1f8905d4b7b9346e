"""How long something takes: process time of one thread on a CPU; on a GPU events around a replayed CUDA graph ("graph")
or around the calls themselves, launches and all ("eager"). A number says which; only numbers of one kind are compared.

What is compared is run in turn, so that a change of clock or load meets all alike; the median is reported with the
20th and 80th percentile. A run is given as `run(part)`: its passes `part`, a slice, each over a set of weights of its
own, of which there are so many that no cache holds them.
"""

import ctypes
import dataclasses
import functools
import platform
import statistics
import subprocess
import time

import torch
import triton

from . import bandwidth

WARM_UP = 1
LEAST, MOST = 5, 40  # turns
SECONDS = {"cpu": 0.3, "cuda": 2.0}  # of one run's turns together, once LEAST are done
TURN = 0.03  # of process time, which a turn on a CPU takes at least where there are passes enough
MODES = ("graph", "eager")


class NotCaptured(RuntimeError):
    """A run that no CUDA graph can be made of; says why."""


def percentiles(times):
    """(median, p20, p80)."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def interleaved(clocks, least=LEAST, seconds=SECONDS["cpu"]):
    """Milliseconds of each of `clocks` (name -> what `clock` makes): name -> (median, p20, p80)."""
    times: dict[str, list[float]] = {name: [] for name in clocks}
    spent = dict.fromkeys(clocks, 0.0)
    for _ in range(WARM_UP):
        for clock in clocks.values():
            clock()
    for turn in range(MOST):
        if turn >= least and all(took >= seconds for took in spent.values()):
            break
        for name, clock in clocks.items():
            if turn < least or spent[name] < seconds:
                begun = time.perf_counter()
                times[name].append(clock())
                spent[name] += time.perf_counter() - begun
    return {name: percentiles(t) for name, t in times.items()}


def clock(run, device, mode="eager", passes=1, generators=()):
    """Function () -> milliseconds of a pass of `run`. mode: of MODES; on a CPU there are calls only.

    generators: the torch.Generators that the run draws from, for its graph. NotCaptured where there can be no graph.
    """
    if device == "cpu":
        return _Process(run, passes)
    if mode == "eager":
        return _Eager(lambda: run(slice(passes)), passes)
    return _Graph(lambda: run(slice(passes)), passes, generators)


class _Process:
    """Turns of TURN or more, each of which goes on with the weights after the last one's: those used longest ago."""

    def __init__(self, run, passes):
        self.run, self.passes, self.next = run, passes, 0
        self.count = 1
        while self.count < passes and 1e-3 * self.count * self() < TURN:
            self.count = min(2 * self.count, passes)

    def __call__(self):
        if self.next + self.count > self.passes:
            self.next = 0
        part = slice(self.next, self.next + self.count)
        self.next += self.count
        begun = time.process_time()
        self.run(part)
        return 1e3 * (time.process_time() - begun) / self.count


class _Eager:
    """The calls, one after another, on a device that waits for the first."""

    def __init__(self, run, passes):
        self.run, self.passes = run, passes
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def before(self):
        torch.cuda.synchronize()

    def __call__(self):
        self.before()
        self.events[0].record()
        self.run()
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / self.passes


class _Graph(_Eager):
    """A replay. The device reads as much as no cache holds while the host issues it: what is timed is the device's."""

    def __init__(self, run, passes, generators):
        super().__init__(capture(run, generators), passes)
        self.spare, self.sums = _spare()

    def before(self):
        bandwidth.read(self.spare, self.sums)


@functools.cache
def _spare():
    spare = torch.zeros(cache_bytes("cuda") // 4, dtype=torch.int32, device="cuda")
    return spare, bandwidth.sums_of(spare)


def capture(run, generators=()):
    """replay() of run() captured as a CUDA graph, after one call of it, which compiles.

    generators: all torch.Generators that it draws from. Their states are registered with the graph, so that a replay
    starts from the seed and offset that each has then and moves the offset on; to seed one inside is an error (torch's
    note "CUDA Graph-safe RNG states"). Raises NotCaptured, or torch.OutOfMemoryError.
    """
    run()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        for generator in generators:  # a broken capture leaves their states marked as being captured
            generator.graphsafe_set_state(generator.clone_state())
        while isinstance(error.__context__, RuntimeError):  # the end of a broken capture fails, too
            error = error.__context__
        raise NotCaptured(str(error).strip().splitlines()[0]) from None
    return graph.replay


@dataclasses.dataclass(frozen=True)
class Roof:
    """What the machine does at best: GB/s that are only read, GB/s of a copy (read and written both counted), TFLOP/s
    of a dense product."""

    read: float
    copy: float
    dense: float

    def bandwidth(self, nbytes, written):
        """GB/s to hold `nbytes` against, of which `written` are written: those of reading where three quarters or more
        are read, as with few rows, else those of a copy."""
        return self.read if 4 * written <= nbytes else self.copy

    def ms(self, nbytes, written, flops):
        """The least milliseconds that these bytes and operations take."""
        return max(1e-6 * nbytes / self.bandwidth(nbytes, written), 1e-9 * flops / self.dense)


@functools.cache
def roof(device, dtype):
    """Roof in `dtype`, measured now.

    On a GPU with kernels of our own on random numbers, several passes in a graph: torch's copy_ is a memcpy node there,
    which the driver carries out as it likes (H100: 2,388 GB/s, against 3,006 of the same call outside a graph).
    The dense product comes after, so that its heat does not.
    """
    size = max((1 << 30 if device == "cuda" else 1 << 27), cache_bytes(device)) // 4
    size -= size % (bandwidth.BLOCK * bandwidth.TURNS)
    source = torch.randint(-(1 << 30), 1 << 30, (size,), dtype=torch.int32, device=device)
    if device == "cpu":
        source = source.float()
    target, sums = torch.empty_like(source), bandwidth.sums_of(source)
    mode, passes = ("graph", 8) if device == "cuda" else ("eager", 1)

    def repeated(once):
        def run(part: slice):
            return [once() for _ in range(passes)[part]]

        return clock(run, device, mode, passes)

    moved = interleaved(
        {
            "read": repeated(lambda: bandwidth.read(source, sums)),
            "copy": repeated(lambda: bandwidth.copy(source, target)),
        }
    )
    side = 8192 if device == "cuda" else 1024
    x, w = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    [(dense, _, _)] = interleaved({"": repeated(lambda: torch.mm(x, w))}).values()
    return Roof(4e-6 * size / moved["read"][0], 8e-6 * size / moved["copy"][0], 2e-9 * side**3 / dense)


def keep_memory():
    """Let the CPU's allocator keep what is freed: whether fresh pages are faulted in is then not left to chance, and a
    provider that makes temporary matrices is not charged for them."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most there can be
    libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def cache_bytes(device):
    """Weights run over are to be larger than this: 256 MB on a GPU, the last-level cache of a CPU."""
    if device == "cuda":
        return 256 << 20
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size", encoding="ascii") as file:
            return int(file.read().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 64 << 20


def machine(device):
    """What a number has to be read with: device, clocks, versions."""

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    if device == "cpu":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "cpu")
        return {"device": f"{name}, 1 thread", "versions": versions}
    versions["cuda"] = torch.version.cuda or torch.version.hip
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        answer = "unknown"
    return {"device": torch.cuda.get_device_name(), "versions": versions, "driver, clocks": answer}
