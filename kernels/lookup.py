"""What codes stand for, whatever it is: themselves (codes.py), entries of a table (table.py), or vectors (vectors.py).

The kernels know nothing more of it than the four planes of a tile that `load_planes` gives, once for each pass.
"""
import triton
import triton.language as tl

from .codes import load_tile
from .table import look_up, on_device, table_texts
from .vectors import join_eight, vector_planes, vector_texts

PLAIN = dict(BOOKS=0, PASSES=1, TABLE="", LAST="")        # a code is its own number


def lookups(kernel, scales, dtype, table, exact, codebooks):
    """(what the codes are looked up in, constants) for a kernel whose argument `entries_ptr` is the former.

    dtype: of the activations; table, exact: as qmm.launch takes them; codebooks: [C, 2^bits, 8] or None. scales stand
    in for what is not there. Constants: BOOKS, the number of codebooks; PASSES over a tile, whose products are added;
    TABLE, the text by which a pass looks up, or ""; LAST, that of the last pass.
    """
    if codebooks is not None:
        entries = codebooks
        texts = vector_texts(codebooks, dtype, f"{kernel.fn.__name__}_param_{kernel.arg_names.index('entries_ptr')}")
    elif table is not None:
        entries, texts = on_device(table, dtype, exact, scales.device), table_texts(table, dtype, exact)
    else:
        return scales, PLAIN
    books = 0 if codebooks is None else len(codebooks)
    return entries, dict(BOOKS=books, PASSES=len(texts), TABLE=texts[0], LAST=texts[-1])


@triton.jit
def load_planes(cp, entries_ptr, turn: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr, BOOKS: tl.constexpr,
                DT: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr):
    """The four planes [BN, 32] in DT, in pass `turn`, of the tile whose `word_pointers` are cp.

    With codebooks the inputs of position i of a plane are those of vectors.order, and a plane's begin 4 after those
    of the one before; else they are 32 neighbours.
    """
    if BOOKS:
        return join_eight(vector_planes(cp, entries_ptr, turn, BITS, BOOKS, DT, TABLE, ASM), BN)
    elif TABLE == "":
        return load_tile(cp, BN, BITS, DT, ASM)
    else:
        return look_up(tl.load(cp), entries_ptr + 16 * turn, DT, TABLE, ASM)
