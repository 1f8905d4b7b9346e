"""A whole step in one CUDA graph: evaluations, losses, derivatives, update; the host only reads the losses after it.

Seeds, coefficients and rates lie in device memory: each replay finds new ones there, nothing is captured again. The
step's bits are those of a step without a graph; the journal is written after the update instead of before, and loses
nothing by it, since a killed run takes its scales from the journal.
"""
import warnings

import torch

from .kernels.noise import law_number
from .optim import project, update


class GraphStep:
    """One captured step of an optimizer. Raises RuntimeError, as torch does, for a closure that cannot be captured."""

    def __init__(self, optimizer, closure):
        self.optimizer, self.closure = optimizer, closure
        self.evaluations = optimizer.evaluations()
        self.device = optimizer.arena.data.device
        self.rates = torch.tensor(optimizer.rates(), dtype=torch.float64, device=self.device)
        self.arena_data = optimizer.arena.data
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):            # compiles the kernels; a NaN rate leaves the scales as they are
            for _ in range(2):
                self._step(torch.full_like(self.rates, torch.nan))
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self._step(self.rates)

    def _step(self, rates):
        """float64 [4 J]: losses, derivatives, applied."""
        group = self.optimizer.param_groups[0]
        with self.optimizer.perturbed(self.evaluations):
            losses = self.closure().double()
        derivatives, applied = project(losses, rates, law_number(group["noise"]))
        update(self.optimizer.arena, self.evaluations.seeds[0::2].contiguous(), applied, group)
        return torch.cat([losses, derivatives, applied.double()])

    def run(self):
        """Replay with this step's seeds and rates; (losses, derivatives, applied) as lists."""
        now = self.optimizer.evaluations()
        self.evaluations.seeds.copy_(now.seeds, non_blocking=True)
        self.evaluations.kernel_coefs.copy_(now.kernel_coefs, non_blocking=True)
        self.rates.copy_(torch.tensor(self.optimizer.rates(), dtype=torch.float64), non_blocking=True)
        self.graph.replay()
        result = self.result.tolist()
        count = len(result) // 4
        return result[:2 * count], result[2 * count:3 * count], result[3 * count:]


def captured(optimizer, closure):
    """The optimizer's GraphStep, captured on first use; None, after a warning, where there cannot be one.

    Raises ValueError when the closure is not the one that was captured.
    """
    if optimizer.graph is None:
        device = optimizer.arena.data.device
        if device.type != "cuda":
            return _without(optimizer, f"the scales are on {device.type!r}, a graph needs a CUDA device")
        try:
            optimizer.graph = GraphStep(optimizer, closure)
        except RuntimeError as error:
            return _without(optimizer, f"this closure cannot be captured ({str(error).splitlines()[0]})")
    graph = optimizer.graph
    if graph.closure is not closure:
        raise ValueError("cuda_graph=True replays the closure of the first step, this is another one: define it once, "
                         "and let it read each batch from the same tensors (batch.copy_(new))")
    if graph.arena_data is not optimizer.arena.data:
        raise ValueError("the model has moved since its step was captured: make a new QZO")
    return graph


def _without(optimizer, why):
    optimizer.cuda_graph = False
    warnings.warn(f"cuda_graph=True: {why}; the steps run without a graph", stacklevel=4)
