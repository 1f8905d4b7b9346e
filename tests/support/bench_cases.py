"""Small cases of the benchmark, what runs one of them, and rows of a results file."""

import dataclasses

from qzo.bench import cases, results, run
from qzo.bench.providers import Problem
from qzo.bench.small import Arena

CASE = cases.Case("linear", "smollm2-135m", 192, 64, 3, 64, "float32", "ih4")
NF4_CASE = dataclasses.replace(CASE, codes="nf4")
STEP = cases.Case("step", "smollm2-135m", 0, 0, 2, 64, "float32", blocks=1)
UPDATE = cases.Case("update", "", 0, 5000, 0)
FAST = dict(least_bytes=1, least=2, seconds=0.0)


def built(name, case, least_bytes=1):
    """What a provider of this name runs for a case."""
    problem = (Problem if case.shapes else Arena)(case, "cpu", least_bytes)
    return next(p for p in run.PROVIDERS if p.name == name and case.kind in p.kinds).build(problem)


def rows_of(device, *timed, schema=results.SCHEMA):
    """Rows of one case: (provider, mode, ms)."""
    versions = {"torch": "2.13"} | ({"cuda": "13.0"} if device == "H100" else {})
    rows = [
        {
            **dict.fromkeys(results.FIELDS),
            "schema": schema,
            "kind": "step",
            "case": "step a",
            "note": "",
            "device": device,
            "versions": versions,
            "date": "2026-11-28",
            "provider": provider,
            "mode": mode,
            "ms": ms,
            "p20": ms,
            "p80": ms,
        }
        for provider, mode, ms in timed
    ]
    run.add_ratios(rows)
    return rows
