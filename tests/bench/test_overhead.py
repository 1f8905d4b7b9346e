"""What Python does for a quantized linear, held without a GPU: the kernels' launch is a stand-in."""

import sys

import pytest

import qzo
from qzo.bench import overhead
from qzo.kernels import plan
from qzo.nn import ops

MOST_CALLS = 70  # 46 and 57 were counted, at 10 to 15 microseconds; without plans there are 115 and 300


def calls_of_a_linear(run):
    """Calls of Python and C functions per linear, once plans are made: what its microseconds are made of.

    `qzo bench run --filter overhead` has the microseconds; they depend on what else a machine does, these do not.
    """
    run()
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count / (overhead.TURNS * overhead.LINEARS)


@pytest.mark.parametrize("rows", [16, 512])
def test_a_linear_makes_few_calls(rows):
    assert calls_of_a_linear(overhead.quantized(rows)) < MOST_CALLS


@pytest.mark.parametrize("rows", [16, 512])
def test_a_check_at_every_call_is_seen(monkeypatch, rows):
    """What the limit is there to find: a plan that is made anew each time."""
    monkeypatch.setattr("qzo.kernels.operands.Weight.keep", lambda self, key, made: made)
    assert calls_of_a_linear(overhead.quantized(rows)) > MOST_CALLS


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
