"""What codes a layer may have, by the names that commands and benchmarks know them under."""

import dataclasses

from ..kernels.table import NF4
from ..kernels.vectors import LENGTH, words_of


@dataclasses.dataclass(frozen=True)
class Codes:
    """What stands in memory for weights: `bits` of each, or of an index into one of `books` codebooks of vectors; the
    table whose entries they are codes of, or None; the group size that their format has, None where any will do, -1 the
    whole row; what their cases' names end in."""

    bits: int
    suffix: str
    table: tuple | None = None
    group: int | None = None
    books: int = 0

    @property
    def weight_bits(self) -> int:
        """Bits that are read for a weight."""
        return 16 * words_of(self.books, self.bits) // LENGTH if self.books else self.bits

    @property
    def book_entries(self) -> int:
        """Numbers in the codebooks of a layer."""
        return self.books * LENGTH << self.bits

    @property
    def lookup(self) -> str | None:
        """As tiles.pick takes it."""
        if self.books:
            return "vectors" if words_of(self.books, self.bits) <= 2 else "long vectors"
        return None if self.table is None else "table"


CODES = {
    "int4": Codes(4, ""),
    "int2": Codes(2, " 2 bits"),
    "int8": Codes(8, " 8 bits"),
    "nf4": Codes(4, " nf4", NF4, 64),
    "aqlm-1x16": Codes(16, " aqlm 1x16", group=-1, books=1),
    "aqlm-2x8": Codes(8, " aqlm 2x8", group=-1, books=2),
}
