"""The model of a tensor core's addition, what it says of the kernel, and the bound on the kernel's errors that follows.

The 21 tests that an H100 failed on 27 Nov 2026 had a bound for rounding to nearest, which no tensor core does."""
import pytest
import torch

from qzo.kernels.table import NF4
from qzo.kernels.tiles import Tile
from tests import oracle
from tests.support.close import ULP, errors
from tests.support.matmuls import Matmul
from tests.support.tensor_core import CORES, Core, add_block, emulate, truncations

H100 = CORES["sm_90"]
EXACT, VECTORS = Tile(64, 128, 8, 3, ratio=True, deep=True), Tile(64, 128, 8, 3, deep=True)     # of 150 rows


def one(acc, terms, core=H100):
    """acc plus the terms, each the product of a float16 and 1."""
    w = torch.zeros(1, core.block, dtype=torch.float64)
    w[0, :len(terms)] = torch.tensor(terms)
    start = torch.full((1, 1), acc, dtype=torch.float64)
    return add_block(start, w, torch.ones(1, core.block, dtype=torch.float64), core).item()


def test_a_sum_is_cut_off_toward_zero():
    assert one(1.0, [2.0**-23]) == 1 + 2.0**-23
    assert one(1.0, [1.5 * 2.0**-23]) == 1 + 2.0**-23
    assert one(-1.0, [-1.5 * 2.0**-23]) == -1 - 2.0**-23
    assert one(1.0, [-(2.0**-24)]) == 1 - 2.0**-24
    assert one(2.0**24, [1.0, 1.0]) == 2.0**24 + 2                    # one sum: nothing is cut off between the terms


@pytest.mark.parametrize(("arch", "bits"), [("sm_80", 24), ("sm_90", 25)])
def test_terms_are_cut_off_first(arch, bits):
    """Four on the last place kept are added; four below it are nothing, though together they reach it."""
    core, last = CORES[arch], 2.0**-bits
    assert one(0.0, [1.0] + [last] * 4 + [-1.0], core) == 4 * last
    assert one(0.0, [1.0] + [last / 2] * 4 + [-1.0], core) == 0


def test_the_exponent_of_a_product_is_that_of_its_factors():
    w = torch.zeros(1, 16, dtype=torch.float64)
    x = torch.zeros(1, 16, dtype=torch.float64)
    w[0, :3], x[0, :3] = torch.tensor([1.5, -1.5, 2.0**-12]), torch.tensor([1.5, 1.5, 2.0**-13])
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert add_block(zero, w, x, H100).item() == 2.0**-25         # 1.5 * 1.5 does not count as 2 and more
    w[0, :2] = torch.tensor([2.0, -2.0])
    assert add_block(zero, w, x, H100).item() == 0


def of_an_h100(**changes):
    """A matmul with the data of a test in test_gpu.py, where picking the tile draws the codebooks before the rest."""
    matmul = Matmul(k=640, n=192, group=0, bias=True, law="ih4", **changes)
    _ = matmul.codebooks, matmul.x, matmul.scales, matmul.bias_values, matmul.codes
    return matmul


def test_the_bits_that_an_h100_gave():
    """test_compiled_vectors_are_true[640-150-3-12-float16]: the entry that its failure printed as worst."""
    matmul = of_an_h100(rows=150, books=3, bits=12)
    got = emulate(matmul, VECTORS, H100, evaluations=[2], row=slice(68, 69), out=slice(23, 24))
    assert f"{got.item():.9g}" == "-3.61128283"
    assert f"{matmul.want()[368, 23].item():.9g}" == "-3.61129788"
    y = matmul.want().float()
    y[368, 23] = got
    matmul.assert_true(y, truncations=truncations(matmul, VECTORS, "sm_90"))
    with pytest.raises(AssertionError, match=r"worst entry \(368, 23\)"):
        matmul.assert_true(y)


def test_words_that_cancel_are_of_the_magnitude():
    """test_compiled_vectors_are_true[640-24-5-8-float32], without a tensor core: the weight's own magnitude is too
    small a measure of three words added one after the other."""
    matmul = of_an_h100(rows=24, books=5, bits=8, dtype=torch.float32)
    y = emulate(matmul, Tile(32, 32, 8, 2), None)
    matmul.assert_true(y)

    def of_the_weight(x, k, c):
        weight = matmul.weight(oracle.perturbed(matmul.scales.abs(), k.abs(), abs(c), relative=True))
        return x.abs() @ weight.abs().T + matmul.bias_values.double().abs()
    assert errors(y, matmul.want(), matmul._each(of_the_weight) * ULP)[0] > 6


def exact(**changes):
    return Matmul(**dict(dict(k=640, n=192, rows=8, group=64, bias=True, law="ih4", table=NF4, exact=True), **changes))


FAILED = {"exact 32": (exact(group=32), EXACT), "exact 64": (exact(), EXACT), "exact row": (exact(group=0), EXACT),
          "exact bfloat16": (exact(dtype=torch.bfloat16), EXACT),
          "5x8": (exact(group=0, table=None, exact=False, books=5, bits=8), VECTORS),
          "3x12": (exact(group=0, table=None, exact=False, books=3, bits=12), VECTORS),
          "3x12 bfloat16": (exact(group=0, table=None, exact=False, books=3, bits=12, dtype=torch.bfloat16), VECTORS)}


@pytest.mark.parametrize("name", FAILED)
def test_the_bound_takes_truncation_and_little_more(name):
    """Green as the hardware is; red for an accumulator that keeps five places less, and for rounding to nearest."""
    matmul, tile = FAILED[name]
    times, y = truncations(matmul, tile, "sm_90"), emulate(matmul, tile, H100)
    matmul.assert_true(y, truncations=times)
    for worse, allowed in ((y, 0), (emulate(matmul, tile, Core(16, 20)), times)):
        with pytest.raises(AssertionError, match="error in units"):
            matmul.assert_true(worse, truncations=allowed)


def test_groups_with_partial_sums_keep_the_bound_tight():
    matmul, tile = exact(group=32), Tile(16, 64, 4, 5, deep=True)
    assert truncations(matmul, tile, "sm_90") == 2
    matmul.assert_true(emulate(matmul, tile, H100), 2, 0.3)


def test_truncations_of_a_chain():
    assert truncations(*FAILED["exact row"], "sm_90") == 2 * 640 // 16
    assert truncations(*FAILED["3x12"], "sm_90") == truncations(*FAILED["5x8"], "sm_90") == 3 * 640 // 16
    for arch in ("sm_80", "sm_70"):
        assert truncations(exact(exact=False), EXACT, arch) == 640 // 8
    assert truncations(exact(dtype=torch.float32), EXACT, "sm_90") == 0
