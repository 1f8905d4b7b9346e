"""The demo's step beside a dense forward: the same losses, and what the row says."""

import pytest
import torch

from qzo.bench import demo_step
from tests.support import tiny


def test_a_row_of_results(tmp_path, monkeypatch):
    tiny.stands_for_the_demos(tmp_path, monkeypatch, demo_step.demo)
    times = iter([5.0, 50.0, 6.0, 2.0, 9.0, 4.0, 7.0, 1.0])  # step and dense in turn; the first two warm up
    calls = []
    monkeypatch.setattr(demo_step, "milliseconds", lambda call: (calls.append(call()), next(times))[1])
    row = demo_step.measure(3)
    assert (row["step_ms"], row["dense_ms"], row["ratio"]) == (7.0, 2.0, 3.5)
    assert row["rows"] == 128
    stepped, dense = calls[0], calls[1]
    assert stepped == pytest.approx(dense.mean().item(), rel=0.02), "eps and rounding apart"
    assert torch.equal(dense, dense[:1].expand(8)), "no noise in the dense linears"
