"""The study that decides the defaults: `python -m qzo.bench.study TASK --packages FOLDER --out FILE.jsonl`.

Three real tasks (tasks.py), each method (methods.py) at equal numbers of forward rows with its own learning rate: that
of a few with the least loss on validation rows, mean of two seeds: the held-out rows decide nothing. A row of the
file is a run; what stands there already is not run again, so a study that was stopped goes on. `python -m
qzo.bench.study.report FILE.jsonl` makes the table and the picture.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from .methods import METHODS, Method, Rate, Study
from .tasks import HOW, TASKS

ROWS = 6144
SEEDS, CHOOSING = 5, 2
TRAIN_LAYERS = 4
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Make the runs that are not in the file yet, and append each when it has ended."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    runs = Runs(options.task, options.out)
    study = Study(TASKS[options.task](options.packages), TRAIN_LAYERS)
    if any(not runs.find(method=name) for name in study.controls):
        for name, scores in study.untrained().items():
            if not runs.find(method=name):
                runs.add(method=name, rows=0, seed=None, rate=None, scores=scores, seconds=0.0)
    for rows in options.rows:
        for name in options.method or METHODS:
            method = METHODS[name]
            if options.rate:
                method = dataclasses.replace(method, rates=tuple(options.rate))
            rate = chosen(runs, name, method, study, max(options.rows), options.choosing)
            for seed in range(options.seeds):
                run(runs, name, method, study, rows, seed, rate)


def chosen(runs: "Runs", name: str, method: Method, study: Study, rows: int, seeds: int) -> Rate:
    """The learning rate with the least validation loss, mean of the first seeds."""
    for rate in method.rates:
        for seed in range(seeds):
            run(runs, name, method, study, rows, seed, rate)
    return best_rate([row for row in runs.find(method=name, rows=rows) if row["rate"] in method.rates])


def best_rate(rows: list[Row]) -> Any:
    """The learning rate of a method's rows with the least mean validation loss, over the seeds that all rates have."""
    losses: dict[Any, dict[Any, float]] = {}
    for row in rows:
        losses.setdefault(row["rate"], {})[row["seed"]] = row["scores"]["validation"]["loss"]
    shared = set.intersection(*(set(of_seeds) for of_seeds in losses.values()))
    return min(losses, key=lambda rate: statistics.fmean(losses[rate][seed] for seed in shared))


def run(runs: "Runs", name: str, method: Method, study: Study, rows: int, seed: int, rate: Rate) -> None:
    """Make a run, unless it is there."""
    if runs.find(method=name, rows=rows, seed=seed, rate=rate):
        return
    began = time.perf_counter()
    scores = method.run(study, rows, seed, rate)
    own = {"measured_rate": study.learning_rate} if rate == "auto" else {}
    seconds = round(time.perf_counter() - began, 1)
    runs.add(method=name, rows=rows, seed=seed, rate=rate, **own, scores=scores, seconds=seconds)


class Runs:
    """A file of results, of which one task's are read."""

    def __init__(self, task: str, path: Path):
        self.task, self.path = task, path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[Row] = [row for row in map(json.loads, lines) if row["task"] == task]

    def find(self, **wanted: Any) -> list[Row]:
        """The rows that hold these values."""
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]

    def add(self, **values: Any) -> None:
        """Append a row, and print it."""
        row = {"task": self.task, **values, "versions": {"torch": torch.__version__}, "date": time.strftime("%Y-%m-%d")}
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)
        print(json.dumps({key: row[key] for key in ("task", "method", "rows", "seed", "rate", "scores")}), flush=True)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m qzo.bench.study", description=__doc__.partition("\n")[0])
    made.add_argument("task", choices=TASKS)
    made.add_argument("--packages", type=Path, required=True, help=f"the folder of {', '.join(HOW)}")
    made.add_argument("--out", type=Path, required=True, help="a JSONL file, which is added to")
    made.add_argument("--method", action="append", choices=METHODS, help="may be given several times (default: all)")
    made.add_argument("--rows", type=int, nargs="+", default=[ROWS], help=f"forward rows of a run (default {ROWS})")
    made.add_argument("--rate", type=float, action="append", help="a learning rate to try (default: the method's)")
    made.add_argument("--choosing", type=int, default=CHOOSING, help=f"seeds of each rate (default {CHOOSING})")
    made.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each (default {SEEDS})")
    made.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    return made
