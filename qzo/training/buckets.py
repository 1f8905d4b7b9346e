"""A few shapes for the batches of a data set, so that a step captured for each of them serves all (graph.py).

Widths come from the data: of all choices of at most COUNT widths, the one that pads its rows least. So a run never has
more shapes than there are graphs, and headlines of 20 tokens are not padded to 64. What it costs: 12 % more tokens
where lengths are spread evenly from 30 to 1000, 19 % where their logarithms are from 32 to 1024, and never more than
r^(1/8) - 1 for lengths from L to r L (as eight widths in equal ratios would; UNIT aside).
"""

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

COUNT = 8  # as many as there are graphs (graph.LIMIT)
UNIT = 8  # masks of attention are read in eights
UNITS = 256  # of the longest row; longer rows are rounded more coarsely


class Buckets:
    """The shapes of batches of these rows.

    sizes : (tokens, targets) of each row of the data: its length and how many places of it are read
    bounds : lengths that no row is padded across, as `padding_bounds` has them

    A batch is one token wider than its longest row, the bounds allowing: models go another way where no row is padded,
    which they look for on the host, and cannot look for while a graph is captured.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], bounds: Sequence[int] = ()):
        self.bounds, lengths = bounds, [tokens for tokens, _ in sizes]
        longest = max(lengths)
        cut = sum(min(lengths) <= bound < longest for bound in bounds)  # a width that lies across one makes two shapes
        self.unit = UNIT
        while longest > UNITS * self.unit:
            self.unit *= 2
        self.widths = best_widths([_up(tokens + 1, self.unit) for tokens in lengths], COUNT - cut)
        self.targets: dict[int, int] = {}  # most places that are read of rows of a width, or shorter ones
        most = 0
        for tokens, count in sorted(sizes):
            most = self.targets[self.width(tokens)] = max(most, count)

    def width(self, tokens: int) -> int:
        """How wide a batch is whose longest row has so many tokens."""
        width = next(width for width in self.widths if tokens < width)
        return min([width, *(bound for bound in self.bounds if tokens <= bound)])

    def shape(self, tokens: int) -> tuple[int, int]:
        """(tokens, targets) of each row of a batch whose longest row, one of the data's, has so many tokens."""
        width = self.width(tokens)
        return width, self.targets[width]


def padding_bounds(config: "PreTrainedConfig") -> tuple[int, ...]:
    """Lengths that padding may not carry a row of a model across: the most tokens that it takes, and those up to which
    its rotary embeddings have the factors of short texts (longrope, arXiv 2402.13753: the widest row decides for all
    rows of a batch, its padding included)."""
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    of_layers = [one for one in ropes.values() if isinstance(one, dict)] or [ropes]
    found = [one["original_max_position_embeddings"] for one in of_layers if one.get("rope_type") == "longrope"]
    return tuple(bound for bound in (*found, getattr(config, "max_position_embeddings", None)) if bound)


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
