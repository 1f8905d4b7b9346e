"""What Python costs a quantized linear before a GPU is involved: a block's seven, no kernel launched.

The kernels' stand-in takes the arguments and returns, so what is timed is the layer, the look-up of its plan, outputs
and scratch (in ordinary memory), and the call. Triton's own launcher, some microseconds of C, is not in it. It runs on
any machine: a regression shows without a GPU.
"""

import contextlib
import unittest.mock

import torch
from torch import nn

from ..kernels import plan
from ..nn import ops
from ..nn.choice import quantize_
from ..nn.evaluations import Evaluations
from ..nn.layers import evaluating, layers
from ..nn.weights import to_planes

WIDTH, WIDER = 1024, 2048  # so many inputs that few rows split them; codes are never read


class _NoKernel:
    """Stands for a Triton kernel and for what it is compiled to."""

    def __init__(self, kernel):
        self.fn, self.arg_names = kernel.fn, kernel.arg_names

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *arguments, **constants):
        return self


@contextlib.contextmanager
def without_kernels(arch="sm_90"):
    """Inside, layers on a CPU do what they would on a GPU of `arch`, and launch nothing: outputs hold anything."""
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (plan, "_qmm_kernel", _NoKernel(plan._qmm_kernel)),
            (plan, "_group_sums_kernel", _NoKernel(plan._group_sums_kernel)),
            (ops, "uses_triton", lambda device: True),
            (ops, "_architecture", lambda device: arch),
        ):
            stack.enter_context(unittest.mock.patch.object(module, name, value))
        yield


class Block(nn.Module):
    """A Llama block's linears: q, k and v are given the same x, and gate and up."""

    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.attention = nn.ModuleDict({name: linear(WIDTH, WIDTH, bias=False) for name in "qkvo"})
        shapes = {"gate": (WIDTH, WIDER), "up": (WIDTH, WIDER), "down": (WIDER, WIDTH)}
        self.mlp = nn.ModuleDict({name: linear(*shape, bias=False) for name, shape in shapes.items()})

    def forward(self, x, wide):
        attention, mlp = self.attention, self.mlp
        attention["q"](x), attention["k"](x), attention["v"](x)
        attention["o"](x)
        mlp["gate"](x), mlp["up"](x)
        return mlp["down"](wide)


def block(rows):
    """(quantized Block with codes as a GPU holds them, its two inputs for a pair of `rows`, evaluations)."""
    model = quantize_(Block(), skip=())
    for layer in layers(model).values():
        layer.out_dtype = torch.float16
        layer.codes = to_planes(layer.codes, layer.in_features, layer.bits)
    inputs = [torch.randn(2 * rows, width).half() for width in (WIDTH, WIDER)]
    return model, inputs, Evaluations([7, 7], [1e-2, -1e-2])


TURNS, LINEARS = 20, 7


def quantized(rows):
    """run(), which calls the seven linears TURNS times under a pair of evaluations."""
    model, inputs, evaluations = block(rows)

    @torch.no_grad()
    def run(part=None):
        with without_kernels(), evaluating(model, evaluations):
            for _ in range(TURNS):
                model(*inputs)

    return run


def dense():
    """run() of the same block of nn.Linear, of one input, output and row: what any eager linear costs."""
    model = Block(lambda k, n, bias: nn.Linear(1, 1, bias=bias))
    x = torch.ones(1, 1)

    @torch.no_grad()
    def run(part=None):
        for _ in range(TURNS):
            model(x, x)

    return run
