"""What Python costs a quantized linear, held without a GPU: the kernels' launch is a stand-in."""

import time

import pytest
import torch

import qzo
from qzo.bench import overhead
from qzo.kernels import plan
from qzo.nn import ops

MOST_US = 30  # of a core on which nn.Linear's own call takes QUIET_US: a busy one takes longer for both
QUIET_US = 5.6


def quiet_us(run):
    """CPU microseconds of a linear, of a core where nn.Linear's call takes QUIET_US: the quietest of sixty runs of
    either, in turn (other processes empty the caches that Python lives in)."""
    plain = overhead.dense()
    found: dict[object, list[float]] = {}
    for function in (run, plain) * 60:
        begun = time.thread_time()
        function()
        found.setdefault(function, []).append(time.thread_time() - begun)
    return QUIET_US * min(found[run]) / min(found[plain])


@pytest.mark.parametrize("rows", [16, 512])
def test_a_linear_costs_python_thirty_microseconds_at_the_most(rows):
    """221 before layers had plans, on such a machine; nn.Linear's own call is 5 to 6."""
    torch.set_num_threads(1)
    assert quiet_us(overhead.quantized(rows)) < MOST_US


def test_a_check_at_every_call_is_seen(monkeypatch):
    """What the limit is there to find: a plan that is made anew each time."""
    usual = quiet_us(overhead.quantized(16))
    monkeypatch.setattr("qzo.kernels.operands.Weight.keep", lambda self, key, made: made)
    assert quiet_us(overhead.quantized(16)) > 1.5 * usual


def test_the_stand_in_is_what_would_be_launched_and_leaves_no_trace():
    kernel, uses_triton = plan._qmm_kernel, ops.uses_triton
    model, inputs, evaluations = overhead.block(16)
    with overhead.without_kernels("sm_90"), qzo.evaluating(model, evaluations):
        y = model(*inputs)
    assert (plan._qmm_kernel, ops.uses_triton) == (kernel, uses_triton)
    assert y.shape == (32, overhead.WIDTH)
    (made,) = model.mlp["down"].kernel_weight().plans.values()
    assert made.plan.constants.ASM
    assert made.plan.compiled is not None, "a second call goes past Triton"
    assert made.plan.parts == (made.plan.grid[2], 32, overhead.WIDTH)
