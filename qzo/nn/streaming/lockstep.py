"""Calls that pause: each runs in a thread, but only while its maker waits, so that one runs at a time.

So the forwards of several micro-batches, or evaluations, run block by block side by side, without a forward of our own
for any model; which one runs is decided by their maker, and never by the system.
"""

import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class _Abandoned(BaseException):
    """Raised in a call that pauses, where another one has failed."""


class Call(Generic[T]):
    """One of the calls, in a thread of its own with its maker's context, gradient mode, autocast and CUDA stream."""

    result: T

    def __init__(self, run: Callable[[], T]) -> None:
        self.error: BaseException | None = None
        self.finished = self._abandoned = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        context, grad = contextvars.copy_context(), torch.is_grad_enabled()
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        casts = [
            torch.autocast(kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]

        def whole() -> None:
            self._go.acquire()
            try:
                if not self._abandoned:
                    with torch.set_grad_enabled(grad), torch.cuda.stream(stream), contextlib.ExitStack() as inside:
                        for cast in casts:
                            inside.enter_context(cast)
                        self.result = context.run(run)
            except BaseException as error:
                self.error = error
            finally:
                self.finished = True
                self._stopped.release()

        self._thread = threading.Thread(target=whole, name="qzo-lockstep", daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Run it until it pauses or ends."""
        self._go.release()
        self._stopped.acquire()

    def pause(self) -> None:
        """Called by what runs in it."""
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End it where it stands."""
        self._abandoned = True
        self._go.release()
        self._thread.join()
