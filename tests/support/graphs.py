"""A stand-in for CUDA graphs on CPU tensors: what is captured may not look at a value, and runs again on a replay.

It keeps what the real ones demand: host reads raise while something is captured, a replay fills the tensors of the
capture, the tensors of the other graphs in the pool are lost by it, and a graph that was reset cannot be replayed.
"""

import contextlib
import sys
from types import FrameType, ModuleType

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qzo
from qzo.optim import graph

HOST_READS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::is_nonzero",
    "aten::repeat_interleave.Tensor",
)
REFUSED = "operation not permitted when stream is capturing"


class NoHostReads(TorchDispatchMode):
    """Inside, an operator whose shape or result the host has to wait for raises what CUDA does; not in the kernels,
    whose CPU references are others than what a GPU runs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        masks = name == "aten::index.Tensor" and any(part is not None and part.dtype == torch.bool for part in args[1])
        if (masks or name in HOST_READS) and not _in_kernels():
            raise RuntimeError(f"{REFUSED} ({name})\nsecond line")
        return func(*args, **(kwargs or {}))


def _in_kernels():
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if "/kernels/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def capturing():
    """Inside, torch says that the current stream is being captured, and host reads raise."""
    real, torch.cuda.is_current_stream_capturing = torch.cuda.is_current_stream_capturing, lambda: True
    try:
        with NoHostReads():
            yield
    finally:
        torch.cuda.is_current_stream_capturing = real


class Graph:
    def __init__(self, recorder, run, result):
        self.recorder, self.run, self.result, self.replays, self.dead = recorder, run, result, 0, False

    def replay(self):
        assert not self.dead, "a graph was replayed after its reset"
        self.replays += 1
        for other in self.recorder.graphs:
            other.result.fill_(torch.nan)
        with capturing():
            self.result.copy_(self.run())

    def reset(self):
        self.dead = True


class Recorder:
    """What qzo.optim.graph.Recorder does, for any device."""

    def __init__(self, device=None):
        self.graphs = []

    def warm(self, run, times=2):
        return [run() for _ in range(times)]

    def record(self, run):
        with capturing():
            result = run().clone()
        self.graphs.append(Graph(self, run, result))
        return self.graphs[-1], result

    @property
    def alive(self):
        return [graph for graph in self.graphs if not graph.dead]


class Cuda(ModuleType):
    """What qzo.optim.graph.Recorder calls of torch.cuda, with a log; a stream is a text."""

    def __init__(self):
        super().__init__("cuda")
        self.log, self.now, self.pools = [], "main", 0

    def graph_pool_handle(self):
        self.pools += 1
        return f"pool {self.pools}"

    def device(self, device):
        return contextlib.nullcontext()

    def Stream(self, device):
        cuda = self

        class Side:
            def wait_stream(self, other):
                cuda.log.append(("side waits for", other))

        return Side()

    def current_stream(self, device):
        return _Main(self)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def synchronize(self, device):
        self.log.append("synchronize")
        raise RuntimeError("still says that the capture failed")

    def CUDAGraph(self):
        return object()

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        """As torch.cuda.graph: when the capture fails, its stream stays the current one and another error is raised."""
        self.log.append(("captures in", pool))
        before, self.now = self.now, stream
        try:
            yield
        except RuntimeError:
            raise RuntimeError("capture invalidated") from None
        self.now = before


class _Main:
    def __init__(self, cuda):
        self.cuda = cuda

    def wait_stream(self, other):
        self.cuda.log.append("main waits")


def stand_in(monkeypatch):
    """From now on every device has such graphs; returns the list of the recorders that will be made."""
    made = []

    def recorder_of(device):
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setattr(graph, "recorder_of", recorder_of)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


# ------------------------------------------------------------------------------------------------ what is captured

ROWS = [1, 2, 1, 1, 2, 2, 3, 1, 2, 3, 3]


def two_layers(seed=0):
    torch.manual_seed(seed)
    return qzo.quantize_(nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)), group_size=32)


def losses_of(model, count):
    """A closure of a batch."""

    def losses(batch):
        return model(batch["x"]).float().square().mean(1).view(count, -1).mean(1)

    return losses


def batches(rows, count=4):
    """One batch a step, of so many rows under each evaluation, no two alike."""
    for step, number in enumerate(rows):
        generator = torch.Generator().manual_seed(step)
        yield qzo.pair({"x": torch.randn(number, 96, generator=generator)}, count)


def steps(optimizer, closure, given):
    """A step on each batch."""
    for batch in given:
        optimizer.step(closure, batch=batch)


class Reads(nn.Module):
    """Looks at a value on the way."""

    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


def closure_steps(model, x, cuda_graph, count):
    """The optimizer after steps of one closure that finds each batch in x, [4, 96]."""

    def closure():
        return model(x).float().square().mean(1)

    optimizer = qzo.QZO(model, lr=0.1, directions=2, cuda_graph=cuda_graph)
    for t in range(count):
        x.copy_(torch.randn(1, 96, generator=torch.Generator().manual_seed(t)).expand(4, 96))
        optimizer.step(closure)
    return optimizer
