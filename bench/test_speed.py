"""The registry under pytest-benchmark: `pytest bench/test_speed.py`, on a CPU the small cases."""

import pytest
import torch

from qzo.bench import cases, run, timing
from qzo.bench.providers import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOSEN = [c for c in cases.default(DEVICE) if c.kind == "linear" and (DEVICE == "cuda" or c.n <= 576)]
TIMED = [p for p in run.PROVIDERS if "linear" in p.kinds]


@pytest.mark.parametrize("provider", TIMED, ids=lambda p: p.name)
@pytest.mark.parametrize("case", CHOSEN, ids=lambda c: c.name)
def test_speed(benchmark, case, provider):
    reason = provider.missing(DEVICE, case)
    if reason:
        pytest.skip(reason)
    built = provider.build(Problem(case, DEVICE, timing.cache_bytes(DEVICE)))
    assert run.error_of(built, Problem(case, DEVICE, 1)) <= built.allowed

    def once():
        built.run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(passes=built.passes, bytes=case.bytes, flops=case.flops)
    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
