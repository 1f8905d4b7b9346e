"""What a run shows while it goes, and how long it says it will go on."""

import re
import sys

import pytest

from qzo.training import progress
from qzo.training.progress import Progress, duration, short


class Clock:
    """A time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def steps(clock, shown, seconds, start=0, **changes):
    for number, took in enumerate(seconds, start):
        clock.now += took
        line = {"step": number, "loss": 0.7126, "derivative": 1.239, "skipped": False, "seconds": took}
        shown.step({**line, **changes})


def test_plain_lines_say_what_a_step_takes_and_what_is_left(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(240, 0) as shown:
        steps(clock, shown, [6.2, 3.0, 3.2, 3.1, 3.1, 3.1])
    assert capsys.readouterr().err.splitlines() == [
        "step 1/240: loss 0.713, |d| 1.24, 6.2 s for this step, about 25 min in all",
        "step 5/240: loss 0.713, |d| 1.24, 3.1 s a step, 12 min left",
    ]


def test_the_last_step_is_shown_and_the_first_of_a_run_that_goes_on(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(200, 197) as shown:
        steps(clock, shown, [4.0, 0.012, 0.012], start=197)
    assert capsys.readouterr().err.splitlines() == [
        "step 198/200: loss 0.713, |d| 1.24, 4.0 s for this step, about 8 s left",
        "step 200/200: loss 0.713, |d| 1.24, 0.012 s a step",
    ]
    with Progress(1, 0) as shown:
        steps(clock, shown, [140.2])
    assert capsys.readouterr().err == "step 1/1: loss 0.713, |d| 1.24, 140 s a step\n"


def test_the_time_left_follows_the_last_steps(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(1000, 0) as shown:
        steps(clock, shown, [1.0] * 30 + [11.0] * 20)
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("step 50/1000: loss 0.713, |d| 1.24, 11.0 s a step, 2 h 54 min left")
    )


def test_losses_that_are_not_finite_have_no_mean(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(3, 0) as shown:
        steps(clock, shown, [1.0], loss=float("nan"), skipped=True)
    assert capsys.readouterr().err.startswith("step 1/3: no finite loss yet, 1.0 s for this step, about 3 s in all")


def test_a_terminal_has_a_bar_and_silence_is_silent(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(3, 0, show=False) as shown:
        steps(clock, shown, [20.0] * 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.undo()
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True, raising=False)
    with Progress(3, 0) as shown:
        for number in range(3):
            shown.step({"step": number, "loss": 1.0, "derivative": 0.0, "skipped": False, "seconds": 1.0})
    said = capsys.readouterr().err
    assert re.search(r"3/3 \[", said)
    assert "step 1/3" not in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "1 s"),
        (40.4, "40 s"),
        (59.6, "1 min"),
        (480, "8 min"),
        (3590, "1 h"),
        (7500, "2 h 5 min"),
        (48 * 3600, "2 d"),
        (76 * 3600, "3 d 4 h"),
    ],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_short_seconds():
    assert [short(s) for s in (0.0, 0.0123, 0.5, 3.14, 99.94, 99.96, 1234.5)] == [
        "0",
        "0.012",
        "0.5",
        "3.1",
        "99.9",
        "100",
        "1234",
    ]
