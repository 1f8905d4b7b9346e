"""What codes stand for, whatever it is: themselves (codes.py), entries of a table (table.py), or vectors (vectors.py).

The kernels know nothing more of it than the four planes of a tile that `load_planes` gives, once for each pass.
"""
import triton
import triton.language as tl

from .codes import load_tile
from .table import look_up, on_device, table_texts
from .vectors import join_eight, vector_planes, vector_texts, words_of

PLAIN = dict(BOOKS=0, PASSES=1, HEAD="", STEP="", TABLE="", LAST="")        # a code is its own number


def lookups(kernel, scales, dtype, table, exact, codebooks):
    """(what the codes are looked up in, constants) for a kernel whose argument `entries_ptr` is the former.

    dtype: of the activations; table, exact: as qmm.launch takes them; codebooks: [C, 2^bits, 8] or None. scales stand
    in for what is not there. Constants: BOOKS, the number of codebooks; PASSES over a tile, whose products are added;
    HEAD + STEP * turn + TABLE, the text by which a pass looks up, or ""; LAST in place of TABLE in the last pass.
    """
    if codebooks is not None:
        books, size, _ = codebooks.shape
        parameter = f"{kernel.fn.__name__}_param_{kernel.arg_names.index('entries_ptr')}"
        head, step, table, last = vector_texts(books, size.bit_length() - 1, dtype, parameter)
        return codebooks, dict(BOOKS=books, PASSES=words_of(books, size.bit_length() - 1), HEAD=head, STEP=step,
                               TABLE=table, LAST=last)
    if table is None:
        return scales, PLAIN
    texts = table_texts(table, dtype, exact)
    return (on_device(table, dtype, exact, scales.device),
            dict(PLAIN, PASSES=len(texts), TABLE=texts[0], LAST=texts[-1]))


@triton.jit
def load_planes(cp, entries_ptr, turn: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr, BOOKS: tl.constexpr,
                DT: tl.constexpr, PTX: tl.constexpr, ASM: tl.constexpr):
    """The four planes [BN, 32] in DT, in pass `turn`, of the tile whose `word_pointers` are cp.

    With codebooks the inputs of position i of a plane are those of vectors.order, and a plane's begin 4 after those
    of the one before; else they are 32 neighbours.
    """
    if BOOKS:
        return join_eight(vector_planes(cp, entries_ptr, turn, BITS, BOOKS, DT, PTX, ASM), BN)
    elif PTX == "":
        return load_tile(cp, BN, BITS, DT, ASM)
    else:
        return look_up(tl.load(cp), entries_ptr + 16 * turn, DT, PTX, ASM)
