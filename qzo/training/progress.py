"""What a run shows while it goes: its losses, how long a step takes, how much time is left."""

import collections
import statistics
import sys
import time
from typing import Any

from tqdm import tqdm

RECENT = 20  # steps whose mean time tells what the next ones take


class Progress:
    """A tqdm bar on a terminal, which has its own estimate of the time; else a plain line after the first step and then
    every few seconds. Both on standard error.

    total: steps of the whole run; start: those that are done; show: None (on), False (nothing).
    """

    EVERY_SECONDS = 10.0

    def __init__(self, total: int, start: int, show: bool | None = None):
        self.total, self.shown, self.bar = total, show is not False, None
        if self.shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
        self.last = time.monotonic()
        self.mean: float | None = None
        self.measured = ""  # the last validation
        self.done, self.recent = 0, collections.deque[float](maxlen=RECENT)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, line: dict[str, Any]) -> None:
        """Show a finished step, a line of metrics; the loss shown is a running mean."""
        if not line["skipped"]:
            self.mean = line["loss"] if self.mean is None else 0.9 * self.mean + 0.1 * line["loss"]
        text = f"loss {self.mean:.3f}, |d| {line['derivative']:.2f}" if self.mean is not None else "no finite loss yet"
        if line.get("valid"):
            self.measured = measured(line["valid"])
        text += self.measured
        self.done += 1
        if self.done == 2:
            self.recent.clear()  # the first step makes what the others find: kernels, graphs, states of the prefix
        self.recent.append(line["seconds"])
        number = line["step"] + 1
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.shown and (
            self.done == 1
            or time.monotonic() - self.last > self.EVERY_SECONDS
            or number == self.total
            or line.get("valid")
        ):
            self.last = time.monotonic()
            print(f"step {number}/{self.total}: {text}{self._time(number)}", file=sys.stderr, flush=True)

    def _time(self, number):
        """ ", 3.1 s a step, 8 min left"."""
        seconds = statistics.fmean(self.recent)
        left = self.total - number
        if not left:
            return f", {short(seconds)} s a step"
        if self.done == 1:
            total = f"{duration(seconds * (left + 1))} in all" if number == 1 else f"{duration(seconds * left)} left"
            return f", {short(seconds)} s for this step, about {total}"
        return f", {short(seconds)} s a step, {duration(seconds * left)} left"


def measured(found: dict[str, Any]) -> str:
    """ ", valid 0.612 (78.0 %)" of a measurement of the validation split."""
    share = "" if found["accuracy"] is None else f" ({100 * found['accuracy']:.1f} %)"
    return f", valid {found['loss']:.3f}{share}"


def short(seconds: float) -> str:
    """Seconds with two or three digits: "0.012", "3.1", "140"."""
    return f"{seconds:.2g}" if seconds < 1 else f"{seconds:.1f}" if seconds < 99.95 else f"{seconds:.0f}"


def duration(seconds: float) -> str:
    """A time as one would say it: "40 s", "8 min", "2 h 5 min", "3 d 4 h"."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
