"""What the numbers that an optimizer is given have to be."""

import math
from collections.abc import Callable
from typing import Any


def _int(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda got: isinstance(got, int) and least <= got <= most


RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {  # of each: whether it holds, and how an error says it
    "lr": (lambda got: got >= 0 and math.isfinite(got), "a finite number >= 0"),
    "eps": (lambda got: got > 0 and math.isfinite(got), "a finite number > 0"),
    "clip": (lambda got: got > 0, "a number > 0 (math.inf: no clipping)"),
    "directions": (_int(1, (1 << 16) - 1), "an int >= 1"),
    "one_sided_directions": (_int(2), "an int >= 2, whose losses are compared, or one_sided=False"),
    "seed": (_int(-(1 << 63), (1 << 64) - 1), "a 64-bit int"),
    "floor": (lambda got: got >= 0, "a number >= 0"),
    "check_every": (_int(0), "an int >= 0"),
    "journal_fsync": (lambda got: got >= 0, "seconds >= 0 (0: each step is synced)"),
    "staleness": (_int(0), "steps, an int >= 0 (0: no step runs ahead)"),
    "cuda_graph": (
        lambda got: got is None or isinstance(got, bool),
        "None (where there is a CUDA device), True or False",
    ),
}


def check(**given: Any) -> None:
    """ValueError for the first of these, by their names in RANGES, that is out of its range."""
    for name, got in given.items():
        holds, wanted = RANGES[name]
        if not holds(got):
            raise ValueError(f"{name}={got!r}: expected {wanted}")
