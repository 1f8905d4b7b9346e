"""What a kernel knows at compile time of its weight and perturbation: the formulas, and what must not be among them."""
import dataclasses

import pytest
import torch

from qzo.kernels import constants, noise
from qzo.kernels.constants import Constants
from tests.support.matmuls import Matmul

PLAIN = dict(BOOKS=0, PASSES=1, TEXTS=("",))        # what a form gives whose codes are numbers


def fields(matmul, lookup=PLAIN):
    weight, perturbation = matmul.operands()
    return Constants(**constants.of_operands(weight, perturbation, lookup, asm=False))


@pytest.mark.parametrize(("group", "per_tile", "period"), [(32, 4, 1), (64, 2, 2), (128, 1, 4)])
def test_groups_fill_a_tile_and_tiles_a_quad(group, per_tile, period):
    found = fields(Matmul(k=256, group=group, law="ih4"))
    assert (found.GROUP, found.PER_TILE, found.PERIOD, found.WHOLE_ROW) == (group, per_tile, period, False)
    assert found.LAW == found.NOISE == noise.IH4


@pytest.mark.parametrize(("k", "group"), [(200, 0), (96, 96), (128, 128)])
def test_a_whole_row_is_scaled_after_the_loop(k, group):
    """Whatever its length: the loop multiplies without scales and noise."""
    found = fields(Matmul(k=k, group=group))
    assert (found.WHOLE_ROW, found.GROUP, found.PER_TILE) == (True, 128, 1)
    assert (found.LAW, found.NOISE) == (noise.RADEMACHER, noise.NONE)


def test_noise_that_a_row_shares_leaves_the_loop():
    found = fields(Matmul(shared=True))
    assert (found.SHARED, found.WHOLE_ROW, found.LAW, found.NOISE) == (True, False, noise.RADEMACHER, noise.NONE)


@pytest.mark.parametrize(("zeros", "wanted"), [(None, 0), ("uint8", 1), ("float32", 2)])
def test_the_kind_of_zero_points(zeros, wanted):
    assert fields(Matmul(zeros=zeros)).ZERO == wanted


@pytest.mark.parametrize(("bits", "words", "first", "middle"), [(2, 16, 16, 2), (4, 32, 32, 8), (8, 64, 32, 128)])
def test_words_of_a_tile_hold_its_128_codes(bits, words, first, middle):
    found = fields(Matmul(bits=bits))
    assert (found.WORDS, found.FIRST_WORDS, found.MIDDLE) == (words, first, middle)
    assert words * 16 == 128 * bits


def test_a_vector_has_a_word_for_each_pass():
    found = fields(Matmul(group=0, books=3, bits=8), dict(BOOKS=3, PASSES=2, TEXTS=("a", "b")))
    assert (found.WORDS, found.FIRST_WORDS) == (32, 16)
    assert (found.BOOKS, found.PASSES, found.TEXTS) == (3, 2, ("a", "b"))


@pytest.mark.parametrize(("more", "wide"), [(-1, False), (0, False), (1, True)])
def test_quad_numbers_are_wide_from_the_first_that_32_bits_do_not_hold(more, wide):
    """128 quads of scales: the last is number base4 + 127."""
    matmul = Matmul(k=1024, n=32, group=64)
    assert matmul.quads.shape[:2].numel() == 128
    assert fields(dataclasses.replace(matmul, base4=2**32 - 128 + more)).WIDE == wide


def test_layers_of_other_sizes_and_places_run_the_same_compiled_kernel():
    one = fields(Matmul(k=256, n=33, rows=3, base4=0))
    for other in (Matmul(k=1024, n=48, rows=5, base4=2000), Matmul(seeds=(1,), coefs=(0.3,))):
        assert repr(fields(other)) == repr(one)


def test_every_field_has_a_value_where_nobody_gives_one():
    """A kernel reads only those that concern it; Triton compares the record as a tuple of plain values."""
    assert isinstance(Constants(), tuple)
    assert all(isinstance(value, int | str | tuple) for value in Constants())
    assert not any(isinstance(value, torch.Tensor) for value in fields(Matmul(zeros="uint8", bias=True)))
