"""What Python costs a quantized linear, held without a GPU: the kernels' launch is a stand-in."""
import time

import pytest
import torch

import qzo
from qzo import ops
from qzo.bench import overhead
from qzo.kernels import plan

MOST_US = 30


def cpu_us(run, calls):
    """CPU microseconds of a call, in the quietest of nine runs."""
    run()
    found = []
    for _ in range(9):
        begun = time.thread_time()
        run()
        found.append(1e6 * (time.thread_time() - begun) / calls)
    return min(found)


@pytest.mark.parametrize("rows", [16, 512])
def test_a_linear_costs_python_thirty_microseconds_at_the_most(rows):
    """221 before layers had plans, on such a machine; nn.Linear's own call is 5 to 6."""
    torch.set_num_threads(1)
    assert cpu_us(overhead.quantized(rows), overhead.TURNS * overhead.LINEARS) < MOST_US


def test_a_check_at_every_call_is_seen(monkeypatch):
    """What the limit is there to find: a plan that is made anew each time."""
    monkeypatch.setattr("qzo.kernels.operands.Weight.keep", lambda self, key, made: made)
    assert cpu_us(overhead.quantized(16), overhead.TURNS * overhead.LINEARS) > MOST_US


def test_the_stand_in_is_what_would_be_launched_and_leaves_no_trace():
    kernel, uses_triton = plan._qmm_kernel, ops.uses_triton
    model, inputs, evaluations = overhead.block(16)
    with overhead.without_kernels("sm_90"), qzo.evaluating(model, evaluations):
        y = model(*inputs)
    assert (plan._qmm_kernel, ops.uses_triton) == (kernel, uses_triton)
    assert y.shape == (32, overhead.WIDTH)
    (made,) = model.mlp["down"].kernel_weight().plans.values()
    assert made.plan.constants["ASM"]
    assert made.plan.compiled is not None, "a second call goes past Triton"
    assert made.plan.parts == (made.plan.grid[2], 32, overhead.WIDTH)
