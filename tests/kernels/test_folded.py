"""The folded form: kernel (interpreted) and reference share every weight's bits, and err as its docstring says."""
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qzo.kernels import folded, tiles
from qzo.kernels.codes import pack_planes, pack_rows
from qzo.kernels.forms import form_of
from qzo.kernels.table import FP4, NF4
from tests import oracle
from tests.support.close import assert_close, assert_same_bits
from tests.support.matmuls import TILE, Matmul, assert_zero_block_is_plain, changed

pytestmark = pytest.mark.usefixtures("nan_poison")

DEEP = dataclasses.replace(TILE, deep=True)
WIDE_TILE = tiles.Tile(rows=16, outputs=128, warps=4, stages=1)    # as many lanes as outputs
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def kernel(matmul, tile=TILE, out_dtype=torch.float32, device="cpu", asm=False, module=folded):
    """folded.launch: in the interpreter, or on a GPU. module: folded, or a copy of it with a fault."""
    y = torch.empty(len(matmul.x), matmul.n, dtype=out_dtype, device=device)
    module.launch(matmul.x.to(device), *matmul.operands(device), y, tile=tile, asm=asm)
    return y.cpu()


def reference(matmul, form=pack_planes, out_dtype=torch.float32, module=folded):
    y = torch.empty(len(matmul.x), matmul.n, dtype=out_dtype)
    module.folded_torch(matmul.x, *matmul.operands(form=form), y)
    return y


def one_hot(matmul):
    """The matmul whose y holds each rounded weight exactly: evaluation e of its rows k has w_e[:, k]."""
    assert matmul.rows == matmul.k
    matmul.__dict__["x"] = torch.eye(matmul.k, dtype=matmul.dtype).repeat(len(matmul.seeds), 1)
    return matmul


def assert_true(matmul, y):
    """Each weight errs by half a unit of its rounding and by what P lost; the sums as those of the exact form do."""
    p = 2.0**-folded.kept(matmul.dtype, form_of(matmul.bits, matmul.table, None))
    assert_close(y, matmul.want(), matmul.magnitude() * (HALF_ULP[matmul.dtype] + p) + 1e-9, 1)
    # a third of the largest in a weight's mean, and K of both signs: sums of 2^-12.2 for float16, of 5 sigma at most
    unit = (matmul.magnitude().square() / matmul.k).sqrt() * HALF_ULP[matmul.dtype]
    assert_close(y, matmul.want(), unit * 3 + 1e-9, 3, 0.6)


FORMS = {
    "symmetric": Matmul(k=320, group=64),
    "32": Matmul(k=288, n=17, group=32, zeros="uint8", law="ih4", bias=True),
    "64": Matmul(k=576, n=33, group=64, zeros="uint8", bias=True),
    "128": Matmul(k=640, n=40, group=128, zeros="uint8", law="gaussian"),
    "absolute": Matmul(k=320, group=32, relative=False, law="ih4", coefs=(0.01, -0.01, 0.0)),
    "absolute, past the last group": Matmul(k=96, group=32, zeros="uint8", relative=False, coefs=(0.01, -0.01, 0.0)),
    "no noise": Matmul(k=256, group=64, law=None, zeros="uint8"),
    "row": Matmul(k=256, group=64, shared=True, law="ih4", zeros="uint8", bias=True),
    "second counter word": Matmul(k=640, group=64, base4=2**32 - 20),
    "2 bits": Matmul(k=576, group=64, bits=2, zeros="uint8"),
    "8 bits": Matmul(k=320, group=64, bits=8, zeros="uint8"),
    "nf4": Matmul(k=320, group=64, table=NF4, law="ih4"),
    "fp4": Matmul(k=128, group=32, table=FP4),
    "odd": Matmul(k=160, n=1, rows=1, group=32, seeds=(7,), coefs=(0.1,)),
    "several programs": Matmul(k=128, n=80, rows=37, group=32, zeros="uint8", bias=True),
}


@pytest.mark.parametrize("name", FORMS)
def test_kernel_is_true(name):
    assert_true(FORMS[name], kernel(FORMS[name]))


@pytest.mark.parametrize("name", ["32", "64", "128"])
@pytest.mark.parametrize("tile", [DEEP, WIDE_TILE], ids=["deep", "a lane an output"])
def test_kernel_is_true_on_other_tiles(name, tile):
    assert_true(FORMS[name], kernel(FORMS[name], tile))


@pytest.mark.parametrize("name", FORMS)
def test_twin_is_true(name):
    planes, rows = reference(FORMS[name]), reference(FORMS[name], pack_rows)
    assert_true(FORMS[name], planes)
    assert_same_bits(planes, rows)


def test_twin_over_several_chunks():
    matmul = Matmul(k=640, n=700, rows=2, group=32, law="ih4", zeros="uint8", bias=True)
    assert folded.chunk_rows(matmul.n, matmul.k) < matmul.n / 1.5
    assert_true(matmul, reference(matmul))


# ---------------------------------------------------------------------------------------------- bits of a weight

WEIGHTS = [dict(group=32, zeros="uint8", law="ih4"), dict(group=64), dict(group=128, zeros="uint8", k=256),
           dict(group=64, relative=False, coefs=(0.01, -0.01)), dict(group=32, bits=2, zeros="uint8"),
           dict(group=64, bits=8, zeros="uint8"), dict(group=32, bits=8), dict(group=64, table=NF4, law="ih4"),
           dict(group=64, table=FP4)]


def weights(**form):
    matmul = Matmul(**{"k": 160 if form["group"] == 32 else 192, "n": 20, "seeds": (5, -9), "coefs": (0.1, -0.07),
                       **form})
    return one_hot(dataclasses.replace(matmul, rows=matmul.k))


@pytest.mark.parametrize("form", WEIGHTS, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 20.0], ids=["usual", "small", "subnormal", "large"])
def test_kernel_and_twin_have_the_same_weights(form, size):
    matmul = weights(**form)
    matmul.__dict__["scales"] = matmul.scales * size
    matmul.__dict__["raw_coefs"] = matmul.raw_coefs * (1.0 if matmul.relative else size)
    assert_same_bits(kernel(matmul), reference(matmul))


@pytest.mark.parametrize("form", WEIGHTS[:-2], ids=str)
def test_a_weight_is_rounded_once(form):
    """w / 256 is float16 of c * P, P being p rounded to B bits: written here by frexp, in float64 and Python."""
    matmul = weights(**form)
    bits = {2: 21, 4: 19, 8: 15}[matmul.bits]
    y = reference(matmul).double().split(matmul.k)
    for got, k, coef in zip(y, matmul.raw_noise, matmul.raw_coefs.tolist(), strict=True):
        p = oracle.perturbed(matmul.scales, k, coef, matmul.relative)
        p = (oracle._float32(matmul.scales.double() * oracle._float32(1 + coef * k)) if matmul.relative
             else oracle._float32(p)) * 256
        mantissa, exponent = torch.frexp(p)
        p = torch.ldexp(torch.sign(mantissa) * torch.floor(mantissa.abs() * 2.0**bits + 0.5), exponent - bits)
        exact = matmul.weight(p, matmul.zero_points)
        assert_same_bits(got.T.contiguous(), exact.to(torch.float32).half().double() / 256 + 0.0)     # -0 is 0


@pytest.mark.parametrize(("dtype", "table", "bits", "rms"), [
    (torch.float16, None, 4, 2.0**-12), (torch.float16, None, 8, 2.0**-12), (torch.float16, NF4, 4, 2.0**-12),
    (torch.bfloat16, None, 4, 2.0**-9), (torch.bfloat16, NF4, 4, 2.0**-9)])
def test_error_of_a_weight(dtype, table, bits, rms):
    matmul = weights(group=64, table=table, bits=bits, dtype=dtype)
    want = matmul.want()
    unit = want.abs().clamp(min=1e-12)
    assert_close(reference(matmul), want, unit,
                 HALF_ULP[dtype] * (1.3 if table or dtype == torch.bfloat16 else 1.1), rms)


def test_weights_below_and_above_the_range():
    matmul = weights(group=64, seeds=(5,), coefs=(0.0,))
    matmul.__dict__["scales"] = matmul.scales * 1e-7
    assert_close(reference(matmul), matmul.want(), 2.0**-33 + 16 * 2.0**-32, 1)
    matmul.__dict__["scales"] = matmul.scales * 0 + 255.9
    assert not reference(matmul).isfinite().all()        # 8 * 255.9 is no number here, and shows


# ------------------------------------------------------------------------------------------------- the derivative

def derivative_error(dtype, eps, run):
    """RMS error of (y+ - y-) / 2 eps over the RMS of x . (q z)."""
    matmul = Matmul(k=1280, n=32, rows=8, group=128, seeds=(7, 7), coefs=(eps, -eps), dtype=dtype)
    half = matmul.rows
    matmul.__dict__["x"] = matmul.x[:half].repeat(2, 1)
    plus, minus = run(matmul).double().split(half)
    want = matmul.x[:half].double() @ oracle.weight(matmul.codes, matmul.scales.double() * matmul.raw_noise[0], None).T
    error = (plus - minus) / (2 * eps) - want
    return (error.square().mean() / want.square().mean()).sqrt().item()


@pytest.mark.parametrize("run", [kernel, reference])
def test_derivative(run):
    """1.5 % at eps 0.01, inversely with eps."""
    assert 0.010 < derivative_error(torch.float16, 1e-2, run) < 0.018
    assert 0.0010 < derivative_error(torch.float16, 1e-1, run) < 0.0018


def test_derivative_in_bfloat16_is_worth_asking_for():
    assert 0.09 < derivative_error(torch.bfloat16, 1e-2, reference) < 0.14


# ------------------------------------------------------------------------------------------------ coefficient zero

@pytest.mark.parametrize("form", [
    dict(), dict(zeros="uint8", group=32, bias=True), dict(law="gaussian"), dict(shared=True), dict(bits=8),
    dict(relative=False), dict(table=NF4), dict(law="ih4", group=128, k=384), dict(bits=2, zeros="uint8")], ids=str)
@pytest.mark.parametrize("run", [kernel, reference])
def test_zero_coefficient_is_the_plain_forward(form, run):
    assert_zero_block_is_plain(Matmul(**{"rows": 5, "coefs": (0.1, 0.0, -0.1), **form}), 1, run)


def test_an_evaluation_does_not_see_the_others():
    matmul = Matmul(rows=3, law="ih4", zeros="uint8")
    alone = changed(matmul, seeds=matmul.seeds[1:2], coefs=matmul.coefs[1:2])
    alone.__dict__["x"] = matmul.x[3:6]
    assert_same_bits(kernel(matmul)[3:6], kernel(alone))


def test_sixteen_bit_output():
    matmul = Matmul(bias=True)
    assert_same_bits(kernel(matmul, out_dtype=torch.float16), kernel(matmul).half())


# ------------------------------------------------------------------------------------------------------ refusals

@pytest.mark.parametrize("form", [dict(dtype=torch.float32), dict(zeros="float32"), dict(group=0),
                                  dict(group=128, k=128)], ids=str)
def test_a_form_that_cannot_be_folded_is_refused(form):
    matmul = Matmul(**form)
    with pytest.raises(ValueError, match=r"\[9, \d+\], groups of \d+, .*the folded form takes .*use plan.launch"):
        kernel(matmul)


def test_supports():
    def supported(dtype=torch.float16, exact=False, **form):
        return folded.supports(Matmul(**{"k": 256, "group": 64, **form}).operands()[0], dtype, exact)

    for good in ({}, {"dtype": torch.bfloat16}, {"zeros": "uint8"}, {"group": 32}, {"bits": 8}, {"table": NF4}):
        assert supported(**good)
    for bad in ({"dtype": torch.float32}, {"exact": True, "table": NF4}, {"group": 0}, {"zeros": "float32"},
                {"group": 0, "books": 2, "bits": 8}):
        assert not supported(**bad)


# --------------------------------------------------------------------------------------------------------- tiles

@pytest.mark.parametrize(("rows", "n", "zeros", "bits", "lookup", "wanted"), [
    (2048, 4096, None, 4, None, (256, 128)),
    (512, 4096, None, 2, None, (256, 128)),
    (512, 4096, torch.uint8, 4, None, (128, 128)),      # the large one would spill
    (512, 4096, None, 8, None, (128, 128)),
    (512, 4096, None, 4, "table", (128, 128)),
    (128, 11008, None, 4, None, (128, 128)),
    (128, 4096, None, 4, None, (128, 64)),              # 64 programs of 128 x 128 would leave half the chip idle
])
def test_tiles_of_a_hopper(rows, n, zeros, bits, lookup, wanted):
    tile = tiles.pick_folded(tiles.Problem(rows, n, 4096, 64, torch.float16, "sm_90", zeros, bits, lookup))
    assert (tile.rows, tile.outputs) == wanted
    assert tile.deep
    assert tile.splits == 1


def test_every_tile_stands():
    for arch in (*tiles.PROCESSORS, "interpreter", "sm_87", "gfx950"):
        for rows in (1, 128, 129, 512, 8192):
            for n, group, zeros in ((4096, 128, None), (192, 32, torch.uint8)):
                tile = tiles.pick_folded(tiles.Problem(rows, n, 4096, group, torch.float16, arch, zeros))
                tile.check()
                assert not tile.ratio
                if arch.startswith("sm_"):          # one or two lanes to an output, see the kernel
                    assert tile.outputs <= 32 * tile.warps <= 2 * tile.outputs
    blackwell = tiles.pick_folded(tiles.Problem(64, 4096, 4096, 128, torch.float16, "sm_100"))
    assert blackwell.rows <= 64         # Triton 3.6 and 128 rows


@pytest.mark.parametrize(("change", "text"), [
    (dict(dtype=torch.float32), "float32 activations"), (dict(group=4096), "group_size=4096 of 4096"),
    (dict(group=48), "group_size=48"), (dict(zeros=torch.float32), "zero points torch.float32"),
    (dict(lookup="exact"), "lookup exact")], ids=str)
def test_a_tile_that_cannot_be_had_is_refused(change, text):
    problem = dataclasses.replace(tiles.Problem(512, 4096, 4096, 128, torch.float16, "sm_90"), **change)
    with pytest.raises(ValueError, match=f"{text}.*use tiles.pick"):
        tiles.pick_folded(problem)


# ----------------------------------------------------------------------------------------------- planted faults

FAULTS = {   # what stands exactly once in folded.py, and what it becomes
    "groups passed down": ("return scales[1], scales[2],", "return scales[2], scales[2],"),
    "two groups passed down": ("return scales[2], scales[3],", "return scales[1], scales[3],"),
    "next quad of scales": ("tl.minimum(quad + 1, (G", "tl.minimum(quad, (G"),
    "next quad of zero points": ("tl.minimum(4 * quad + i, G", "tl.minimum(i, G"),
    "next quad of noise": ("base4 + quad.to(tl.int64) * next_quad(N, C)", "base4 + quad.to(tl.int64)"),
    "third group of a tile": ("_halves(scales[i],", "_halves(scales[i - i // 2 * (3 - i)],"),
    "zero point of the last": ("zeros, group + i,", "zeros, group + i - i // 3,"),
    "zero point": (".to(tl.int16, bitcast=True)\n        word = (", ".to(tl.int16)\n        word = ("),
    "lanes": ("tl.arange(0, C.LANES) // (C.LANES // BN)", "tl.arange(0, C.LANES) % BN"),
    "low half": ("low = (p - high.to(tl.float32)).to(DT)", "low = (p - p).to(DT)"),
    "rounding of P": ("+ (1 << 23 - C.KEPT)", "+ 0"),
    "sign of the low half": ("(c * low).to(DT).to(tl.float32)", "(c * -low).to(DT).to(tl.float32)"),
    "factor of a row": ("factor(k0, coef)", "factor(k0, -coef)"),
    "rows of the first evaluation": ("xp = x_ptr + (e * R + first)", "xp = x_ptr + (0 * R + first)"),
    "seed of the first evaluation": ("tl.load(seeds_ptr + e)", "tl.load(seeds_ptr)"),
    "coefficient of the first evaluation": ("tl.load(coefs_ptr + e)", "tl.load(coefs_ptr)"),
    "inputs past the last": ("mask=(t * 128 + at + k < K)", "mask=(t * 0 + at * 0 + k < K)"),
    "bias": ("bias_ptr + n).to", "bias_ptr + n * 0).to"),
    "factor of all": ("tl.full((BN,), 1 / _LIFT,", "tl.full((BN,), 2 / _LIFT,"),
    "reference: rounding of P": ("+ (1 << drop - 1)", "+ 0"),
    "reference: low half": ("(p - high).to(dtype)", "(p - p).to(dtype)"),
    "reference: zero points": ("c = c - (weight.zeros", "c = c + (weight.zeros"),
    "reference: noise of a row": ("at[0])[:, 0]", "at[0])[:, 1]"),
    "reference: noise of the first evaluation":
        ("perturbation.seeds[e], at), coef", "perturbation.seeds[0], at), coef"),
}


def check(module):
    """A second of truth about folded.py or a copy of it."""
    common: dict[str, Any] = dict(n=3, rows=2, seeds=(5, 9), coefs=(0.2, -0.1), bias=True)
    for matmul in (Matmul(k=288, group=32, law="ih4", zeros="uint8", **common),
                   Matmul(k=640, group=64, zeros="uint8", **common), Matmul(k=640, group=128, **common),
                   Matmul(k=96, group=32, zeros="uint8", relative=False, **common | {"coefs": (0.02, -0.02)}),
                   Matmul(k=256, group=64, shared=True, **common)):
        for run in (kernel, reference):
            assert_true(matmul, run(matmul, module=module))
    bits = weights(group=64, k=128, n=80)
    assert_same_bits(kernel(bits, module=module), reference(bits, module=module))
    assert_same_bits(reference(bits, module=module), reference(bits))


def copy_with(fault, folder):
    """folded.py with one fault or none, imported from `folder`."""
    old, new = fault
    source = Path(folded.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in folded.py"
    path = folder / "folded_copy.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("qzo.kernels.folded_copy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qzo.kernels.folded_copy", None)
    module = copy_with(FAULTS[name], tmp_path)
    with pytest.raises(AssertionError):
        check(module)


def test_a_copy_without_a_fault_is_green(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qzo.kernels.folded_copy", None)
    check(copy_with(("LIFT = 256.0", "LIFT = 256.0"), tmp_path))


# ---------------------------------------------------------------------------------------------------------- a GPU

def picked(matmul, n=None):
    """The tile that the package would run, were there n outputs, and whether it unpacks with inline PTX."""
    arch = tiles.architecture(torch.device("cuda"))
    problem = tiles.Problem.of(matmul.rows, matmul.operands()[0], matmul.dtype, arch)
    tile = tiles.pick_folded(dataclasses.replace(problem, n=n or matmul.n))
    return dict(tile=tile, device="cuda", asm=arch.startswith("sm_"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", WEIGHTS, ids=str)
def test_compiled_kernel_and_twin_have_the_same_weights(form, dtype):
    """With x one-hot a sum is one weight; the integer laws, so every bit."""
    matmul = weights(**form, dtype=dtype)
    assert_same_bits(kernel(matmul, **picked(matmul)) + 0.0, reference(matmul) + 0.0)        # -0 is 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("rows", "n"), [(130, 192), (300, 8192)])
def test_compiled_kernel_is_true(name, rows, n, dtype):
    matmul = dataclasses.replace(FORMS[name], rows=rows, n=192, dtype=dtype)
    y = kernel(matmul, **picked(matmul, n))
    assert_true(matmul, y)
    assert_same_bits(y, kernel(matmul, **picked(matmul, n)))


@pytest.mark.gpu
@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_compiled_zero_coefficient_is_the_plain_forward(law):
    matmul = Matmul(k=640, n=192, rows=300, coefs=(0.1, 0.0, -0.1), law=law, zeros="uint8", bias=True)
    assert_zero_block_is_plain(matmul, 1, lambda m: kernel(m, **picked(m, 8192)))
