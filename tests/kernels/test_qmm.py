"""The matmul: the kernel (interpreted) against the oracle, and the promises about its bits."""
import dataclasses
import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from qzo.kernels import plan, tiles
from tests.support.close import assert_close, assert_same_bits
from tests.support.matmuls import (
    TILE,
    Matmul,
    assert_derivative,
    assert_zero_block_is_plain,
    changed,
    explore,
    matmuls,
    plain_of_block,
)

pytestmark = pytest.mark.usefixtures("nan_poison")

RATIO = dataclasses.replace(TILE, ratio=True)
DEEP = dataclasses.replace(TILE, deep=True)
SPLIT = dataclasses.replace(TILE, splits=2)
FOLDED = tiles.Tile(rows=16, outputs=128, warps=4, stages=1)     # a thread for each output, folded or in order
LANES = dataclasses.replace(FOLDED, in_order=True)
TILES = {"plain": TILE, "ratio": RATIO, "deep": DEEP, "split": SPLIT, "lanes": LANES, "folded": FOLDED,
         "all": dataclasses.replace(TILE, ratio=True, deep=True, splits=4),
         "large": tiles.Tile(rows=32, outputs=64, warps=4, stages=1)}


# ----------------------------------------------------------------------------------------- against the oracle

@explore(40)
@hypothesis.given(matmuls(largest_k=320, rows=st.sampled_from([1, 2, 5])), st.sampled_from(sorted(TILES)))
def test_kernel_is_true(matmul, tile):
    matmul.assert_true(matmul.kernel(TILES[tile]))


@pytest.mark.parametrize(("tile", "group", "zeros", "bits"), [
    (*variant, bits) for variant, bits in zip(itertools.product(TILES, [32, 64, 128, 0], ["uint8", "float32"]),
                                              itertools.cycle([2, 4, 8]))])
def test_every_variant_with_zero_points(tile, group, zeros, bits):
    """All three of them, and each with each number of bits.

    576 = 4.5 tiles: the last quad of groups and the last tile are both ragged where the group allows.
    """
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


def test_sixteen_bit_output_of_the_kernel():
    matmul = Matmul(bias=True)
    assert_same_bits(matmul.kernel(out_dtype=torch.float16), matmul.kernel().half())


# --------------------------------------------------------------------------------------------- the derivative

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
