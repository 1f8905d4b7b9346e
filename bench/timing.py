"""How long something takes: process time of one thread on a CPU, events around a replayed CUDA graph on a GPU.

What is compared is run in turn, so that a change of clock or load meets all alike; the median is reported with the
20th and 80th percentile. The caller sees to it that no cache holds the weights.
"""
import ctypes
import functools
import statistics
import subprocess
import time

import torch

WARM_UP = 1
LEAST, MOST = 5, 40          # turns
SECONDS = {"cpu": 0.5, "cuda": 2.0}      # of one run's turns together, once LEAST are done


def percentiles(times):
    """(median, p20, p80)."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def interleaved(runs, device, least=LEAST, seconds=None):
    """Milliseconds of each of `runs` (name -> function without arguments): name -> (median, p20, p80)."""
    seconds = SECONDS[device] if seconds is None else seconds
    clocks = {name: (_Graph(run) if device == "cuda" else _Process(run)) for name, run in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(WARM_UP):
        for clock in clocks.values():
            clock()
    for turn in range(MOST):
        if turn >= least and all(sum(t) >= 1e3 * seconds or len(t) >= MOST for t in times.values()):
            break
        for name, clock in clocks.items():
            if turn < least or sum(times[name]) < 1e3 * seconds:
                times[name].append(clock())
    return {name: percentiles(t) for name, t in times.items()}


class _Process:
    def __init__(self, run):
        self.run = run

    def __call__(self):
        begun = time.process_time()
        self.run()
        return 1e3 * (time.process_time() - begun)


class _Graph:
    """The run captured once; a run that cannot be captured is launched call by call."""

    def __init__(self, run):
        run()                                     # compiles
        torch.cuda.synchronize()
        self.replay = run
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            self.replay = graph.replay
        except RuntimeError:
            torch.cuda.synchronize()
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self):
        self.events[0].record()
        self.replay()
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1])


@functools.cache
def roof(device, dtype):
    """(GB/s of a copy, read and write both counted; TFLOP/s of a dense product in `dtype`), measured now."""
    size = (1 << 30 if device == "cuda" else 1 << 27) // 4
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    side = 8192 if device == "cuda" else 1024
    x, w = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(x, w)}, device)
    return 8e-6 * size / times["copy"][0], 2e-9 * side**3 / times["matmul"][0]


def keep_memory():
    """Let the CPU's allocator keep what is freed: whether fresh pages are faulted in is then not left to chance, and a
    provider that makes temporary matrices is not charged for them."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 << 20)           # M_MMAP_THRESHOLD, the most there can be
    libc.mallopt(-1, 1 << 30)            # M_TRIM_THRESHOLD


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
    import platform

    import triton

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
