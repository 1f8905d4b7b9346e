"""What a long loop shows while it goes, inside a command: a bar on a terminal, else a line now and then."""

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

EVERY_SECONDS = 10.0
T = TypeVar("T")
_shown = contextvars.ContextVar("qzo_shown", default=False)


@contextlib.contextmanager
def showing() -> Iterator[None]:
    """Inside, `tracked` shows what it goes through, on standard error; elsewhere it is silent."""
    token = _shown.set(True)
    try:
        yield
    finally:
        _shown.reset(token)


def tracked(items: Iterable[T], doing: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items, shown as they are taken: "loading: 12 of 272 tensors". total: how many there are, if items cannot
    tell. A loop of under a second, or without a terminal under ten, shows nothing."""
    if not _shown.get():
        yield from items
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    if sys.stderr.isatty():
        yield from tqdm(items, doing, total, unit=f" {unit}", leave=False, delay=1.0, dynamic_ncols=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last > EVERY_SECONDS:
            last = now
            print(f"{doing}: {done}{'' if total is None else f' of {total}'} {unit}", file=sys.stderr, flush=True)
        yield item
