"""Measure cases: every provider is checked against float64 first, then all that are right are timed in turn."""
import datetime
import gc
import math

import torch

from ..oom import explain, is_out_of_memory
from . import timing
from .peers import PROVIDERS as PEERS
from .providers import PROVIDERS as OWN_PROVIDERS
from .providers import Problem, error_of
from .results import SCHEMA
from .small import PROVIDERS as SMALL_PROVIDERS
from .small import Arena

LAYER_PROVIDERS = OWN_PROVIDERS + PEERS
PROVIDERS = LAYER_PROVIDERS + SMALL_PROVIDERS
NAMES = tuple(dict.fromkeys(p.name for p in PROVIDERS))
ADVICE = "fewer --rows or a smaller model in --filter asks for less"
# what a peer of another version may raise; each is reported in its row
FAILURES = (ImportError, AttributeError, TypeError, ValueError, KeyError, RuntimeError, NotImplementedError,
            AssertionError)


def check_providers(names):
    """ValueError naming the unknown ones and those there are."""
    unknown = [name for name in names or () if name not in NAMES]
    if unknown:
        raise ValueError(f"no provider {', '.join(unknown)}; there are {', '.join(NAMES)}")


def measure(case, device, names=None, least_bytes=None, least=timing.LEAST, seconds=None):
    """Result rows of one case: a provider each, also of those that are missing, wrong or failed."""
    problem_of = Problem if case.shapes else Arena
    problem = problem_of(case, device, timing.cache_bytes(device) if least_bytes is None else least_bytes)
    wanted = [p for p in PROVIDERS if case.kind in p.kinds and (not names or p.name in names)]
    built, errors, notes = {}, {}, {}
    for provider in wanted:
        reason = provider.missing(device, case)
        if reason:
            notes[provider.name] = f"missing: {reason}"
            continue
        try:
            made = provider.build(problem)
            errors[provider.name] = error_of(made, problem)
        except FAILURES as error:
            if is_out_of_memory(error):
                notes[provider.name] = explain(error, ADVICE)
                continue
            if not provider.package:
                raise                                        # ours: a fault, not another library's version
            notes[provider.name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if errors[provider.name] <= made.allowed:
            built[provider.name] = made
        else:
            notes[provider.name] = (f"wrong: relative error {errors[provider.name]:.3g}, at most {made.allowed:.3g} "
                                    "allowed; not timed")
        if device == "cuda":
            torch.cuda.empty_cache()
    try:
        times = timing.interleaved({name: b.run for name, b in built.items()}, device, least, seconds)
    except torch.OutOfMemoryError as error:
        times, notes = {}, notes | {name: explain(error, ADVICE) for name in built}
    rows = [_row(case, p.name, device, times.get(p.name), built.get(p.name), errors.get(p.name), notes.get(p.name))
            for p in wanted]
    _add_ratios(rows)
    built.clear()
    gc.collect()
    return rows


def _row(case, name, device, times, made, error, note):
    row = {"schema": SCHEMA, "case": case.name, "kind": case.kind, "provider": name, "rows": case.rows, "n": case.n,
           "k": case.k, "group": case.group, "bits": case.form.bits, "codes": case.codes, "dtype": case.dtype,
           "noise": case.noise, "ms": None, "p20": None, "p80": None, "gbps": None, "tflops": None,
           "bandwidth_fraction": None, "matmul_fraction": None, "ratio": None,
           "error": error if error is None or math.isfinite(error) else None, "note": note or "",
           **timing.machine(device), "date": datetime.date.today().isoformat()}
    if times is None:
        return row
    ms, p20, p80 = (t / made.passes for t in times)
    copy, dense = timing.roof(device, getattr(torch, case.dtype))
    gbps, tflops = 1e-6 * case.bytes / ms, 1e-9 * case.flops / ms
    return row | {"ms": ms, "p20": p20, "p80": p80, "gbps": gbps, "tflops": tflops,
                  "bandwidth_fraction": gbps / copy, "matmul_fraction": tflops / dense,
                  "copy_gbps": copy, "dense_tflops": dense}


def _add_ratios(rows):
    """ratio: the provider's time over qzo's in the same case, so above 1 where qzo is faster."""
    ours = next((r["ms"] for r in rows if r["provider"] == "qzo"), None)
    for row in rows:
        if ours and row["ms"]:
            row["ratio"] = row["ms"] / ours
