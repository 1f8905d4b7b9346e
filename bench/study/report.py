"""The study's table and picture: `python -m qzo.bench.study.report FILE.jsonl.. [--plot PICTURE.png]`."""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from .methods import BIASES, METHODS, PROBE, UNTRAINED, ZERO_SHOT, Rate
from .runs import Row, best_rate
from .tasks import TASKS

GRADIENTS = "first-order, scales"
STYLES = {ZERO_SHOT: ":", BIASES: "--", PROBE: "-."}


class Line(NamedTuple):
    """A method on a task: held-out figures of its seeds, at the learning rate that was chosen."""

    task: str
    method: str
    rows: int
    rate: Rate | None
    accuracies: list[float | None]  # None of texts without options
    losses: list[float]


def lines(rows: Iterable[Row]) -> list[Line]:
    """One for each task, method and number of forward rows, in the order of TASKS and METHODS."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"], row["rows"]), []).append(row)
    order = [*UNTRAINED, *METHODS]
    made = [Line(*key, *_figures(found)) for key, found in groups.items()]
    return sorted(made, key=lambda line: (list(TASKS).index(line.task), order.index(line.method), line.rows))


def _figures(rows: list[Row]) -> tuple[Rate | None, list[float | None], list[float]]:
    """(rate, accuracies, losses) of the rows at the best rate."""
    rate = best_rate(rows)
    taken = [row["scores"]["held_out"] for row in rows if row["rate"] == rate]
    return rate, [scores["accuracy"] for scores in taken], [scores["loss"] for scores in taken]


def as_markdown(made: list[Line]) -> str:
    """The table; the last column is how much of the loss between label biases and gradients a method closes."""
    text = [
        "| task | method | forward rows | learning rate | seeds | accuracy, worst | loss, worst | gap closed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in made:
        accuracy, loss = _accuracy(line.accuracies), statistics.fmean(line.losses)
        closed = share(line, made)
        text.append(
            f"| {line.task} | {line.method} | {line.rows:,} | {_rate(line.rate)} "
            f"| {len(line.losses)} | {accuracy} "
            f"| {loss:.3f}, {max(line.losses):.3f} | {'' if closed is None else f'{100 * closed:.0f} %'} |"
        )
    return "\n".join(text)


def _accuracy(found: list[float | None]) -> str:
    """Mean and worst, as the table says them; nothing for texts without options."""
    known = [accuracy for accuracy in found if accuracy is not None]
    return f"{100 * statistics.fmean(known):.1f} %, {100 * min(known):.1f} %" if known else ""


def _rate(rate: Rate | None) -> str:
    """As the table says it."""
    return "" if rate is None else rate if isinstance(rate, str) else f"{rate:g}"


def share(line: Line, made: list[Line]) -> float | None:
    """Of the gap in mean loss between label biases alone and gradients on the same scales; None without those two."""
    mean = {other.method: statistics.fmean(other.losses) for other in made if other.task == line.task}
    if line.method in (ZERO_SHOT, BIASES) or BIASES not in mean or GRADIENTS not in mean:
        return None
    return (mean[BIASES] - statistics.fmean(line.losses)) / (mean[BIASES] - mean[GRADIENTS])


def plot(made: list[Line], path: Path) -> None:
    """Held-out loss: a dot a seed, a panel a task, lines for the untouched model and its controls."""
    tasks = [task for task in TASKS if any(line.task == task for line in made)]
    figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    for number, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), number + 1)
        shown = [line for line in made if line.task == task]
        for name, style in STYLES.items():
            for line in shown:
                if line.method == name:
                    axes.axvline(line.losses[0], color="0.4", linestyle=style, linewidth=1, label=name)
        runs = [line for line in shown if line.method not in UNTRAINED]
        for at, line in enumerate(reversed(runs)):
            axes.plot(line.losses, [at] * len(line.losses), "o", color="C0", markersize=4, alpha=0.6)
            axes.plot(statistics.fmean(line.losses), at, "|", color="C3", markersize=14)
        axes.set_yticks(range(len(runs)), [f"{line.method}\n{line.rows:,} rows" for line in reversed(runs)], fontsize=7)
        axes.set(title=task, xlabel="loss on held-out rows")
        if len(runs) < len(shown):
            axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Print the table; draw."""
    options = argparse.ArgumentParser(prog="python -m qzo.bench.study.report", description=__doc__)
    options.add_argument("files", nargs="+", type=Path)
    options.add_argument("--plot", type=Path, help="a PNG file")
    given = options.parse_args(arguments)
    made = lines(json.loads(line) for path in given.files for line in path.read_text().splitlines())
    print(as_markdown(made))
    if given.plot:
        plot(made, given.plot)


if __name__ == "__main__":
    main()
