"""Compile what gpu_check.py times, before it does: `python -m qzo.bench.gpu_warm DEVICE JOB`, many at once.

A job runs once, at the shapes that are timed and with as few layers as hold them all, in a process of its own;
Triton's cache on the disk carries what it compiled into the process that times.
"""

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TILE_JOBS = 3  # that share the tiles of a case


def jobs(device, parts):
    """The jobs of these parts of gpu_check.py, [kind, what], each once."""
    from . import gpu_parts, gpu_steps

    found = []
    if "bench" in parts:
        found += [["case", gpu_parts.named(device, text).name] for text in gpu_parts.CASES]
    if "tiles" in parts:
        found += [
            ["tiles", gpu_parts.named(device, text).name, number]
            for text in gpu_parts.TILES
            for number in range(TILE_JOBS)
        ]
    steps = [(gpu_steps.CONFIG, rows, tokens) for rows, tokens in gpu_steps.SIZES] if "steps" in parts else []
    steps += gpu_parts.MEMORY if "memory" in parts else ()
    return found + [["step", *step] for step in dict.fromkeys(steps)]


def warm(check, todo, processes=None):
    """Run the jobs, `processes` at a time (default: as many as there are cores); a row that says which failed."""
    if not todo:
        return
    processes = processes or os.cpu_count() or 1
    begun = time.monotonic()

    def one(job):
        command = [sys.executable, "-m", "qzo.bench.gpu_warm", check.device, json.dumps(job)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, check.left()))
        except subprocess.TimeoutExpired:
            return "no time left"
        return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1][:200]

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        said = list(pool.map(one, todo))
    failed = [f"{' '.join(map(str, job))}: {why}" for job, why in zip(todo, said, strict=True) if why]
    ended = f"{len(failed)} failed: {failed[0]}" if failed else "all ran"
    check.note(
        "warm",
        f"{len(todo)} jobs in {processes} processes",
        failed=failed,
        note=f"{time.monotonic() - begun:.0f} s; {ended}",
    )


def run(device, job):
    """One job."""
    kind, *what = job
    jobs: dict[str, Callable[..., None]] = {"case": _case, "tiles": _tiles, "step": _step}
    jobs[kind](device, *what)


def _case(device, name):
    """Every provider's output once; whole steps with one block."""
    from . import gpu_parts
    from .providers import Problem, error_of
    from .run import FAILURES, PROVIDERS
    from .small import Arena

    case = gpu_parts.named(device, name)
    if case.blocks:
        case = dataclasses.replace(case, blocks=1)
    problem = (Problem if case.shapes else Arena)(case, device, 1)
    for provider in PROVIDERS:
        if case.kind not in provider.kinds or provider.missing(device, case):
            continue
        try:
            built = provider.build(problem)
            error_of(built, problem)
            built.run()
        except FAILURES:
            if not provider.package:
                raise  # what another library breaks with is a row when it is to be timed


def _tiles(device, name, number):
    """Every third of the tiles, or as TILE_JOBS says."""
    from . import gpu_parts

    launch, _, picked = gpu_parts.launcher(gpu_parts.named(device, name), device, 1)
    broken = []
    for tile in [picked, *gpu_parts.neighbours(picked)][number::TILE_JOBS]:
        try:
            launch(tile)
        except gpu_parts.failures() as error:  # a tile that the compiler refuses is a row when it is timed
            broken.append(error)
    return broken


def _step(device, config, rows, tokens):
    """A step of the model with one block."""
    import torch

    from ..optim.optimizer import QZO
    from ..reports import memory as reports
    from ..reports import models
    from . import gpu_steps

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(models.read_config(config) | {"num_hidden_layers": 1}))
        dtype = torch.float16 if device == "cuda" else torch.float32
        model = reports.random_model(path, None, "none", device, dtype)[0]()
    batch = gpu_steps.batch_of(model, rows, tokens, device)
    QZO(model, lr=0.0, cuda_graph=False).step(lambda: models.batch_losses(model, batch, 2))


if __name__ == "__main__":
    run(sys.argv[1], json.loads(sys.argv[2]))
