"""Parts of gpu_check.py: the GPU tests, memory against what was predicted, benchmark cases, tiles."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMORY = (("meta-llama-2-7b", 1, 64), ("meta-llama-2-13b", 1, 64), ("meta-llama-2-13b", 16, 512))
CASES = (
    "4096x11008 rows 16 g128 float16 rademacher",
    "4096x11008 rows 1 g128 float16 rademacher",
    "step llama-2-7b 32 blocks rows 16",
    "4096x11008 rows 2048 g128 float16 rademacher",
    "4096x11008 rows 128 g128 float16 rademacher",
    "4096x11008 rows 512 g128 float16 rademacher",
    "4096x11008 rows 64 g128 float16 rademacher",
    "4096x11008 rows 2048 g128 bfloat16 rademacher",
    "4096x11008 rows 16 g64 float16 rademacher",
    "4096x11008 rows 16 g64 float16 rademacher nf4",
    "4096x11008 rows 1 g64 float16 rademacher",
    "4096x11008 rows 1 g64 float16 rademacher nf4",
    "4096x11008 rows 1 g4096 float16 rademacher",
    "4096x11008 rows 1 g4096 float16 rademacher aqlm 2x8",
    "4096x11008 rows 1 g4096 float16 rademacher aqlm 1x16",
    "update rademacher",
    "4096x11008 rows 8192 g128 bfloat16 rademacher",
    "sd3.5-large 2432x9728 rows 2048 g128 bfloat16",
)
TILES = tuple(
    f"llama-2-7b 4096x11008 rows {rows} g{group} float16 rademacher{codes}"
    for rows, group, codes in (
        (1, 128, ""),
        (16, 128, ""),
        (64, 128, ""),
        (128, 128, ""),
        (512, 128, ""),
        (2048, 128, ""),
        (16, 64, " nf4"),
        (16, 4096, " aqlm 2x8"),
    )
)


def failures():
    """What a part or a tile may break with on a machine that nobody has tried."""
    from triton.errors import TritonError

    from .run import FAILURES

    return (*FAILURES, TritonError, OSError, MemoryError, subprocess.SubprocessError, StopIteration)


def named(device, text):
    """The first case of a device whose name holds `text`."""
    from .cases import every

    return next(c for c in every(device) if text in c.name)


def tests(check):
    """pytest -m gpu, in several processes where pytest-xdist is there."""
    if importlib.util.find_spec("pytest") is None:
        check.note("tests", "GPU tests", note="pytest is not installed")
        return
    workers = ["-n", str(min(15, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *workers, "tests"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, check.left()))
        lines = done.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        check.note("tests", "GPU tests", note=lines[-1] if lines else done.stderr[-300:], failed=failed[:40])
    except subprocess.TimeoutExpired as stop:
        said = (stop.stdout or b"").decode(errors="replace").strip().splitlines()
        check.note("tests", "GPU tests", note=f"not done in {stop.timeout:.0f} s: {said[-1] if said else 'no output'}")


def memory(check):
    """Measured over predicted."""
    import torch

    from ..reports import memory as reports
    from ..system.memory import explain

    for config, rows, tokens in MEMORY:
        if check.left() < 15:
            check.note("memory", f"{config} {rows} x {tokens}", note="no time left")
            continue
        run = reports.Run(rows=rows, tokens=tokens)
        load, empty = reports.random_model(config, None, "none", check.device, check.dtype)
        predicted = reports.predict(empty, run, check.device, reports.this_chip())
        try:
            measured = reports.measure(load, run, check.device)
        except torch.OutOfMemoryError as error:
            check.note("memory", f"{config} {rows} x {tokens}", note=explain(error, "the next one is tried"))
            continue
        ratio = measured["total"] / predicted["total"]
        check.note(
            "memory",
            f"{config} {rows} x {tokens}",
            predicted=predicted,
            measured=measured,
            note=f"{measured['total'] / 1e9:.3f} GB, {ratio:.4f} of what was predicted",
        )


def bench(check):
    """The cases that the targets name, every provider."""
    from .run import measure

    for text in CASES:
        case = named(check.device, text)
        if check.left() < 10:
            check.note("bench", case.name, note="no time left")
            continue
        for row in measure(case, check.device, seconds=0.5):
            check.add(row)


def tiles(check):
    """Tiles that differ from the picked one in one thing; returns case -> the fastest and the picked one."""
    fastest = {}
    for text in TILES:
        case = named(check.device, text)
        times, picked = tiles_of(check, case)
        if times:
            best = min(times, key=times.get)
            fastest[case.name] = {
                "tile": dataclasses.asdict(best),
                "ms": times[best],
                "picked": dataclasses.asdict(picked),
                "picked_ms": times.get(picked),
            }
    return fastest


def launcher(case, device, least_bytes):
    """(run(tile, part), which sends a pair through the layers of the passes `part` and returns the last one's y;
    passes; the picked tile)."""
    from ..kernels.tiles import architecture
    from ..nn import ops
    from ..nn.evaluations import Evaluations
    from ..nn.layers import evaluating
    from .providers import EPS, EVERY, SEED, Problem

    problem = Problem(case, device, least_bytes)
    model, passes = problem.model()
    x, layers = problem.x[case.k], list(model)
    arch = architecture("cuda") if device == "cuda" else "interpreter"
    picked = ops.pick_tile(case.rows, layers[0].kernel_weight(), x.dtype, arch)
    evaluations = Evaluations([SEED, SEED], [EPS, -EPS], case.noise).to(device)

    def run(tile, part=EVERY):
        y = None
        with ops.backend("triton", tile=tile), evaluating(model, evaluations):
            for layer in layers[part]:
                y = layer(x)
        return y

    return run, passes, picked


def tiles_of(check, case):
    """(Tile -> ms of one product of the case, the picked tile). A tile has to agree with the picked one."""
    from . import timing

    run, passes, picked = launcher(case, check.device, timing.cache_bytes(check.device))
    mode = "graph" if check.device == "cuda" else "eager"
    want, times = run(picked).double(), {}
    for tile in [picked, *neighbours(picked)]:
        row = {
            "case": f"tile for {case.name}",
            "provider": " ".join(f"{k}={v}" for k, v in vars(tile).items()),
            "rows": case.rows,
            "n": case.n,
            "k": case.k,
            "group": case.group,
            "dtype": case.dtype,
            "noise": case.noise,
            "mode": mode,
        }
        if check.left() < 5:
            check.note("tile", **row, note="no time left")
            break
        try:
            error = float((run(tile).double() - want).norm() / want.norm())
            if not error < 1e-2:
                check.note("tile", **row, note=f"wrong: relative error {error:.3g}; not timed")
                continue
            row["error"] = error
            clock = timing.clock(lambda part, tile=tile: run(tile, part), check.device, mode, passes)
            [(ms, p20, p80)] = timing.interleaved({tile: clock}, seconds=0.2).values()
        except failures() as error:  # a tile that the compiler or the chip refuses
            check.note("tile", **row, note=f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
            continue
        times[tile] = ms
        check.note("tile", **row, ms=ms, p20=p20, p80=p80, ratio=ms / times[picked] if picked in times else None)
    return times, picked


def neighbours(tile):
    """Tiles that differ from this one in one thing."""
    found = [
        dataclasses.replace(tile, **{name: value})
        for name, value in (
            ("outputs", tile.outputs // 2),
            ("outputs", tile.outputs * 2),
            ("rows", tile.rows * 2),
            ("rows", tile.rows // 2),
            ("warps", 12 - tile.warps),
            ("stages", tile.stages - 1),
            ("stages", tile.stages + 1),
            ("ratio", not tile.ratio),
            ("splits", tile.splits * 2),
            ("splits", tile.splits // 2),
        )
    ]
    return [t for t in found if t.rows >= 16 and 32 <= t.outputs <= 256 and t.stages >= 2 and t.splits >= 1]
