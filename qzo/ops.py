"""The only door to the kernels: arguments are checked once, results allocated, the device chooses the code that runs.

`qmm` and `update_` are torch.library operators, so torch.compile and CUDA graphs see one opaque call whose seeds and
coefficients are tensors: a new seed never recompiles.
"""
import contextlib
import contextvars
import functools
from collections.abc import Sequence

import torch

from .kernels import codes as code_layouts
from .kernels import dequantize, noise, perturb, qmm, qmm_torch, tiles, update, vectors

_BACKENDS = ("auto", "torch", "triton")
LARGE_ROWS = ("fused", "blas")
TABLES = ("rounded", "exact")
_backend = contextvars.ContextVar("qzo_backend", default="auto")
_large_rows = contextvars.ContextVar("qzo_large_rows", default="fused")
_tables = contextvars.ContextVar("qzo_tables", default="rounded")
_tile = contextvars.ContextVar("qzo_tile", default=None)


@contextlib.contextmanager
def backend(name=None, *, large_rows=None, tables=None, tile=None):
    """Choose what runs inside the block; None leaves a choice as it is.

    name : "auto" (Triton on a GPU, torch on a CPU), "torch" or "triton". "triton" on CPU tensors needs Triton's
        interpreter: set TRITON_INTERPRET=1 before the first import of qzo.
    large_rows : what the Triton backend does from 512 rows per evaluation on. "fused" (the default) never stores a
        perturbed weight. "blas" writes a chunk of at most 32 MB of them for the library's matmul: faster where the
        tensor cores are the limit, but each weight is rounded to 16 bits. The torch backend works by chunks anyway.
    tables : "rounded" (the default): the entries of a table (NF4, FP4) are rounded once to the type of the activations.
        "exact": they are multiplied as the sum of two such numbers, which leaves 2^-16 of an entry in bfloat16 and
        2^-22 in float16 (or 2^-25, if that is more), and takes a second pass over each tile. float32 activations need
        neither.
    tile : a kernels.tiles.Tile that every matmul is to run with, in place of the one that tiles.pick chooses

    Raises ValueError for another value; for a tile that cannot be, and where a matmul inside would run without it.
    """
    if name not in (None, *_BACKENDS):
        raise ValueError(f"backend({name!r}): the backends are {', '.join(map(repr, _BACKENDS))}")
    check_large_rows(large_rows or LARGE_ROWS[0])
    if tables not in (None, *TABLES):
        raise ValueError(f"tables={tables!r}: {' or '.join(map(repr, TABLES))} is wanted")
    if tile is not None:
        tile.check()
    chosen = {_backend: name, _large_rows: large_rows, _tables: tables, _tile: tile}
    before = {variable: variable.set(value or variable.get()) for variable, value in chosen.items()}
    try:
        yield
    finally:
        for variable, token in before.items():
            variable.reset(token)


def check_large_rows(value):
    """ValueError unless it is one of LARGE_ROWS."""
    if value not in LARGE_ROWS:
        raise ValueError(f"large_rows={value!r}: {' or '.join(map(repr, LARGE_ROWS))} is wanted")


def uses_triton(device):
    """Whether tensors on `device` go to the Triton kernels, under the current `backend`."""
    name = _backend.get()
    if name == "auto":
        return device.type == "cuda"
    if name == "triton" and device.type == "cpu" and not interpreted():
        raise RuntimeError("backend('triton') on CPU tensors needs Triton's interpreter: set TRITON_INTERPRET=1 in "
                           "the environment before qzo is imported, or use backend('torch')")
    return name == "triton"


def interpreted():
    """Whether the kernels were made for Triton's interpreter (decided when they were imported)."""
    return not hasattr(qmm._qmm_kernel, "device_caches")


@functools.cache
def _architecture(device):
    return "interpreter" if device.type == "cpu" or interpreted() else tiles.architecture(device)


def _check_qmm(x, codes, scales, zeros, bias, seeds, coefs, group, bits, table, codebooks, book4, shared):
    """Shapes and dtypes of qmm; returns (rows, outputs). Called by the operator and by its fake."""
    if x.dim() != 2 or not x.is_floating_point() or x.dtype == torch.float64:
        raise TypeError(f"x must be float16, bfloat16 or float32 [rows, in_features], got {x.dtype} {list(x.shape)}")
    m, k = x.shape
    n = codes.shape[0] if codes.dtype == torch.uint8 else codes.shape[1]
    evaluations = seeds.numel()
    if codebooks is not None:
        _check_codebooks(codebooks, bits, k, group, zeros, table, book4, shared)
        wanted = vectors.vector_shape(n, k, len(codebooks), bits)
    else:
        wanted = (code_layouts.row_shape if codes.dtype == torch.uint8 else code_layouts.plane_shape)(n, k, bits)
    if codes.dtype not in (torch.uint8, torch.int16) or list(codes.shape) != wanted:
        raise ValueError(f"x has {k} columns, which does not fit {bits}-bit codes {codes.dtype} {list(codes.shape)}: "
                         "in_features of the layer and the last dimension of its input must agree")
    if k % group:
        raise ValueError(f"group_size {group} does not divide in_features {k}; use one that does, or -1 (whole row)")
    groups = k // group
    if scales.dtype != torch.float32 or list(scales.shape) != [-(-groups // 4), n, 4]:
        raise ValueError(f"scales must be float32 {[-(-groups // 4), n, 4]}, got {scales.dtype} {list(scales.shape)}")
    if zeros is not None and (zeros.dtype not in (torch.uint8, torch.float32) or list(zeros.shape) != [groups, n]):
        raise ValueError(f"zeros must be uint8 or float32 {[groups, n]}, got {zeros.dtype} {list(zeros.shape)}")
    if table is not None and (len(table) != 16 or bits != 4 or zeros is not None):
        raise ValueError(f"a table of 16 entries goes with 4-bit codes and no zeros, got {len(table)} entries, {bits} "
                         "bits" + ("" if zeros is None else " and zeros"))
    if bias is not None and list(bias.shape) != [n]:
        raise ValueError(f"bias must have shape {[n]}, got {list(bias.shape)}")
    if evaluations != coefs.numel() or evaluations == 0:
        raise ValueError(f"{evaluations} seeds and {coefs.numel()} coefficients: one of each per evaluation is wanted")
    if m % evaluations:
        raise ValueError(f"{m} rows do not divide into {evaluations} evaluations: stack the batch {evaluations} times "
                         "along its first dimension (qzo.pair does it)")
    for name, t in (("codes", codes), ("scales", scales), ("zeros", zeros), ("bias", bias), ("codebooks", codebooks),
                    ("seeds", seeds), ("coefs", coefs)):
        if t is not None and t.device != x.device:
            raise ValueError(f"x is on {x.device} but the layer's {name} on {t.device}: move the whole model with "
                             "model.to(device)")
    return m, n


def lookup_of(table, exact, codebooks):
    """What tiles.pick calls that which codes stand for."""
    if codebooks is not None:
        books, entries, _ = codebooks.shape
        return "vectors" if vectors.words_of(books, entries.bit_length() - 1) <= 2 else "long vectors"
    return None if table is None else "exact" if exact else "table"


def _check_codebooks(codebooks, bits, k, group, zeros, table, book4, shared):
    """ValueError unless they are [C, 2^bits, 8], one scale to an output; if they train, with noise for each number."""
    if codebooks.dim() != 3 or list(codebooks.shape[1:]) != [1 << bits, vectors.LENGTH]:
        raise ValueError(f"codebooks must be [C, {1 << bits}, {vectors.LENGTH}] for codes of {bits} bits, got "
                         f"{list(codebooks.shape)}")
    if group != k or zeros is not None or table is not None:
        also = ("" if zeros is None else ", zeros") + ("" if table is None else ", a table")
        raise ValueError(f"x has {k} columns, and codebooks go with one scale to an output row of as many, no zeros "
                         f"and no table; got a group_size of {group}{also}: in_features of the layer and the last "
                         "dimension of its input must agree")
    if book4 >= 0 and (shared or codebooks.dtype != torch.float32 or not codebooks.is_contiguous()):
        raise ValueError("codebooks that train are contiguous float32 with noise for each number, got "
                         f"{codebooks.dtype}" + (" and noise shared by rows" if shared else ""))


@torch.library.custom_op("qzo::qmm", mutates_args=())
def qmm_op(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
           bias: torch.Tensor | None, seeds: torch.Tensor, coefs: torch.Tensor, base4: int, group: int, law: int,
           relative: bool, out_dtype: torch.dtype, shared: bool = False, pair: bool = False,
           blas: bool = False, bits: int = 4, table: Sequence[float] | None = None, exact: bool = False,
           codebooks: torch.Tensor | None = None, book4: int = -1) -> torch.Tensor:
    m, n = _check_qmm(x, codes, scales, zeros, bias, seeds, coefs, group, bits, table, codebooks, book4, shared)
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    numbers = dict(base4=base4, group=group, law=law, relative=relative, shared=shared, bits=bits, exact=exact,
                   table=None if table is None else tuple(table))
    x = x.contiguous()
    if codebooks is None or book4 < 0 or law == noise.NONE:
        codebooks = None if codebooks is None else _aligned(codebooks.to(x.dtype).contiguous())
        _run(x, codes, scales, zeros, bias, seeds, coefs, y, pair, blas, numbers | {"codebooks": codebooks})
        return y
    # codebooks that train: those of one evaluation at a time, and its rows
    own = torch.empty(codebooks.shape, dtype=x.dtype, device=x.device)
    count = seeds.numel()
    for e, (rows, out) in enumerate(zip(x.chunk(count), y.chunk(count), strict=True)):
        one = seeds[e:e + 1], coefs[e:e + 1]
        run = perturb.launch if uses_triton(x.device) else perturb.perturb_codebooks_torch
        run(codebooks.view(-1, 4), *one, own.view(-1, 4), base4=book4, law=law, relative=relative)
        _run(rows, codes, scales, zeros, bias, *one, out, False, blas, numbers | {"codebooks": own})
    return y


def _aligned(tensor):
    """On 16 bytes, as the kernels load it: a view into another tensor may not be."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _run(x, codes, scales, zeros, bias, seeds, coefs, y, pair, blas, numbers):
    """Fill y by the backend and the kernel that are wanted; numbers: what all of them take by name."""
    rows, group = len(x) // seeds.numel(), numbers["group"]
    asked = _tile.get()
    if asked and (blas or not uses_triton(x.device)):
        why = "large_rows='blas'" if blas else f"the torch backend, which is what runs on {x.device},"
        raise ValueError(f"backend(tile={asked}): {why} has no tiles; ask for one of the two")
    if not uses_triton(x.device):
        qmm_torch.qmm_torch(x, codes, scales, zeros, bias, seeds, coefs, y, **numbers)
        return
    if codes.dtype != torch.int16:
        raise ValueError("the Triton kernels read codes as planes, these are CPU rows; QZOLinear converts them")
    x, arch = _aligned(x), _architecture(x.device)
    asm = arch.startswith("sm_")
    if blas and rows >= tiles.BLAS_FROM:
        dequantize.matmul(x, codes, scales, zeros, bias, seeds, coefs, y, asm=asm, **numbers)
        return
    lookup = lookup_of(numbers["table"], numbers["exact"], numbers["codebooks"])
    tile = asked or tiles.pick(rows, y.shape[1], x.shape[1], group, x.dtype, arch,
                               None if zeros is None else zeros.dtype, numbers["bits"], lookup)
    qmm.launch(x, codes, scales, zeros, bias, seeds, coefs, y, tile=tile, asm=asm, pair=pair, **numbers)


@qmm_op.register_fake
def _(x, codes, scales, zeros, bias, seeds, coefs, base4, group, law, relative, out_dtype, shared=False, pair=False,
      blas=False, bits=4, table=None, exact=False, codebooks=None, book4=-1):
    m, n = _check_qmm(x, codes, scales, zeros, bias, seeds, coefs, group, bits, table, codebooks, book4, shared)
    return x.new_empty(m, n, dtype=out_dtype)


@torch.library.custom_op("qzo::update_", mutates_args=("scales",))
def update_op(scales: torch.Tensor, seeds: torch.Tensor, coefs: torch.Tensor, base4: int, law: int, relative: bool,
              floor: float, layers: torch.Tensor | None = None) -> None:
    _check_update(scales, seeds, coefs)
    if scales.numel() == 0 or seeds.numel() == 0:
        return
    run = update.launch if uses_triton(scales.device) else update.update_torch
    run(scales, seeds, coefs, base4=base4, law=law, relative=relative, floor=floor, layers=layers)


@update_op.register_fake
def _(scales, seeds, coefs, base4, law, relative, floor, layers=None):
    _check_update(scales, seeds, coefs)


def _check_update(scales, seeds, coefs):
    if scales.dtype != torch.float32 or not scales.is_contiguous() or scales.numel() % 4:
        raise ValueError(f"scales must be contiguous float32 in whole quads, got {scales.dtype} {list(scales.shape)}")
    if seeds.dtype != torch.int64 or coefs.dtype != torch.float32 or seeds.shape != coefs.shape or seeds.dim() != 1:
        raise ValueError(f"seeds and coefs must be int64 and float32 [J], got {seeds.dtype} {list(seeds.shape)} and "
                         f"{coefs.dtype} {list(coefs.shape)}")


def matmul(x, codes, scales, zeros, bias, evaluations, *, base4, group, out_dtype=None, trains=True, bits=4,
           table=None, codebooks=None, book4=-1):
    """y = x . W^T + bias [rows, N] under `evaluations` (None: the scales as they are). Shapes as in kernels/qmm.py.

    codebooks: in any type; book4: number of their first quad in the noise law if they train, float32 then.
    trains=False: the scales as they are for every evaluation, whose number still fixes what rows belong together.
    """
    blas = _large_rows.get() == "blas"
    form = dict(bits=bits, table=table, exact=_tables.get() == "exact", codebooks=codebooks,
                book4=book4)
    if evaluations is None:
        plain = _plain(x.device)
        return qmm_op(x, codes, scales, zeros, bias, *plain, base4, group, noise.NONE, True, out_dtype or x.dtype,
                      blas=blas, **form)
    return qmm_op(x, codes, scales, zeros, bias, evaluations.seeds, evaluations.kernel_coefs, base4, group,
                  evaluations.law if trains else noise.NONE, evaluations.relative, out_dtype or x.dtype,
                  trains and evaluations.sharing == "row", evaluations.pairs, blas, **form)


@functools.cache
def _plain(device):
    """Seeds and coefficients of one unperturbed evaluation."""
    return torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
