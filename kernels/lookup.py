"""What codes stand for, whatever it is: themselves (codes.py), entries of a table (table.py), or vectors (vectors.py).

The kernels know nothing more of it than the four planes of a tile that `load_planes` gives, once for each pass.
"""
import triton
import triton.language as tl

from .codes import join_planes2, join_planes4, load_tile
from .table import look_up, on_device, table_texts
from .vectors import join_eight, vector_planes, vector_texts

PLAIN = dict(BOOKS=0, PASSES=1, TEXTS=("",))        # a code is its own number


def parameter(kernel, argument):
    """What PTX calls an argument of a kernel: the entry's name and the argument's number among those that are passed
    at run time. bench/sass.py holds it against what was compiled."""
    passed = [name for name in kernel.arg_names if kernel.fn.__annotations__.get(name) is not tl.constexpr]
    return f"{kernel.fn.__name__}_param_{passed.index(argument)}"


def lookups(kernel, scales, dtype, table, exact, codebooks):
    """(what the codes are looked up in, fields of Constants) for a kernel whose argument `entries_ptr` is the former.

    dtype: of the activations; table, exact: as plan.Plan takes them; codebooks: [C, 2^bits, 8] or None. scales stand
    in for what is not there.
    """
    if codebooks is not None:
        books, size, _ = codebooks.shape
        texts = vector_texts(books, size.bit_length() - 1, dtype, parameter(kernel, "entries_ptr"))
        return codebooks, dict(BOOKS=books, PASSES=len(texts), TEXTS=texts)
    if table is None:
        return scales, PLAIN
    texts = table_texts(table, dtype, exact)
    return on_device(table, dtype, exact, scales.device), dict(BOOKS=0, PASSES=len(texts), TEXTS=texts)


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
