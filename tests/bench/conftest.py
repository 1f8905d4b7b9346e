"""What tests of several of the benchmark's modules stand on."""

import json

import pytest


@pytest.fixture
def quick_roof(monkeypatch):
    """A roof that is not measured: reads at 10 GB/s, copies at 5, multiplies at 0.1 TFLOP/s."""
    from qzo.bench import timing  # not before pytest_configure has said how kernels run

    monkeypatch.setattr(timing, "roof", lambda device, dtype: timing.Roof(10.0, 5.0, 0.1))


@pytest.fixture
def measured(tmp_path, quick_roof):
    """A results file of one case and every provider."""
    from qzo.bench import run
    from tests.support.bench_cases import CASE, FAST

    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in run.measure(CASE, "cpu", **FAST)))
    return path
