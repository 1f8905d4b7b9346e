"""What a run leaves in its folder beside the journal and the model.

OUT/metrics.jsonl  one line a step
OUT/run.json       settings, results, versions
OUT/curve.png      the loss over the steps
"""

import dataclasses
import io
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from matplotlib.figure import Figure

from ..checkpoints.formats.files import read_object
from ..system import disk
from ..system.as_json import finite, parsed
from ..version import __version__
from .settings import Settings

RESULTS = "run.json"


class Metrics:
    """metrics.jsonl, open for the next step: lines at or beyond `start`, and a line cut short, are dropped. path:
    None on a rank that writes none."""

    def __init__(self, path: Path | None, start: int):
        kept = []
        self.lines: list[dict[str, Any]] = []  # those of the steps before
        if path is not None and start and path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    found = parsed(line)
                    if found["step"] < start:
                        kept.append(line)
                        self.lines.append(found)
                except (ValueError, LookupError, TypeError):
                    break
        if path is not None:
            disk.write_whole(path, ("".join(line + "\n" for line in kept)).encode())
        self.path = path

    def __enter__(self) -> "Metrics":
        self.file: TextIO = open(self.path or os.devnull, "a")
        return self

    def write(self, line: dict[str, Any]) -> None:
        """One step's line, with the operating system when this returns; one that holds a measurement, which a run that
        goes on relies on, is on the disk."""
        self.file.write(json.dumps(finite(line)) + "\n")
        self.file.flush()
        if "valid" in line and self.path is not None:
            os.fsync(self.file.fileno())

    def __exit__(self, *_: object) -> None:
        self.file.close()


def write_results(out: str | Path, settings: Settings, results: dict[str, Any]) -> None:
    """run.json and curve.png of a finished run."""
    out = Path(out)
    record = finite({"settings": dataclasses.asdict(settings), **results, "versions": versions()})
    disk.write_whole(out / RESULTS, (json.dumps(record, indent=1) + "\n").encode())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    draw_curve(out / "curve.png", lines, results)


def fitted_biases(path: Path) -> tuple[list[tuple[int, float]], int] | None:
    """((token, label bias) of a run.json, the step of the model that they were fitted for); None where there are none.
    ValueError for a file that no run has written."""
    if not path.exists():
        return None
    found = read_object(path)
    biases, step = found.get("label_bias"), found.get("model_step", found.get("steps"))
    if not biases:
        return None
    try:
        pairs = [(token, float(bias)) for token, bias in biases]
    except (TypeError, ValueError, OverflowError):
        pairs = []
    whole = all(type(token) is int and token >= 0 and math.isfinite(bias) for token, bias in pairs)
    if not pairs or not whole or not isinstance(step, int):
        raise ValueError(f"{path}: its label_bias is {biases!r:.60}, of step {step!r:.20}: no run has written that")
    return pairs, step


def versions() -> dict[str, str]:
    """Of what a run's result may depend on."""
    return {
        "qzo": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def draw_curve(path: Path, lines: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """The loss of each step, its running mean, and the evaluations before and after."""
    steps = [line["step"] for line in lines if line["loss"] is not None]
    values = [line["loss"] for line in lines if line["loss"] is not None]
    window = max(1, len(values) // 20)
    means = [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="0.8", linewidth=0.8, label="batch")
    axes.plot(steps, means, color="C0", label=f"mean of {window} steps")
    measured = [(line["step"] + 1, line["valid"]["loss"]) for line in lines if line.get("valid")]
    if measured:
        axes.plot(*zip(*measured, strict=True), "o-", color="C1", markersize=3, linewidth=1, label="validation")
    for name, style in (("zero_shot", ":"), ("control", "--"), ("linear_probe", "-."), ("before", ":"), ("tuned", "-")):
        if results.get(name):
            axes.axhline(
                results[name]["loss"],
                color="C1",
                linestyle=style,
                linewidth=1,
                label=f"held out, {name.replace('_', '-')}",
            )
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format="png")
    disk.write_whole(path, drawn.getvalue())
