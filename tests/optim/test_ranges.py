"""Ranges of an optimizer's numbers: their ends, and what is said of the first that is beyond."""

import math

import pytest

from qzo.optim.ranges import RANGES, check

INSIDE = {
    "lr": (0, 1e-7),
    "eps": (1e-9, 1),
    "clip": (1e-9, math.inf),
    "directions": (1, 65535),
    "one_sided_directions": (2, 65535),
    "seed": (-(1 << 63), (1 << 64) - 1),
    "floor": (0, 1e-3),
    "check_every": (0, 7),
    "journal_fsync": (0, math.inf),
    "staleness": (0, 8),
    "cuda_graph": (None, False, True),
}
OUTSIDE = {
    "lr": (-1e-9, math.inf, math.nan),
    "eps": (0, math.inf, math.nan),
    "clip": (0, math.nan),
    "directions": (0, 65536, 2.0),
    "one_sided_directions": (0, 1),
    "seed": (-(1 << 63) - 1, 1 << 64, 0.5),
    "floor": (-1e-9, math.nan),
    "check_every": (-1, 1.5),
    "journal_fsync": (-1, math.nan),
    "staleness": (-1, 1.5),
    "cuda_graph": ("yes", 0),
}


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_each_range(name):
    for good in INSIDE[name]:
        check(**{name: good})
    for bad in OUTSIDE[name]:
        with pytest.raises(ValueError, match=rf"^{name}={bad!r}: expected [a-zA-Z]"):
            check(**{name: bad})


def test_the_first_that_is_beyond_is_named():
    with pytest.raises(ValueError, match=r"^clip=0: expected a number > 0"):
        check(lr=0.1, clip=0, eps=0)
