"""Damaged files, the same in every run, and what a reader says of them within little memory."""

from collections import Counter
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from qzo.bench.fuzz.runs import PARSERS, little_memory, refusal, share, write
from tests.support.paths import FIXTURES as FIXTURES

CASES = 5000  # of all readers together
SAFETENSORS = save(
    {
        "a": torch.arange(6, dtype=torch.float16).view(2, 3),
        "b": torch.ones(4, dtype=torch.int32),
        "c": torch.zeros(0, 5),
    },
    metadata={"format": "pt"},
)
__all__ = ["FIXTURES", "SAFETENSORS", "fuzz", "little_memory"]


def fuzz(name, folder, cases=CASES):
    """A reader's share of so many cases, without one that crashes: Counter of what was "loaded" and "refused"."""
    make, read = PARSERS[name]
    ends: Counter[str] = Counter()
    chosen: dict[str, Any] = dict(max_examples=share(name, cases, PARSERS), deadline=None, database=None)

    @settings(**chosen, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def each(random):
        write(folder, make(random))
        ends["loaded" if refusal(read, folder) is None else "refused"] += 1

    with little_memory():
        each()
    return ends
