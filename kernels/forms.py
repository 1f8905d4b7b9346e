"""What a code stands for: a number (Integers, codes.py), an entry of a table (Table, table.py), or eight weights, a
vector from a codebook (Vectors, vectors.py).

Everything that depends on it is asked of a Weight's `form`, on the host and, by way of Constants, in the kernels: these
know nothing more of it than the four planes of a tile that `load_planes` gives, once for each pass. A further form is
a class here, with the modules' functions for its layout, and a branch of `load_planes`.

Terms (form): docs/glossary.md.
"""
import dataclasses

import torch
import triton
import triton.language as tl

from .codes import centred_codes, join_planes2, join_planes4, load_tile, plane_shape, row_shape
from .table import look_up, on_device, table_entries, table_texts
from .vectors import decoding_bytes, join_eight, vector_planes, vector_rows, vector_shape, vector_texts, words_of


class Form:
    """What every form is asked; the answers of a form whose codes are read as they are."""

    def tiles(self, exact):
        """What tiles.Problem calls it."""
        return None

    def shape(self, n, k, in_rows):
        """Of the codes of an [n, k] weight, in planes or in a CPU's rows."""
        raise NotImplementedError

    def significant(self, activations):
        """Bits of the numbers that codes stand for; activations: those of x's type."""
        return activations

    def lookup(self, kernel, dtype, exact, scales):
        """(what the codes are looked up in, fields of Constants) for a kernel whose argument `entries_ptr` is the
        former. dtype: of the activations; exact: as plan.Options has it; scales stand in for what is not there."""
        return scales, dict(BOOKS=0, PASSES=1, TEXTS=("",))

    def decode(self, codes, k, start, stop, dtype, exact=False):
        """float32 [stop - start, K]: what the codes of some output rows stand for, as kernels have it that multiply
        activations in `dtype`; zero points are still to be subtracted. A tensor of the caller's own."""
        raise NotImplementedError

    def decoding_bytes(self, rows, k):
        """Bytes that `decode` holds for a while beside its result."""
        return 0

    def in_float32(self):
        """The form with all that `decode` looks up in float32, for who decodes chunk by chunk."""
        return self


@dataclasses.dataclass(frozen=True)
class Integers(Form):
    """A code of `bits` bits is its own number, less the middle code or a zero point."""

    bits: int

    def shape(self, n, k, in_rows):
        return (row_shape if in_rows else plane_shape)(n, k, self.bits)

    def significant(self, activations):
        return self.bits

    def decode(self, codes, k, start, stop, dtype, exact=False):
        return centred_codes(codes, k, start, stop, self.bits)


@dataclasses.dataclass(frozen=True)
class Table(Form):
    """A code of 4 bits stands for one of sixteen numbers."""

    entries: tuple

    def tiles(self, exact):
        return "exact" if exact else "table"

    def shape(self, n, k, in_rows):
        return Integers(4).shape(n, k, in_rows)

    def lookup(self, kernel, dtype, exact, scales):
        texts = table_texts(self.entries, dtype, exact)
        return on_device(self.entries, dtype, exact, scales.device), dict(BOOKS=0, PASSES=len(texts), TEXTS=texts)

    def decode(self, codes, k, start, stop, dtype, exact=False):
        return table_entries(codes, k, start, stop, self.entries, dtype, exact)

    def decoding_bytes(self, rows, k):
        return 2 * rows * k


@dataclasses.dataclass(frozen=True, eq=False)
class Vectors(Form):
    """Codes stand for sums of vectors of eight weights, entries of codebooks [C, 2^bits, 8]."""

    codebooks: torch.Tensor
    bits: int

    def tiles(self, exact):
        return "vectors" if words_of(len(self.codebooks), self.bits) <= 2 else "long vectors"

    def shape(self, n, k, in_rows):
        return vector_shape(n, k, len(self.codebooks), self.bits)

    def lookup(self, kernel, dtype, exact, scales):
        texts = vector_texts(len(self.codebooks), self.bits, dtype, parameter(kernel, "entries_ptr"))
        return self.codebooks, dict(BOOKS=len(self.codebooks), PASSES=len(texts), TEXTS=texts)

    def decode(self, codes, k, start, stop, dtype, exact=False):
        return vector_rows(codes, k, start, stop, self.codebooks.float(), dtype)

    def decoding_bytes(self, rows, k):
        return decoding_bytes(rows, k, len(self.codebooks), self.bits)

    def in_float32(self):
        return Vectors(self.codebooks.float(), self.bits)


def form_of(bits, table, codebooks):
    """Integers, Table or Vectors."""
    if codebooks is not None:
        return Vectors(codebooks, bits)
    return Integers(bits) if table is None else Table(tuple(table))


# ------------------------------------------------------------------------------------------------ in the kernels

def parameter(kernel, argument):
    """What PTX calls an argument of a kernel: the entry's name and the argument's number among those that are passed
    at run time. bench/sass.py holds it against what was compiled."""
    passed = [name for name in kernel.arg_names if kernel.fn.__annotations__.get(name) is not tl.constexpr]
    return f"{kernel.fn.__name__}_param_{passed.index(argument)}"


@triton.jit
def load_planes(cp, entries_ptr, turn: tl.constexpr, DT: tl.constexpr, C: tl.constexpr):
    """The four planes [BN, 32] in DT, in pass `turn`, of the tile whose `word_pointers` are cp.

    With codebooks the inputs of position i of a plane are those of vectors.order, and a plane's begin 4 after those
    of the one before; else they are 32 neighbours.
    """
    TEXT: tl.constexpr = C.TEXTS[turn]
    if C.BOOKS:
        return join_eight(vector_planes(cp, entries_ptr, turn, C.BITS, C.BOOKS, DT, TEXT, C.ASM), C.BN)
    elif TEXT == "":
        return load_tile(cp, C.BN, C.BITS, DT, C.ASM)
    else:
        return look_up(tl.load(cp), entries_ptr + 16 * turn, DT, TEXT, C.ASM)


@triton.jit
def join_dots(planes, C: tl.constexpr):
    """Four planes [BN, 32] -> those of each dot, [BN, DEPTH]."""
    if C.DEPTH == 128:
        return (join_planes4(planes[0], planes[1], planes[2], planes[3], C.BN),)
    elif C.DEPTH == 64:
        return join_planes2(planes[0], planes[1], C.BN), join_planes2(planes[2], planes[3], C.BN)
    else:
        return planes
