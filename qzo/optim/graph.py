"""Whole steps in CUDA graphs: evaluations, losses, derivatives, update; the host only reads the losses after them.
Or the losses alone, where a step is made of several batches.

A graph belongs to one closure and one shape of its batch: a batch is copied into the tensors that the graph was
captured on, and seeds, coefficients and rates lie in device memory too, so that a replay finds new ones there. The
step's bits are those of a step without a graph; the journal is written after the update instead of before, and loses
nothing by it, since a killed run takes its scales from the journal.
"""

import contextlib
import copy
import functools
import traceback
import warnings
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from ..kernels.noise import law_number
from ..loss.sums import means
from ..nn.arena import ScaleArena
from ..nn.evaluations import Evaluations
from ..nn.streaming.offload import offload_of
from .step import project, update

LIMIT = 8  # graphs held at once
PLAIN = str | int | float | bool | None | torch.dtype | torch.device
PERIOD = 256  # steps after which earlier uses count half

Closure = Callable[..., torch.Tensor | float]
Batch = Mapping[str, Any]
Result = tuple[list[float], list[float], list[float]]  # losses [E], derivatives [J], applied [J]
Returned = TypeVar("Returned")


class Optimizer(Protocol):
    """What is asked of a QZO here (optimizer.py is built on this file)."""

    module: nn.Module
    arena: ScaleArena
    param_groups: list[dict[str, Any]]
    large_rows: str
    cuda_graph: bool | None
    graphs: "Graphs | None"

    def evaluations(self) -> Evaluations:
        """Those of the coming step."""

    def losses(self, closure: Closure, evaluations: Evaluations, paired: bool) -> torch.Tensor:
        """[E] of the evaluations, or their sums [E, S]."""

    def rates(self) -> tuple[float, float, float]:
        """(lr / J, 2 eps, clip) of the coming step."""


class Recorder:
    """The calls of torch.cuda that capture a function; its graphs share one memory pool.

    Graphs of one pool overwrite each other's tensors when they are replayed. Nothing is lost by it here: a step's
    result is read to the host before the next replay, losses alone are copied. cuda: stands for torch.cuda in tests.
    """

    def __init__(self, device: torch.device, cuda: ModuleType = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        with cuda.device(device):
            self.pool = cuda.graph_pool_handle()
            self.side = cuda.Stream(device)

    def warm(self, run: Callable[[], Returned], times: int = 2) -> list[Returned]:
        """Call run() on the stream that will capture it: kernels are compiled, libraries take their memory."""
        current = self.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        with self.cuda.stream(self.side):
            results = [run() for _ in range(times)]
        current.wait_stream(self.side)
        return results

    def record(self, run: Callable[[], Returned]) -> tuple[torch.cuda.CUDAGraph, Returned]:
        """-> (graph, what run() returned: tensors that each replay fills). RuntimeError for what cannot be captured:
        the first one that was raised, not those that follow from it."""
        graph, first = self.cuda.CUDAGraph(), None
        try:
            # torch.cuda.graph leaves its stream current when the capture fails; the outer `stream` does not
            with (
                self.cuda.device(self.device),
                self.cuda.stream(self.cuda.current_stream(self.device)),
                self.cuda.graph(graph, pool=self.pool, stream=self.side),
            ):
                try:
                    result = run()
                except RuntimeError as error:
                    first = error
                    raise
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):  # says once more that the capture failed
                self.cuda.synchronize(self.device)
            raise (first or error) from None
        return graph, result


def recorder_of(device: torch.device) -> Recorder | None:
    """A Recorder of this device; None where there are no graphs."""
    return Recorder(device) if device.type == "cuda" else None


class GraphLosses:
    """Captured losses of an optimizer's evaluations: of a closure and its batch, or of one without (batch None).

    Raises RuntimeError, as torch does, for what cannot be captured, and where the graph's losses are not those of the
    same forward without it, which gave the same twice: its Python code takes another way while it is captured.
    """

    def __init__(
        self, optimizer: Optimizer, closure: Closure, batch: Batch | None, paired: bool, recorder: Recorder
    ) -> None:
        self.optimizer, self.paired = optimizer, paired
        self.batch = None if batch is None else _static(batch)
        self.call = closure if batch is None else functools.partial(closure, self.batch)
        self.evaluations = optimizer.evaluations()
        plain, again = (self._bits(result) for result in recorder.warm(self._run))
        self.graph, self.result = recorder.record(self._run)
        self.graph.replay()
        if torch.equal(plain, again) and not torch.equal(self._bits(self.result), plain):
            self.graph.reset()
            raise RuntimeError(
                "its losses in a graph are not those without: something in it asks whether it is being "
                "captured, or reads what was there then"
            )

    def _run(self) -> torch.Tensor:
        """What is captured: float64, the losses [E] first."""
        return means(self.optimizer.losses(self.call, self.evaluations, self.paired))

    def _bits(self, result: torch.Tensor) -> torch.Tensor:
        """The bits of a result's losses, on the host: NaN equals itself."""
        return result[: len(self.evaluations)].cpu().view(torch.int64)

    def replay(self, batch: Batch | None) -> torch.Tensor:
        """The result for this batch and the coming evaluations, in a tensor that other replays overwrite."""
        now, held = self.optimizer.evaluations(), _tensors(self.batch)
        for name, tensor in _tensors(batch).items():
            held[name].copy_(tensor, non_blocking=True)
        self.evaluations.seeds.copy_(now.seeds, non_blocking=True)
        self.evaluations.kernel_coefs.copy_(now.kernel_coefs, non_blocking=True)
        self.graph.replay()
        return self.result


class GraphStep(GraphLosses):
    """A captured step: losses, derivatives, update."""

    def __init__(self, optimizer: Optimizer, *captured: Any) -> None:
        # until the first run NaN: a step by a NaN leaves the scales as they are
        self.rates = torch.full((3,), torch.nan, dtype=torch.float64, device=optimizer.arena.data.device)
        super().__init__(optimizer, *captured)

    def _run(self) -> torch.Tensor:
        """float64 [E + 2 J]: losses, derivatives, applied."""
        losses, group = super()._run(), self.optimizer.param_groups[0]
        derivatives, applied = project(losses, self.rates, law_number(group["noise"]), group["one_sided"])
        seeds = self.evaluations.seeds.view(len(applied), -1)[:, 0].contiguous()
        update(self.optimizer.arena, seeds, applied, group)
        return torch.cat([losses, derivatives, applied.double()])

    def replay(self, batch: Batch | None) -> torch.Tensor:
        """As above, at the rates of the coming step."""
        self.rates.copy_(torch.tensor(self.optimizer.rates(), dtype=torch.float64), non_blocking=True)
        return super().replay(batch)


class Graphs:
    """What is captured of an optimizer's steps, at most `limit` graphs, by closure and shape of the batch.

    What comes for the first time runs without a graph, since it may not come again. Once there are `limit` graphs,
    another takes the place of the least used if it is used twice as often (lately: uses count half after PERIOD
    steps), so that more shapes than there is room for cost plain steps, not endless captures.
    """

    def __init__(self, optimizer: Optimizer, recorder: Recorder, limit: int = LIMIT) -> None:
        self.optimizer, self.recorder, self.limit = optimizer, recorder, limit
        self.captured: dict[Hashable, GraphLosses] = {}
        self.uses: dict[Hashable, int] = {}
        self.steps = 0
        self.arena_data = optimizer.arena.data  # what the graphs read: they end when the model moves
        self.off = self.said = False
        self.closure: Closure | None = None

    def step(self, closure: Closure, batch: Batch | None, paired: bool) -> Result | None:
        """The (losses, derivatives, applied) of a step that ran as a graph, or None: run it without."""
        captured = self._captured(GraphStep, closure, batch, paired)
        if captured is None:
            return None
        result, count = captured.replay(batch).tolist(), len(captured.evaluations)
        middle = (count + len(result)) // 2
        return result[:count], result[count:middle], result[middle:]

    def losses(self, closure: Closure, batch: Batch | None, paired: bool) -> torch.Tensor | None:
        """The losses of the coming evaluations from a graph, float64 [E], or None: make them without."""
        captured = self._captured(GraphLosses, closure, batch, paired)
        return None if captured is None else captured.replay(batch).clone()

    def _captured(
        self, kind: type[GraphLosses], closure: Closure, batch: Batch | None, paired: bool
    ) -> GraphLosses | None:
        """What to replay, captured now if it is worth it; None: run without."""
        if self.off or (batch is None and not self._comes_again(closure)):
            return None
        try:
            settings = _recipe(self.optimizer.param_groups[0])
            key = (kind.__name__, closure, paired, self.optimizer.large_rows, *settings, *_form(batch))
            hash(key)
            if batch is not None and not isinstance(batch, MutableMapping):
                raise TypeError(f"a {type(batch).__name__} cannot be written to")
        except TypeError as error:
            self.give_up(f"the batch cannot be kept in tensors that stay ({error})")
            return None
        self._count(key, 1 if batch is not None else 2)
        if key not in self.captured:
            if not self._worth_it(key):
                return None
            try:
                self.captured[key] = kind(self.optimizer, closure, batch, paired, self.recorder)
            except RuntimeError as error:
                self.give_up(
                    f"{where(self.optimizer.module, error, 'the closure')} cannot be captured "
                    f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
                )
                return None
        return self.captured[key]

    def drop(self) -> None:
        """Give the graphs' memory back."""
        for graph in self.captured.values():
            graph.graph.reset()
        self.captured.clear()

    def give_up(self, why: str) -> None:
        """No graphs any more, after a warning."""
        self.off = True
        self.drop()
        warnings.warn(f"cuda_graph: {why}; the steps run without a graph", stacklevel=6)

    def _comes_again(self, closure: Closure) -> bool:
        """Whether a closure is that of the step before."""
        again, other = closure is self.closure, self.closure is not None and closure is not self.closure
        self.closure = closure
        if other and not self.said and not self.captured:
            self.said = True
            warnings.warn(
                "cuda_graph=True: this step has another closure than the one before, and a graph replays one "
                "closure: define it once and let it take each batch, step(closure, batch=batch), or read "
                "it from the same tensors",
                stacklevel=6,
            )
        return again

    def _count(self, key: Hashable, uses: int) -> None:
        if self.steps >= PERIOD:
            self.steps = 0
            self.uses = {key: count // 2 for key, count in self.uses.items() if count > 1 or key in self.captured}
        self.steps += 1
        self.uses[key] = max(self.uses.get(key, 0) + 1, uses)

    def _worth_it(self, key: Hashable) -> bool:
        """Whether to capture a step; makes room for it."""
        if self.uses[key] < 2:
            return False
        if len(self.captured) < self.limit:
            return True
        least = min(self.captured, key=self.uses.__getitem__)
        if self.uses[key] < 2 * self.uses[least]:
            return False
        self.captured.pop(least).graph.reset()
        return True


def graphs_of(optimizer: Optimizer) -> Graphs | None:
    """The Graphs of an optimizer, new where its model has moved; None where there are none, which is said once if they
    were asked for."""
    arena_data, graphs = optimizer.arena.data, optimizer.graphs
    if graphs is not None and graphs.arena_data is arena_data:
        return graphs
    if graphs is not None:
        graphs.drop()
    offloaded = offload_of(optimizer.module) is not None
    recorder = None if offloaded else recorder_of(arena_data.device)
    if recorder is None and optimizer.cuda_graph:
        optimizer.cuda_graph = False
        why = (
            "the model is offloaded, and which block is copied next is decided by the host while it runs"
            if offloaded
            else f"the scales are on {arena_data.device.type!r}, a graph needs a CUDA device"
        )
        warnings.warn(f"cuda_graph=True: {why}; the steps run without a graph", stacklevel=5)
    return None if recorder is None else Graphs(optimizer, recorder)


def _recipe(group: dict[str, Any]) -> tuple[Hashable, ...]:
    """What of an optimizer's settings is captured as it is; lr, eps and clip are not."""
    return tuple(group[name] for name in ("directions", "one_sided", "noise", "relative", "sharing", "floor"))


def _tensors(batch: Batch | None) -> dict[str, torch.Tensor]:
    return {name: value for name, value in (batch or {}).items() if isinstance(value, torch.Tensor)}


def _form(batch: Batch | None) -> tuple[Hashable, ...]:
    """Names, shapes, dtypes and other values of a batch, hashable. TypeError for a value that cannot be compared."""
    form: list[Hashable] = []
    for name, value in sorted((batch or {}).items()):
        if not isinstance(value, torch.Tensor | PLAIN):
            raise TypeError(f"{name} is a {type(value).__name__}, tensors and plain values are wanted")
        form.append((name, (value.shape, value.dtype, value.device) if isinstance(value, torch.Tensor) else value))
    return tuple(form)


def _static(batch: Batch) -> Batch:
    """A copy of the batch whose tensors stay."""
    static = cast(MutableMapping[str, Any], copy.copy(batch))
    static.update({name: tensor.clone() for name, tensor in _tensors(batch).items()})
    return static


def where(module: nn.Module, error: BaseException, otherwise: str) -> str:
    """The innermost of a module's own modules in which an error was raised, name and type, for a message; otherwise:
    what is named where it was raised in none."""
    names = {id(m): f"{name or 'the model'} ({type(m).__name__})" for name, m in module.named_modules()}
    inside = [
        names[id(frame.f_locals.get("self"))]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if id(frame.f_locals.get("self")) in names
    ]
    return inside[-1] if inside else otherwise
