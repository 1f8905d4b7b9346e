"""The matmul: kernel (interpreted) and CPU backend against the oracle, and the promises about their bits."""
import dataclasses

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from qzo.kernels import plan, qmm_torch, tiles
from qzo.kernels.codes import pack_planes, pack_rows
from tests import oracle
from tests.support.close import assert_close, assert_same_bits
from tests.support.matmuls import TILE, Matmul

pytestmark = pytest.mark.usefixtures("nan_poison")

RATIO = dataclasses.replace(TILE, ratio=True)
DEEP = dataclasses.replace(TILE, deep=True)
SPLIT = dataclasses.replace(TILE, splits=2)
FOLDED = tiles.Tile(rows=16, outputs=128, warps=4, stages=1)     # a thread for each output, folded or in order
LANES = dataclasses.replace(FOLDED, in_order=True)
TILES = {"plain": TILE, "ratio": RATIO, "deep": DEEP, "split": SPLIT, "lanes": LANES, "folded": FOLDED,
         "all": dataclasses.replace(TILE, ratio=True, deep=True, splits=4),
         "large": tiles.Tile(rows=32, outputs=64, warps=4, stages=1)}
EVALUATIONS = [((5,), (0.1,)), ((5, 5), (0.1, -0.1)), ((-1, 2**63 - 1, -1), (0.1, 0.0, -0.1)),
               ((5, 5, 2**63 - 1, 2**63 - 1), (0.1, -0.1, 0.0, 0.05)),
               ((1, 2, 3, 4, 5), (0.1, -0.2, 0.3, 0.0, 1e-3))]


def explore(examples):
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@st.composite
def matmuls(draw, largest_k, rows):
    """Every kind of matmul; K is a multiple of the group and often not of 128."""
    group = draw(st.sampled_from([32, 64, 128, 0]))
    width = group or draw(st.sampled_from([32, 64, 96, 100, 128, 200, 576]))
    k = width if group == 0 else width * draw(st.integers(1, largest_k // width))
    seeds, coefs = draw(st.sampled_from(EVALUATIONS))
    relative = draw(st.booleans())
    pair = len(seeds) % 2 == 0 and seeds[0::2] == seeds[1::2] and draw(st.booleans())
    return Matmul(k=k, n=draw(st.sampled_from([1, 16, 33, 48])), rows=draw(rows), group=group, seeds=seeds,
                  coefs=coefs if relative else tuple(c / 10 for c in coefs),
                  law=draw(st.sampled_from([None, "rademacher", "ih4", "gaussian"])), relative=relative,
                  zeros=draw(st.sampled_from([None, "uint8", "float32"])), bias=draw(st.booleans()),
                  dtype=draw(st.sampled_from([torch.float16, torch.float32])),
                  base4=draw(st.sampled_from([0, 1000, 2**32 - 20, 2**33 + 1])), pair=pair,
                  shared=relative and draw(st.booleans()), bits=draw(st.sampled_from([2, 4, 4, 8])))


# ----------------------------------------------------------------------------------------- against the oracle

@explore(40)
@hypothesis.given(matmuls(largest_k=320, rows=st.sampled_from([1, 2, 5])), st.sampled_from(sorted(TILES)))
def test_kernel_is_true(matmul, tile):
    matmul.assert_true(matmul.kernel(TILES[tile]))


@explore(60)
@hypothesis.given(matmuls(largest_k=640, rows=st.sampled_from([1, 2, 5, 17])),
                  st.sampled_from([pack_rows, pack_planes]))
def test_cpu_backend_is_true(matmul, form):
    matmul.assert_true(matmul.reference(form))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("zeros", ["uint8", "float32"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_variant_with_zero_points(tile, group, zeros, bits):
    """576 = 4.5 tiles: the last quad of groups and the last tile are both ragged where the group allows."""
    k = 640 if group == 128 else 576
    matmul = Matmul(k=k, n=17, rows=2, group=group, zeros=zeros, seeds=(3, 9), coefs=(0.2, -0.1), bits=bits)
    matmul.assert_true(matmul.kernel(TILES[tile]))


@pytest.mark.parametrize("matmul", [
    Matmul(k=128, n=80, rows=18, group=32, law="ih4", seeds=(4, 5), coefs=(0.1, -0.1)),
    Matmul(k=128, n=1, rows=1, group=128, bias=True),
    Matmul(k=256, n=192, rows=33, group=0, seeds=(1,), coefs=(0.1,), zeros="float32"),
])
@pytest.mark.parametrize("tile", ["plain", "large"])
def test_several_programs_and_ragged_edges(matmul, tile):
    matmul.assert_true(matmul.kernel(TILES[tile]))
    matmul.assert_true(matmul.reference())


@pytest.mark.parametrize("tile", ["plain", "ratio", "deep"])
@pytest.mark.parametrize(("k", "group"), [(96, 32), (192, 64)])
@pytest.mark.parametrize("zeros", ["uint8", "float32"])
def test_the_groups_that_fill_the_last_tile_add_nothing(tile, k, group, zeros):
    """Absolute noise gives a scale even to the groups past the last one, whose sum of x is zero."""
    matmul = Matmul(k=k, n=5, rows=2, group=group, zeros=zeros, relative=False, coefs=(0.01, -0.01, 0.0))
    matmul.assert_true(matmul.kernel(TILES[tile]))


def test_no_rows():
    assert Matmul(rows=0, bias=True).reference().shape == (0, 33)


def test_cpu_backend_over_several_chunks_and_noise_blocks():
    matmul = Matmul(k=640, n=700, rows=2, group=32, law="ih4", zeros="uint8", bias=True)
    assert qmm_torch.chunk_rows(matmul.n, matmul.k) < matmul.n / 1.5
    matmul.assert_true(matmul.reference())


def test_cpu_noise_made_in_small_blocks_is_the_same(monkeypatch):
    matmul = Matmul(k=640, n=70, rows=2, group=32)
    whole = matmul.reference()
    monkeypatch.setattr(qmm_torch, "BLOCK_QUADS", 64)
    assert_same_bits(matmul.reference(), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("relative", [True, False])
def test_sixteen_bit_input_and_output_on_the_cpu(dtype, relative):
    """Input is exact in float32; the output is rounded once, by at most half a unit of its own last place."""
    matmul = Matmul(dtype=dtype, relative=relative, bias=True)
    exact = matmul.reference()
    matmul.assert_true(exact)
    assert_same_bits(matmul.reference(out_dtype=dtype), exact.to(dtype))


def test_sixteen_bit_output_of_the_kernel():
    matmul = Matmul(bias=True)
    assert_same_bits(matmul.kernel(out_dtype=torch.float16), matmul.kernel().half())


# --------------------------------------------------------------------------------------------- the derivative

def assert_derivative(relative, eps, run, allowed, **more):
    """RMS error of (y+ - y-) / 2 eps in units of the derivative's RMS, and no entry four times as wrong."""
    matmul = Matmul(k=640, n=24, rows=8, group=128, seeds=(7, 7), coefs=(eps, -eps), relative=relative,
                    **more)
    half = matmul.rows
    matmul.__dict__["x"] = matmul.x[:half].repeat(2, 1)
    plus, minus = run(matmul).double().split(half)
    k = matmul.raw_noise[0]
    slope = matmul.scales.double() * k if relative else k
    want = matmul.x[:half].double() @ oracle.weight(matmul.codes, slope, matmul.zero_points).T
    got = (plus - minus) / (2 * matmul.raw_coefs[0].item())
    assert_close(got, want, want.square().mean().sqrt(), 4 * allowed, allowed)


@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("zeros", [None, "uint8"])
@pytest.mark.parametrize(("eps", "allowed"), [(1e-1, 1e-5), (1e-2, 1e-4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_derivative_on_the_cpu(eps, allowed, law, zeros, dtype):
    assert_derivative(True, eps, Matmul.reference, allowed, law=law, zeros=zeros, dtype=dtype)


@pytest.mark.parametrize("tile", ["plain", "ratio", "deep", "split"])
@pytest.mark.parametrize(("eps", "allowed"), [(1e-1, 1e-5), (1e-2, 1e-4)])
def test_derivative_of_the_kernel(tile, eps, allowed):
    """float16 inputs are exact and sums are float32, so the kernel meets the bound of the CPU."""
    assert_derivative(True, eps, lambda m: m.kernel(TILES[tile]), allowed, law="ih4")


@pytest.mark.parametrize("run", [Matmul.reference, Matmul.kernel])
def test_derivative_absolute(run):
    """Scales of about 0.015: an absolute eps of 1.5e-3 is a relative 1e-1."""
    assert_derivative(False, 1.5e-3, run, 1e-5, law="ih4")


# ------------------------------------------------------------------------------------------- pairs of evaluations

def changed(matmul, **fields):
    """The same matmul, random values included, with other fields."""
    other = dataclasses.replace(matmul, **fields)
    for name in ("codes", "scales", "zero_points", "bias_values", "x"):
        other.__dict__[name] = getattr(matmul, name)
    return other


@pytest.mark.parametrize("tile", ["plain", "deep", "split"])
@pytest.mark.parametrize("rows", [1, 8, 9, 20])
@pytest.mark.parametrize(("group", "shared", "zeros"), [(32, False, "uint8"), (128, False, "float32"),
                                                        (0, False, None), (64, True, None)])
def test_a_pair_in_one_tile_has_the_bits_of_two_tiles(tile, rows, group, shared, zeros):
    """Rows of +eps and -eps in one tile, in a tile of twice the rows, and over several of them.

    x holds small integers, whose dots are exact: the interpreter's matmul library adds a larger tile in another order
    on some processors. With any x, test_gpu.py asks the same of the hardware.
    """
    matmul = Matmul(k=192 if group != 128 else 384, n=33, rows=rows, group=group, zeros=zeros, shared=shared, bias=True,
                    law="ih4", seeds=(5, 5, -9, -9), coefs=(0.1, -0.1, 0.05, 0.0), pair=True)
    matmul.__dict__["x"] = matmul.x.mul(4).round()
    together = matmul.kernel(TILES[tile])
    matmul.assert_true(together)
    assert_same_bits(together, changed(matmul, pair=False).kernel(TILES[tile]))


def test_a_pair_is_one_program(monkeypatch):
    grids = []

    def record(grid):
        grids.append(grid)
        return lambda *_, **__: None
    kernel = type("Kernel", (), {"__getitem__": staticmethod(record), "fn": None, "arg_names": ()})()
    monkeypatch.setattr(plan, "_qmm_kernel", kernel)
    for rows, pair in ((8, True), (16, True), (17, True), (tiles.most_paired(64) + 1, True), (8, False)):
        Matmul(n=32, rows=rows, pair=pair, seeds=(5, 5, 9, 9), coefs=(0.1,) * 4).kernel()
    assert grids == [(1, 2, 1), (1, 2, 1), (1, 4, 1), (1, 12, 1), (1, 4, 1)]


# ------------------------------------------------------------------------------------------- coefficient zero

def plain_of_block(matmul, e):
    """The same layer and rows of evaluation e alone, without noise."""
    alone = dataclasses.replace(matmul, seeds=matmul.seeds[e:e + 1], coefs=(0.0,), law=None)
    for name in ("codes", "scales", "zero_points", "bias_values"):
        alone.__dict__[name] = getattr(matmul, name)
    alone.__dict__["x"] = matmul.x[e * matmul.rows:(e + 1) * matmul.rows]
    return alone


def assert_zero_block_is_plain(matmul, e, run):
    y = run(matmul)
    blocks = y.split(matmul.rows)
    assert_same_bits(blocks[e], run(plain_of_block(matmul, e)))
    perturbed = y.abs().median() * 1e-3
    assert all((other - blocks[e]).abs().max() > perturbed for other in blocks[:e] + blocks[e + 1:])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 16, 33, 64])
@pytest.mark.parametrize(("k", "n"), [(128, 33), (576, 192), (640, 600)])
def test_zero_coefficient_is_the_plain_forward_on_the_cpu(threads, rows, k, n):
    matmul = Matmul(k=k, n=n, rows=rows, group=64, coefs=(0.1, 0.0, -0.1), dtype=torch.float32)
    torch.set_num_threads(threads)
    try:
        assert_zero_block_is_plain(matmul, 1, Matmul.reference)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("law", ["rademacher", "ih4", "gaussian"])
@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("rows", [2, 5])
def test_zero_coefficient_on_unaligned_rows(relative, law, offset, rows):
    """The batch is a view that starts `offset` floats into a buffer, the plain rows are not: without a copy
    MKL gives up to three such rows other bits."""
    matmul = Matmul(k=192, n=40, rows=rows, coefs=(0.1, -0.1, 0.0), law=law, relative=relative,
                    dtype=torch.float32)
    plain = plain_of_block(matmul, 2).reference()
    buffer = torch.zeros(matmul.x.numel() + offset)
    view = buffer[offset:].view(matmul.x.shape)
    view.copy_(matmul.x)
    matmul.__dict__["x"] = view
    assert view.data_ptr() % 64
    assert_same_bits(matmul.reference()[2 * rows:], plain)


@pytest.mark.parametrize("tile", ["plain", "ratio", "deep", "split", "large"])
@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_zero_coefficient_is_the_plain_forward_in_the_kernel(tile, law):
    matmul = Matmul(rows=5, coefs=(0.1, 0.0, -0.1), law=law, zeros="uint8", bias=True)
    assert_zero_block_is_plain(matmul, 1, lambda m: m.kernel(TILES[tile]))


@pytest.mark.parametrize("run", [Matmul.reference, Matmul.kernel])
def test_an_evaluation_does_not_see_the_others(run):
    """The bits of a block are those it has alone, whatever the neighbours' seeds, coefficients and rows."""
    matmul = Matmul(rows=3, law="ih4")
    alone = plain_of_block(matmul, 1)
    alone = dataclasses.replace(alone, coefs=matmul.coefs[1:2], law="ih4")
    alone.__dict__.update({name: getattr(matmul, name) for name in ("codes", "scales")}, x=matmul.x[3:6])
    assert_same_bits(run(matmul)[3:6], run(alone))


# --------------------------------------------------------------------------------------------- awkward scales

def with_scales(matmul, change):
    scales = matmul.scales.clone()
    change(scales)
    matmul.__dict__["scales"] = scales
    return matmul


def awkward(scales):
    scales[:, 0] = 0.0                       # a whole output without scales
    scales[::2, 1] = 0.0
    scales[0, 2], scales[-1, 3] = 0.0, 0.0
    scales[1, 4], scales[2, 5] = 1e-30, -1e-38
    scales[:, 6] = -scales[:, 6].abs()
    scales[:, 7] *= 1e4 ** torch.linspace(-1, 1, len(scales))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("zeros", [None, "uint8", "float32"])
def test_zero_tiny_and_negative_scales(tile, zeros):
    """The ratio form divides by scales: those below 1e-20 count as 1e-20, which the sums are far above."""
    matmul = with_scales(Matmul(k=320, n=17, rows=2, group=64, zeros=zeros), awkward)
    y, want = matmul.kernel(TILES[tile]), matmul.want()
    floor = 1e-20 * matmul.x.double().abs().sum(1, keepdim=True) * 24
    assert_close(y, want, matmul.magnitude() * 2.0**-24 + floor, 4)


# ------------------------------------------------------------------------------------------- splits

@pytest.mark.parametrize(("splits", "group"), [(2, 32), (4, 32), (8, 64), (2, 0), (8, 0)])
def test_splits_are_added_in_order(splits, group):
    """Twice the same bits, bias once, and also when there are more splits than quads of groups."""
    matmul = Matmul(k=576, n=17, rows=2, group=group, bias=True, zeros="float32", seeds=(8,), coefs=(0.1,))
    tile = dataclasses.replace(TILE, splits=splits)
    y = matmul.kernel(tile)
    matmul.assert_true(y)
    assert_same_bits(y, matmul.kernel(tile))
