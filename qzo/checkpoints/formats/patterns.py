"""Regular expressions by which a checkpoint's config names layers, matched in bounded time: whoever wrote one may want
it to take for ever. re cannot give up; the module regex, which transformers brings, can."""

import math
import re
import time
from collections.abc import Iterator, Mapping

import regex

MOST_REPEATS = 10_000  # that the patterns of a checkpoint ask for: regex writes each of a{99} out, some 400 bytes
SECONDS = 5.0  # of the processor, for all layers of a checkpoint: patterns of layers take some 1e-5 each


class Patterns:
    """The patterns of a config, in its order.

    patterns : how the config writes each, and its regular expression
    what : their place, for errors
    ValueError for one that is no regular expression, or asks for more than MOST_REPEATS counted repetitions.
    """

    def __init__(self, patterns: Mapping[str, str], what: str) -> None:
        self.what, self.left = what, SECONDS
        self.compiled, repeats = {}, 0
        for written, expression in patterns.items():
            repeats += _repeats(expression)
            if repeats > MOST_REPEATS:
                raise ValueError(
                    f"{what} {written!r:.80} repeats too much: {MOST_REPEATS} counted repetitions, {{n}}, are all that "
                    "patterns may have together; write + or *"
                )
            try:
                re.compile(expression)  # which knows less than regex: no recursion, and what formats agree on
                self.compiled[written] = regex.compile(expression)
            except (re.error, regex.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{what} {written!r:.80} is no regular expression: {error}") from None

    def fitting(self, layer: str) -> Iterator[str]:
        """Those, as written, that fit the beginning of a name, in order. ValueError when SECONDS are used up."""
        for written, pattern in self.compiled.items():
            begun = time.process_time()
            try:
                found = pattern.match(layer, timeout=self.left)  # of the processor's time, too
                self.left -= time.process_time() - begun
            except TimeoutError:
                self.left = 0.0
            if self.left <= 0:
                raise ValueError(
                    f"{self.what} {written!r:.80} is matched too slowly: {SECONDS:g} s of the processor, for all "
                    f"layers, are used up at {layer:.80}; write patterns without repetitions inside of repetitions"
                )
            if found:
                yield written


def _repeats(expression: str) -> int:
    """How often the counted repetitions of a pattern make a piece come, were each inside of all others."""
    braces = re.findall(r"\{([\d,\s]*\d[\d,\s]*)\}", expression)
    counts = [[int(digits.lstrip("0")[:9] or 0) for digits in re.findall(r"\d+", found)] for found in braces]
    return math.prod(max(1, *count) for count in counts) if counts else 0
