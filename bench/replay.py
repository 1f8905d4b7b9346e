"""A long run and its replay: `python -m qzo.bench.replay [--steps 20000] [--scales 4096] [--out FILE.jsonl]`.

Steps of one quantized layer whose losses are drawn, not computed: what is left of a step is its seeds, its records in
the journal and the update. Then the journal is replayed on the base, and the scales compared bit for bit; a tenth of
its steps is applied in a pass of its own each, for comparison. Process time, one thread; resident memory and open files
of the process from a tenth of the run to its end.
"""

import argparse
import copy
import os
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from ..nn.choice import quantize_
from ..nn.layers import arena_of
from ..optim.optimizer import QZO
from ..optim.pieces import contents
from ..optim.replay import replay
from ..optim.step import apply_steps
from . import results
from .timing import machine

GROUP = 32


def layer_of(scales):
    """A layer with about so many scales that train, of random weights."""
    torch.manual_seed(0)
    return quantize_(nn.Sequential(nn.Linear(32 * GROUP, max(1, scales // 32))), group_size=GROUP)


def held():
    """(resident bytes, open files) of this process."""
    return psutil.Process().memory_info().rss, len(os.listdir("/proc/self/fd"))


def one_by_one(base, journal, count):
    """Steps a second of the first `count`, each a pass over the scales."""
    found = contents(journal)
    begun = time.process_time()
    for records in found.steps[:count]:
        apply_steps(arena_of(base), [records], found.header)
    return count / (time.process_time() - begun)


def measure(steps, scales, directions, folder):
    """One row of a results file."""
    base, chance = layer_of(scales), torch.Generator().manual_seed(0)
    model, journal = copy.deepcopy(base), Path(folder) / "journal.qzo"
    optimizer = QZO(model, 1e-3, directions=directions, journal=journal)
    begun, early = time.process_time(), held()
    for step in range(steps):
        losses = torch.rand(2 * directions, generator=chance)
        optimizer.step(lambda losses=losses: losses)
        if step == steps // 10:
            early = held()
    late, live = held(), time.process_time() - begun
    optimizer.close()
    begun = time.process_time()
    made = replay(base, journal)
    again = time.process_time() - begun
    return {
        "case": "replay of a long run",
        "steps": made,
        "directions": directions,
        "scales": arena_of(base).data.numel(),
        "journal_bytes": journal.stat().st_size,
        "same_bits": made == steps and torch.equal(arena_of(base).data, arena_of(model).data),
        "live_steps_per_s": round(steps / live, 1),
        "replay_steps_per_s": round(made / again, 1),
        "one_by_one_steps_per_s": round(one_by_one(layer_of(scales), journal, max(1, steps // 10)), 1),
        "memory_growth": round(late[0] / early[0] - 1, 5),
        "more_open_files": late[1] - early[1],
        **machine("cpu"),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(arguments=None):
    """Measure and print; append to the file. Exit status 1 if the bits differ."""
    parser = argparse.ArgumentParser(prog="python -m qzo.bench.replay", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--scales", type=int, default=4096)
    parser.add_argument("--directions", type=int, default=1)
    parser.add_argument("--out", help="a JSONL file the row is appended to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options.steps, options.scales, options.directions, folder)
    results.append(row, options.out)
    return 0 if row["same_bits"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
