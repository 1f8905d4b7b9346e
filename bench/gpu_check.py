"""What only a GPU can tell, in one command of under nine minutes: `python bench/gpu_check.py [--out FILE]`.

In this order, each within its share of the time: the GPU tests; memory and whole steps of Llama-2-7B and 13B (random
weights) against what was foretold; the benchmark cases that the targets name; tiles beside the one that would be
picked. A part that fails or runs out of time is a row with a note, and the others go on. Writes one results file that
`qzo bench table` reads, and the fastest tile of each case as JSON. Without a GPU it says so and exits with 2.
"""
import argparse
import dataclasses
import datetime
import importlib.util
import json
import runpy
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:                       # run as a file: as the module that it is
    sys.path[0] = str(ROOT)
    runpy.run_module("qzo.bench.gpu_check", run_name="__main__", alter_sys=True)
    sys.exit()

SECONDS = 500
SHARES = {"tests": 150, "memory": 110, "bench": 150, "tiles": 90}       # of SECONDS; what a part leaves, the next has
MEMORY = (("meta-llama-2-7b", 1, 64), ("meta-llama-2-13b", 1, 64), ("meta-llama-2-13b", 16, 512))
CASES = ("4096x11008 rows 16 g128 float16 rademacher", "4096x11008 rows 1 g128 float16 rademacher",
         "4096x11008 rows 16 g64 float16 rademacher", "4096x11008 rows 16 g64 float16 rademacher nf4",
         "4096x11008 rows 1 g64 float16 rademacher", "4096x11008 rows 1 g64 float16 rademacher nf4",
         "4096x11008 rows 1 g4096 float16 rademacher", "4096x11008 rows 1 g4096 float16 rademacher aqlm 2x8",
         "4096x11008 rows 1 g4096 float16 rademacher aqlm 1x16",
         "4096x11008 rows 2048 g128 bfloat16 rademacher", "4096x11008 rows 512 g128 float16 rademacher",
         "4096x11008 rows 128 g128 float16 rademacher", "step llama-2-7b 32 blocks rows 16",
         "update rademacher", "noise rademacher", "4096x11008 rows 8192 g128 bfloat16 rademacher",
         "sd3.5-large 2432x9728 rows 2048 g128 bfloat16")
TILES = tuple(f"llama-2-7b 4096x11008 rows {rows} g{group} float16 rademacher{codes}" for rows, group, codes in (
    (16, 128, ""), (128, 128, ""), (512, 128, ""), (2048, 128, ""), (16, 64, " nf4"),
    (16, 4096, " aqlm 2x8")))


def failures():
    """What a part or a tile may break with on a machine that nobody has tried."""
    from triton.errors import TritonError

    from .run import FAILURES
    return (*FAILURES, TritonError, OSError, MemoryError, subprocess.SubprocessError, StopIteration)


class Check:
    """The rows so far, the file they go to, and the time that is left."""

    def __init__(self, out, seconds, device="cuda"):
        import torch

        from . import timing
        self.device, self.dtype = device, torch.float16 if device == "cuda" else torch.float32
        self.machine = timing.machine(device)
        self.out, self.ends, self.rows = out, time.monotonic() + seconds, []
        self.share_ends = self.ends
        out.write_text("")

    def left(self):
        return self.share_ends - time.monotonic()

    def add(self, row):
        self.rows.append(row)
        with open(self.out, "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)
        print("  " + " ".join(str(row[key]) for key in ("case", "provider", "ms", "ratio", "note")
                              if row.get(key) not in (None, "")), flush=True)

    def note(self, kind, case, provider="qzo", **fields):
        """A row that is no benchmark case."""
        from .results import FIELDS, SCHEMA
        empty = {**dict.fromkeys(FIELDS), "rows": 0, "n": 0, "k": 0, "group": 0, "dtype": "", "noise": ""}
        self.add({**empty, "schema": SCHEMA, "kind": kind, "case": case, "provider": provider, "note": "",
                  **self.machine, "date": datetime.date.today().isoformat(), **fields})


def tests(check):
    """pytest -m gpu, in several processes where pytest-xdist is there."""
    if importlib.util.find_spec("pytest") is None:
        check.note("tests", "GPU tests", note="pytest is not installed")
        return
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
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
    """Measured over foretold, and the time of a whole step with and without a graph."""
    import torch

    from ..oom import explain
    from . import memory as reports
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
        check.note("memory", f"{config} {rows} x {tokens}", predicted=predicted, measured=measured,
                   note=f"{measured['total'] / 1e9:.3f} GB, {ratio:.4f} of foretold")
    for rows in (1, 16):
        if check.left() > 15:
            _whole_step(check, MEMORY[0][0], rows)


def _whole_step(check, config, rows, tokens=64, turns=8):
    """QZO.step of a classification batch, wall clock: two forwards in one, losses, update."""
    import torch

    from ..optim import QZO
    from . import memory as reports
    from . import models
    load, _ = reports.random_model(config, None, "none", check.device, check.dtype)
    model = load()
    batch = models.example_batch(model, rows, tokens, 1, check.device)
    del batch["labels"]
    batch |= {"option_ids": torch.tensor([[5, 9]] * rows, device=check.device),
              "label": torch.zeros(rows, dtype=torch.int64, device=check.device)}
    wait = torch.cuda.synchronize if check.device == "cuda" else lambda: None
    for graph in (False, True):
        optimizer = QZO(model, lr=0.0, cuda_graph=graph)

        def closure():
            return models.batch_losses(model, batch, 2)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            times = []
            for turn in range(turns + 2):
                wait()
                begun = time.perf_counter()
                optimizer.step(closure)
                wait()
                if turn > 1:
                    times.append(1e3 * (time.perf_counter() - begun))
        times.sort()
        check.note("whole step", f"whole step {config} {rows} x {tokens}" + (", CUDA graph" if graph else ""),
                   rows=rows, ms=times[len(times) // 2], p20=times[1], p80=times[-2],
                   note="; ".join(str(w.message) for w in said if "cuda_graph" in str(w.message)))


def bench(check):
    """The cases that the targets name, every provider."""
    from .cases import every
    from .run import measure
    for text in CASES:
        case = next(c for c in every(check.device) if text in c.name)
        if check.left() < 10:
            check.note("bench", case.name, note="no time left")
            continue
        for row in measure(case, check.device, seconds=0.5):
            check.add(row)


def tiles(check):
    """Tiles that differ from the picked one in one thing; returns case -> the fastest and the picked one."""
    from .cases import every
    fastest = {}
    for text in TILES:
        case = next(c for c in every(check.device) if text in c.name)
        times, picked = _tiles_of(check, case)
        if times:
            best = min(times, key=times.get)
            fastest[case.name] = {"tile": dataclasses.asdict(best), "ms": times[best],
                                  "picked": dataclasses.asdict(picked), "picked_ms": times.get(picked)}
    return fastest


def _tiles_of(check, case):
    """(Tile -> ms of one product of the case, the picked tile). A tile has to agree with the picked one."""
    import torch

    from ..kernels import qmm
    from ..kernels.noise import law_number
    from ..kernels.tiles import architecture, pick
    from ..layers import arena_of
    from ..weights import to_planes
    from . import timing
    from .providers import EPS, SEED, Problem
    problem = Problem(case, check.device, timing.cache_bytes(check.device))
    model, passes = problem.model()
    arch = architecture("cuda") if check.device == "cuda" else "interpreter"
    form = case.form
    picked = pick(case.rows, case.n, case.k, case.group, problem.dtype, arch, bits=form.bits, lookup=form.lookup)
    planes = [to_planes(layer.codes, case.k, layer.bits) for layer in model]
    x, arena = problem.x[case.k], arena_of(model)
    y = torch.empty(len(x), case.n, dtype=x.dtype, device=x.device)
    seeds, coefs = torch.tensor([SEED, SEED], device=x.device), torch.tensor([EPS, -EPS], device=x.device)

    def run(tile):
        for layer, codes in zip(model, planes, strict=True):
            qmm.launch(x, codes, arena.quads(layer.arena_name), None, None, seeds, coefs, y,
                       base4=arena.slots[layer.arena_name].base4, group=case.group, law=law_number(case.noise),
                       relative=True, tile=tile, asm=arch.startswith("sm_"), pair=True, bits=form.bits,
                       table=form.table, codebooks=layer.codebooks)
        return y.double()                 # a copy: the next run writes into y

    want, times = run(picked), {}
    for tile in [picked, *neighbours(picked)]:
        row = {"case": f"tile for {case.name}", "provider": " ".join(f"{k}={v}" for k, v in vars(tile).items()),
               "rows": case.rows, "n": case.n, "k": case.k, "group": case.group, "dtype": case.dtype,
               "noise": case.noise}
        if check.left() < 5:
            check.note("tile", **row, note="no time left")
            break
        try:
            y.fill_(torch.nan)
            error = float((run(tile) - want).norm() / want.norm())
            if not error < 1e-2:
                check.note("tile", **row, note=f"wrong: relative error {error:.3g}; not timed")
                continue
            row["error"] = error
            took = timing.interleaved({"": lambda tile=tile: run(tile)}, check.device, seconds=0.2)[""]
        except failures() as error:        # a tile that the compiler or the chip refuses
            check.note("tile", **row, note=f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
            continue
        ms, p20, p80 = (t / passes for t in took)
        times[tile] = ms
        check.note("tile", **row, ms=ms, p20=p20, p80=p80, ratio=ms / times[picked])
    return times, picked


def neighbours(tile):
    """Tiles that differ from this one in one thing."""
    found = [dataclasses.replace(tile, **{name: value}) for name, value in (
        ("outputs", tile.outputs // 2), ("outputs", tile.outputs * 2), ("rows", tile.rows * 2),
        ("rows", tile.rows // 2), ("warps", 12 - tile.warps), ("stages", tile.stages - 1), ("stages", tile.stages + 1),
        ("ratio", not tile.ratio), ("splits", tile.splits * 2), ("splits", tile.splits // 2))]
    return [t for t in found if t.rows >= 16 and 32 <= t.outputs <= 256 and t.stages >= 2 and t.splits >= 1]


PARTS = {"tests": tests, "memory": memory, "bench": bench, "tiles": tiles}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python bench/gpu_check.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="results file (default bench/results/<gpu>-<date>.jsonl); the "
                        "tiles go beside it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default {SECONDS})")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(arguments)
    import torch
    if not torch.cuda.is_available():
        print("gpu_check: there is no CUDA or ROCm device here; nothing was measured", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name().lower().replace(" ", "-")
    out = options.out or ROOT / "bench" / "results" / f"{gpu}-{datetime.date.today().isoformat()}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    run(Check(out, options.seconds), options.parts)
    print(f"results: {out}")
    return 0


def run(check, parts):
    """The parts in turn, each within its share of the time and what the one before has left."""
    asked, total = sum(SHARES[name] for name in parts), check.left()
    check.share_ends = time.monotonic()
    for name in parts:
        check.share_ends = min(check.ends, check.share_ends + total * SHARES[name] / asked)
        print(f"{name}: {check.left():.0f} s", flush=True)
        begun = time.monotonic()
        try:
            found = PARTS[name](check)
            if found:
                check.out.with_suffix(f".{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        except failures() as error:        # the other parts go on; the row says what broke
            check.note(name, name, note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        print(f"{name}: took {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
