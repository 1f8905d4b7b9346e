"""Signals that ask a command to stop: each ends it where it is, through every `finally`, and has an exit status."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# Ctrl-C and kill: 128 + the signal, as shells have it. SIGUSR1 is the warning that a scheduler was asked to send
# (sbatch --signal): to stop is what it asks for, so that is no failure.
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 0}


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGUSR1, raised where the program is, as Python raises KeyboardInterrupt for SIGINT."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class Interrupted(Exception):
    """A run was stopped between or in its steps; `steps` are in the journal, `status` is that of the command."""

    def __init__(self, steps: int, status: int = STATUS[signal.SIGINT]) -> None:
        super().__init__(steps)
        self.steps, self.status = steps, status


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status of a command that this has stopped."""
    return STATUS[stop.number if isinstance(stop, Stopped) else signal.SIGINT]


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 raise Stopped. Nothing changes outside of the main thread, which alone can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in STATUS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(number))
