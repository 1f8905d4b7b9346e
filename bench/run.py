"""Measure cases: every provider is checked against float64 first, then all that are right are timed in turn.

On a GPU all are CUDA graphs; steps are timed call by call, too. Who cannot be captured is timed call by call, and qzo
beside it once more: a ratio is between two rows of one mode.
"""

import datetime
import gc
import importlib.metadata
import math

import torch

from ..system.memory import explain, is_out_of_memory
from . import timing
from .cases import DTYPES
from .peers import PROVIDERS as PEERS
from .providers import PROVIDERS as OWN_PROVIDERS
from .providers import Problem, error_of
from .results import NOT_THERE, SCHEMA
from .small import PROVIDERS as SMALL_PROVIDERS
from .small import Arena

LAYER_PROVIDERS = OWN_PROVIDERS + PEERS
PROVIDERS = LAYER_PROVIDERS + SMALL_PROVIDERS
NAMES = tuple(dict.fromkeys(p.name for p in PROVIDERS))
ADVICE = "fewer --rows or a smaller model in --filter asks for less"
# what a peer of another version may raise; each is reported in its row
FAILURES = (
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
    KeyError,
    RuntimeError,
    NotImplementedError,
    AssertionError,
)


def check_providers(names):
    """ValueError naming the unknown ones and those there are."""
    unknown = [name for name in names or () if name not in NAMES]
    if unknown:
        raise ValueError(f"no provider {', '.join(unknown)}; there are {', '.join(NAMES)}")


def modes(case, device):
    """How a case's providers are timed: of timing.MODES."""
    if device == "cpu":
        return ("eager",)
    return timing.MODES if case.kind == "step" else ("graph",)


def measure(case, device, names=None, least_bytes=None, least=timing.LEAST, seconds=None):
    """Result rows of one case: one for each provider and mode, also of those that are not there, wrong or failed."""
    problem_of = Problem if case.shapes else Arena
    problem = problem_of(case, device, timing.cache_bytes(device) if least_bytes is None else least_bytes)
    wanted = [p for p in PROVIDERS if case.kind in p.kinds and (not names or p.name in names)]
    built, errors, notes = {}, {}, {}
    for provider in wanted:
        reason = provider.missing(device, case)
        if reason:
            notes[provider.name] = f"{NOT_THERE[0]}: {reason}"
            continue
        try:
            made = provider.build(problem)
            errors[provider.name] = error_of(made, problem)
        except FAILURES as error:
            if is_out_of_memory(error):
                notes[provider.name] = explain(error, ADVICE)
                continue
            if not provider.package:
                raise  # ours: a fault, not another library's version
            notes[provider.name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if errors[provider.name] <= made.allowed:
            built[provider.name] = made
        else:
            notes[provider.name] = _wrong(provider, case, errors[provider.name], made.allowed)
        if device == "cuda":
            torch.cuda.empty_cache()
    try:
        times = timing.interleaved(
            _clocks(built, modes(case, device), device, notes),
            least,
            timing.SECONDS[device] if seconds is None else seconds,
        )
    except torch.OutOfMemoryError as error:
        times, notes = {}, notes | {name: explain(error, ADVICE) for name in built}
    rows = [
        _row(case, p.name, device, mode, times.get((p.name, mode)), errors.get(p.name), notes.get(p.name))
        for p in wanted
        for mode in [m for m in timing.MODES if (p.name, m) in times] or (None,)
    ]
    add_ratios(rows)
    built.clear()
    gc.collect()
    return rows


def left_out(case, device, why):
    """The row of a case that is not measured."""
    return _row(case, "qzo", device, None, None, None, why)


def _wrong(provider, case, error, allowed):
    whose = f"{provider.name} ({provider.package} {_version(provider.package)})" if provider.package else provider.name
    return (
        f"wrong: what {whose} gives for {2 * case.rows} rows is off by {error:.3g} of its size (root mean square, "
        f"against float64; at most {allowed:.3g} allowed); not timed"
    )


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _clocks(built, wanted, device, notes):
    """(provider, mode) -> its clock; a note for those that there is no graph of."""

    def clock(made, mode):
        return timing.clock(made.run, "cpu" if made.host else device, mode, made.passes, made.generators)

    clocks = {}
    for name, made in built.items():
        for mode in ("eager",) if made.host else wanted:
            try:
                clocks[name, mode] = clock(made, mode)
            except timing.NotCaptured as error:
                notes[name] = f"timed without a graph: none could be captured ({error})"
                clocks[name, "eager"] = clock(made, "eager")
    if "qzo" in built and ("qzo", "eager") not in clocks and any(mode == "eager" for _, mode in clocks):
        clocks["qzo", "eager"] = clock(built["qzo"], "eager")
    return clocks


def _row(case, name, device, mode, times, error, note):
    row = {
        "schema": SCHEMA,
        "case": case.name,
        "kind": case.kind,
        "provider": name,
        "mode": mode,
        "rows": case.rows,
        "n": case.n,
        "k": case.k,
        "group": case.group,
        "bits": case.form.bits,
        "codes": case.codes,
        "dtype": case.dtype,
        "noise": case.noise,
        "ms": None,
        "p20": None,
        "p80": None,
        "gbps": None,
        "tflops": None,
        "bandwidth_fraction": None,
        "matmul_fraction": None,
        "roof_ms": None,
        "ratio": None,
        "error": error if error is None or math.isfinite(error) else None,
        "note": note or "",
        **timing.machine(device),
        "date": datetime.date.today().isoformat(),
    }
    if times is None:
        return row
    ms, p20, p80 = times
    row |= {"ms": ms, "p20": p20, "p80": p80}
    if not case.bytes:
        return row
    roof = timing.roof(device, DTYPES[case.dtype])
    gbps, tflops = 1e-6 * case.bytes / ms, 1e-9 * case.flops / ms
    return row | {
        "gbps": gbps,
        "tflops": tflops,
        "bandwidth_fraction": gbps / roof.bandwidth(case.bytes, case.written),
        "matmul_fraction": tflops / roof.dense,
        "roof_ms": roof.ms(case.bytes, case.written, case.flops),
        "read_gbps": roof.read,
        "copy_gbps": roof.copy,
        "dense_tflops": roof.dense,
    }


def add_ratios(rows):
    """ratio: the provider's time over qzo's in the same case and mode, so above 1 where qzo is faster; in place."""
    ours = {(r["case"], r["mode"]): r["ms"] for r in rows if r["provider"] == "qzo"}
    for row in rows:
        mine = ours.get((row["case"], row["mode"]))
        if mine and row["ms"]:
            row["ratio"] = row["ms"] / mine
