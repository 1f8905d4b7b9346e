"""A few shapes for the batches of a data set, so that a step captured for each of them serves all (graph.py).

Widths come from the data: of all choices of at most COUNT widths, the one that pads its rows least. So a run never has
more shapes than there are graphs, and headlines of 20 tokens are not padded to 64. What it costs: 12 % more tokens
where lengths are spread evenly from 30 to 1000, 19 % where their logarithms are from 32 to 1024, and never more than
r^(1/8) - 1 for lengths from L to r L (as eight widths in equal ratios would; UNIT aside).
"""

import collections
from collections.abc import Sequence

COUNT = 8  # as many as there are graphs (graph.LIMIT)
UNIT = 8  # masks of attention are read in eights
UNITS = 256  # of the longest row; longer rows are rounded more coarsely


class Buckets:
    """The shapes of batches of these rows.

    sizes : (tokens, targets) of each row of the data: its length and how many places of it are read
    limit : most tokens that the model takes, or None

    A batch is one token wider than its longest row, the limit allowing: models go another way where no row is padded,
    which they look for on the host, and cannot look for while a graph is captured.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], limit: int | None = None):
        self.limit, longest = limit, max(tokens for tokens, _ in sizes)
        self.unit = UNIT
        while longest > UNITS * self.unit:
            self.unit *= 2
        self.widths = best_widths([_up(tokens + 1, self.unit) for tokens, _ in sizes], COUNT)
        self.targets = {
            width: max((count for tokens, count in sizes if tokens < width), default=0) for width in self.widths
        }

    def shape(self, tokens: int) -> tuple[int, int]:
        """(tokens, targets) of each row of a batch whose longest row has so many tokens."""
        width = next(width for width in self.widths if tokens < width)
        return max(tokens, min(width, self.limit or width)), self.targets[width]


def best_widths(lengths: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` of these lengths, ascending, the longest among them: those that the fewest tokens of padding are
    needed for where each length takes the next of them."""
    numbers = sorted(collections.Counter(lengths).items())
    rows, tokens = [0], [0]  # of the shortest ones, added up
    for length, number in numbers:
        rows.append(rows[-1] + number)
        tokens.append(tokens[-1] + number * length)
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # shortest lengths that are served -> (padding, widths)
    for _ in range(min(count, len(numbers))):
        best |= {
            end: min(
                (padding + width * (rows[end] - rows[start]) - tokens[end] + tokens[start], (*widths, width))
                for start, (padding, widths) in best.items()
                if start < end
            )
            for end, (width, _) in enumerate(numbers, 1)
        }
    return best[len(numbers)][1]


def next_step(number: int, steps: int = 4) -> int:
    """The next of so many steps an octave, a power of two; of four: 8, 16, ... 64, 80, 96, 112, 128, 160, ...: at most
    a quarter more."""
    return _up(number, max(UNIT, (1 << (number - 1).bit_length()) // (2 * steps)))


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
