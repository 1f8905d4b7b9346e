"""The only door to the kernels: arguments are checked once, results allocated, the device chooses the code that runs.

A matmul is planned when a weight first meets rows of some shape under a perturbation of some form; from then on it is a
look-up and a launch. What is traced (torch.compile, fake and meta tensors) or counted (a dispatch mode) sees one opaque
operator, `qzo::qmm`, whose seeds and coefficients are tensors: a new seed never recompiles. So is `qzo::update_`.
"""
import contextlib
import contextvars
import functools
import typing
import weakref
from collections.abc import Sequence

import torch

from ..kernels import dequantize, few_rows, folded, noise, perturb, plan, qmm, qmm_torch, tiles, update
from ..kernels.operands import Perturbation, Weight
from .checks import check_matmul, check_rows

_BACKENDS = ("auto", "torch", "triton")
LARGE_ROWS = ("fused", "folded", "blas", "auto")
TABLES = ("rounded", "exact")


class Choice(typing.NamedTuple):
    """What `backend` chooses."""

    name: str = "auto"
    large_rows: str = "fused"
    tables: str = "rounded"
    tile: tiles.Tile | None = None
    overlap: bool = True
    shared_launches: bool = True


DEFAULT = Choice()
_choice = contextvars.ContextVar("qzo_choice", default=DEFAULT)


@contextlib.contextmanager
def backend(name=None, *, large_rows=None, tables=None, tile=None, overlap=None,
            shared_launches=None):
    """Choose what runs inside the block: a context manager; None leaves a choice as it is.

    Parameters
    ----------
    name : str or None
        "auto" (Triton on a GPU, torch on a CPU), "torch" or "triton". "triton" on CPU tensors needs Triton's
        interpreter: set TRITON_INTERPRET=1 before the first import of qzo.
    large_rows : str or None
        What the Triton backend does with many rows per evaluation. "fused" (the default) multiplies by the scales in
        float32, exactly. The others round each perturbed weight once to 16 bits: "folded", from 128 rows on, in
        registers (kernels/folded.py); "blas", from 512 on, in a chunk of at most 32 MB that the library's matmul then
        reads. "auto" takes of these two what is thought fastest for the rows, with float16 activations only (bfloat16
        would lose an eighth of the signal). The torch backend works by chunks, exactly, whatever is asked.
    tables : str or None
        "rounded" (the default): the entries of a table (NF4, FP4) are rounded once to the type of the activations.
        "exact": they are multiplied as the sum of two such numbers, which leaves 2^-16 of an entry in bfloat16 and
        2^-22 in float16 (or 2^-25, if that is more), and takes a second pass over each tile. float32 activations need
        neither.
    tile : kernels.tiles.Tile or None
        What every matmul is to run with, in place of the one that tiles.pick chooses.
    overlap : bool or None
        Whether a launch may begin while the one ahead of it ends, where the chip can (True); no bit depends on it.
    shared_launches : bool or None
        Whether layers of a module that are given the same x, as q, k and v are, may run in one launch (True); no bit
        depends on it.

    Raises
    ------
    ValueError
        Another value; a tile that cannot be; inside, a matmul that would run without the tile.
    RuntimeError
        Inside: "triton" on CPU tensors without Triton's interpreter.
    """
    if name not in (None, *_BACKENDS):
        raise ValueError(f"backend({name!r}): the backends are {', '.join(map(repr, _BACKENDS))}")
    check_large_rows(large_rows or LARGE_ROWS[0])
    if tables not in (None, *TABLES):
        raise ValueError(f"tables={tables!r}: {' or '.join(map(repr, TABLES))} is wanted")
    if tile is not None:
        tile.check()
    asked = dict(name=name, large_rows=large_rows, tables=tables, tile=tile, overlap=overlap,
                 shared_launches=shared_launches)
    token = _choice.set(_choice.get()._replace(**{field: value for field, value in asked.items() if value is not None}))
    try:
        yield
    finally:
        _choice.reset(token)


def check_large_rows(value):
    """ValueError unless it is one of LARGE_ROWS."""
    if value not in LARGE_ROWS:
        raise ValueError(f"large_rows={value!r:.60}: {', '.join(map(repr, LARGE_ROWS[:-1]))} or {LARGE_ROWS[-1]!r} is "
                         "wanted")


def uses_triton(device):
    """Whether tensors on `device` go to the Triton kernels, under the current `backend`."""
    name = _choice.get().name
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


# ------------------------------------------------------------------------------------------------ the matmul

def matmul(x, weight, perturbation=None, out_dtype=None):
    """y = x . W^T + bias [..., N] of a kernels.operands.Weight under a Perturbation (None: the scales as they are).

    x : float16, bfloat16 or float32 [..., K], on the weight's device; its first dimension holds the evaluations
    out_dtype : of y; None: that of x

    Raises TypeError or ValueError for what does not fit, naming it.
    """
    if perturbation is None:
        perturbation = plain(x.device)
    choice = _choice.get()
    if is_traced(x):
        check_rows(x, perturbation)
        flat = x.reshape(-1, x.shape[-1])
        y = qmm_op(flat, weight.codes, weight.scales, weight.zeros, weight.bias, perturbation.seeds, perturbation.coefs,
                   weight.base4, weight.group, perturbation.law, perturbation.relative, out_dtype or x.dtype,
                   perturbation.shared, perturbation.pair, choice.large_rows, weight.bits, weight.table,
                   choice.tables == "exact", weight.codebooks, weight.book4)
        return y.view(*x.shape[:-1], weight.out_features)
    return _multiply(x, weight, perturbation, out_dtype or x.dtype, choice)


def is_traced(x):
    """Whether somebody follows operators: a compiler, a dispatch mode, autograd; or there is nothing to run on."""
    return (torch.compiler.is_compiling() or x.is_meta or torch._C._len_torch_dispatch_stack() > 0
            or (x.requires_grad and torch.is_grad_enabled()))


def _multiply(x, weight, perturbation, out_dtype, choice):
    shape = x.shape
    key = shape, x.dtype, x.get_device(), out_dtype, perturbation.form, choice
    run = weight.plans.get(key)
    y = torch.empty((*shape[:-1], weight.out_features), dtype=out_dtype, device=x.device)
    if run is None:
        check_matmul(x, weight, perturbation)
        if not y.numel():
            return y
        run = weight.keep(key, _plan(x.reshape(-1, shape[-1]), weight, perturbation, choice))
    run(x, weight, perturbation, y)
    return y


def _plan(x, weight, perturbation, choice):
    """What fills y [..., N]: a function of x [..., K], weight, perturbation and y. x here: [rows, K]."""
    exact, on_triton = choice.tables == "exact", uses_triton(x.device)
    if choice.tile and (choice.large_rows == "blas" or not on_triton):
        why = "large_rows='blas'" if on_triton else f"the torch backend, which is what runs on {x.device},"
        raise ValueError(f"backend(tile={choice.tile}): {why} has no tiles; ask for one of the two")
    if weight.book4 >= 0 and perturbation.law != noise.NONE:
        return functools.partial(_train_codebooks, choice)
    books = weight.codebooks
    if books is not None and (books.dtype != x.dtype or not books.is_contiguous() or books.data_ptr() % 16):
        return functools.partial(_cast_codebooks, choice)
    if not on_triton:
        return _few_rows if few_rows.multiplies(len(x), weight, perturbation) else functools.partial(_torch, exact)
    if weight.codes.dtype != torch.int16:
        raise ValueError("the Triton kernels read codes as planes, these are CPU rows; QZOLinear converts them")
    m, arch = len(x), _architecture(x.device)
    rows, asm = m // len(perturbation), arch.startswith("sm_")
    form = many_rows_form(choice.large_rows, rows, weight, x.dtype, exact)
    if form == "blas":
        return functools.partial(_blas, asm, exact)
    if form == "folded":
        tile = choice.tile or pick_tile(rows, weight, x.dtype, arch, exact, form)
        return functools.partial(_folded, tile, asm)
    return _fused(x, weight, perturbation, choice)


def _tile(x, weight, perturbation, choice):
    """The tile of a fused matmul with x [rows, K]."""
    return choice.tile or pick_tile(len(x) // len(perturbation), weight, x.dtype, _architecture(x.device),
                                    choice.tables == "exact")


def _fused(x, weight, perturbation, choice, others=()):
    """One launch for x [rows, K] by a weight, and by others with the same tile."""
    m, arch = len(x), _architecture(x.device)
    pdl = choice.overlap and m // len(perturbation) <= tiles.OVERLAP_UP_TO and plan.overlaps(arch)
    options = plan.Options(_tile(x, weight, perturbation, choice), asm=arch.startswith("sm_"), pdl=pdl,
                           exact=choice.tables == "exact")
    return _Fused(plan.Plan(weight, perturbation, m, x.dtype, options, others))


class _Fused:
    """A plan's launch, on rows as the kernel reads them."""

    def __init__(self, made):
        self.plan = made

    def __call__(self, x, weight, perturbation, *y):
        if not x.is_contiguous() or x.data_ptr() & 15:
            x = _aligned(x.contiguous())
        self.plan(x, perturbation.seeds, perturbation.coefs, *y)


# ------------------------------------------------------------------------------------ several weights in one launch

def plan_together(x, weights, perturbation):
    """(which of `weights`, what fills a y [..., N] of each) for one launch that multiplies x [..., K] by the first and
    as many others as may come along; (), None: none may. Each has the bits that it has alone."""
    choice, first = chosen(), weights[0]
    check_matmul(x, first, perturbation)
    flat = x.reshape(-1, x.shape[-1])
    rows, exact = len(flat) // len(perturbation), choice.tables == "exact"
    if (not 0 < rows <= tiles.SHARED_UP_TO or first.in_rows
            or many_rows_form(choice.large_rows, rows, first, x.dtype, exact) != "fused"):
        return (), None
    tile = _tile(flat, first, perturbation, choice)
    others = [weight for weight in weights[1:] if plan.together(first, weight)
              and _tile(flat, weight, perturbation, choice) == tile][:plan.MOST_MEMBERS - 1]
    if not others:
        return (), None
    for weight in others:
        check_matmul(x, weight, perturbation)
    return (first, *others), _fused(flat, first, perturbation, choice, others)


def chosen():
    """The Choice of the current `backend`."""
    return _choice.get()


def _flat(tensor):
    """[..., K] -> contiguous [rows, K]."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _torch(exact, x, weight, perturbation, y):
    qmm_torch.qmm_torch(_flat(x), weight, perturbation, y.view(-1, y.shape[-1]), exact=exact)


def _few_rows(x, weight, perturbation, y):
    weight.turned.multiply(_flat(x), weight, y.view(-1, y.shape[-1]))


def _blas(asm, exact, x, weight, perturbation, y):
    dequantize.matmul(_aligned(_flat(x)), weight, perturbation, y.view(-1, y.shape[-1]), asm=asm, exact=exact)


def pick_tile(rows, weight, dtype, arch, exact=False, form="fused"):
    """The tile that so many rows per evaluation of a Weight run with on `arch`."""
    pick = tiles.pick_folded if form == "folded" else tiles.pick
    return pick(tiles.Problem.of(rows, weight, dtype, arch, exact))


def many_rows_form(asked, rows, weight, dtype, exact=False):
    """"fused", "folded" or "blas": what a matmul of so many rows per evaluation runs as where `asked` is wanted."""
    if asked == "auto":
        asked = "fused" if dtype != torch.float16 else "blas" if rows >= tiles.BLAS_WINS_FROM else "folded"
    if asked == "blas":
        return "blas" if rows >= tiles.BLAS_FROM else "fused"
    folds = asked == "folded" and rows >= tiles.FOLDED_FROM and folded.supports(weight, dtype, exact)
    return "folded" if folds else "fused"


def _folded(tile, asm, x, weight, perturbation, y):
    folded.launch(_aligned(_flat(x)), weight, perturbation, y.view(-1, y.shape[-1]), tile=tile, asm=asm)


def _cast_codebooks(choice, x, weight, perturbation, y):
    """Codebooks in another type than x: cast while they are multiplied."""
    books = weight.with_codebooks(_aligned(weight.codebooks.to(x.dtype).contiguous()))
    _plan(_flat(x), books, perturbation, choice)(x, books, perturbation, y)


def _train_codebooks(choice, x, weight, perturbation, y):
    """Codebooks that train: those of one evaluation at a time, and its rows."""
    own, count = torch.empty(weight.codebooks.shape, dtype=x.dtype, device=x.device), len(perturbation)
    run = perturb.launch if uses_triton(x.device) else perturb.perturb_codebooks_torch
    books = weight.with_codebooks(own)
    for e, (rows, out) in enumerate(zip(_flat(x).chunk(count), y.view(-1, y.shape[-1]).chunk(count), strict=True)):
        one = perturbation.one(e)
        run(weight.codebooks.view(-1, 4), one.seeds, one.coefs, own.view(-1, 4), base4=weight.book4, law=one.law,
            relative=one.relative)
        _plan(rows, books, one, choice)(rows, books, one, out)


def _aligned(tensor):
    """On 16 bytes, as the kernels load it: a view into another tensor may not be."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@functools.cache
def plain(device):
    """One unperturbed evaluation."""
    return Perturbation(torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device), noise.NONE)


# ------------------------------------------------------------------------------------------------ operators

_known: weakref.WeakValueDictionary = weakref.WeakValueDictionary()     # a layer's Weight, which has plans already


def know(weight):
    """Let the operator find a layer's Weight again by its tensors."""
    _known[weight.codes.data_ptr(), weight.scales.data_ptr()] = weight


def _known_or(made):
    """The layer's own Weight where it is the same as the one made of an operator's arguments."""
    own = _known.get((made.codes.data_ptr(), made.scales.data_ptr())) if not made.codes.is_meta else None
    return own if own is not None and own.same(made) else made


@torch.library.custom_op("qzo::qmm", mutates_args=())
def qmm_op(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
           bias: torch.Tensor | None, seeds: torch.Tensor, coefs: torch.Tensor, base4: int, group: int, law: int,
           relative: bool, out_dtype: torch.dtype, shared: bool = False, pair: bool = False,
           large_rows: str = "fused", bits: int = 4, table: Sequence[float] | None = None, exact: bool = False,
           codebooks: torch.Tensor | None = None, book4: int = -1) -> torch.Tensor:
    choice = _choice.get()._replace(large_rows=large_rows, tables=TABLES[exact])
    table = None if table is None else tuple(table)
    weight = Weight(codes, scales, x.shape[-1], group, zeros, bias, base4, bits, table, codebooks, book4)
    return _multiply(x, _known_or(weight), Perturbation(seeds, coefs, law, relative, shared, pair), out_dtype, choice)


@qmm_op.register_fake
def _(x, codes, scales, zeros, bias, seeds, coefs, base4, group, law, relative, out_dtype, shared=False, pair=False,
      large_rows="fused", bits=4, table=None, exact=False, codebooks=None, book4=-1):
    weight = Weight(codes, scales, x.shape[-1], group, zeros, bias, base4, bits, table, codebooks, book4)
    check_matmul(x, weight, Perturbation(seeds, coefs, law, relative, shared, pair))
    return x.new_empty(x.shape[0], weight.out_features, dtype=out_dtype)


@torch.library.custom_op("qzo::update_", mutates_args=("scales",))
def update_op(scales: torch.Tensor, seeds: torch.Tensor, coefs: torch.Tensor, base4: int, law: int, relative: bool,
              floor: float, layers: torch.Tensor | None = None) -> None:
    _check_update(scales, seeds, coefs)
    if scales.numel() == 0 or seeds.numel() == 0:
        return
    run = update.launch if uses_triton(scales.device) else update.update_torch
    pairs = seeds.contiguous(), coefs.contiguous()
    run(scales, *pairs, base4=base4, law=law, relative=relative, floor=floor, layers=layers)


@update_op.register_fake
def _(scales, seeds, coefs, base4, law, relative, floor, layers=None):
    _check_update(scales, seeds, coefs)


def _check_update(scales, seeds, coefs):
    if scales.dtype != torch.float32 or not scales.is_contiguous() or scales.numel() % 4:
        raise ValueError(f"scales must be contiguous float32 in whole quads, got {scales.dtype} {list(scales.shape)}")
    types = seeds.dtype, coefs.dtype
    if types != (torch.int64, torch.float32) or seeds.shape != coefs.shape or seeds.dim() not in (1, 2):
        raise ValueError(f"seeds and coefs must be int64 and float32, [J] or [S, J], got {seeds.dtype} "
                         f"{list(seeds.shape)} and {coefs.dtype} {list(coefs.shape)}")
