"""The quantizer that needs no data: its error, what its codes and scales are, and what it refuses."""

import pytest
import torch

from qzo.kernels.table import FP4, NF4
from qzo.nn import quantize
from qzo.nn.quantize import check_form, quantize_weight
from tests.support.close import assert_same_bits


def uniform(n=48, k=256, seed=0):
    """Of both signs, and of another size in every row."""
    random = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(n, k, generator=random) - 1) * torch.rand(n, 1, generator=random)


def plain_rounding(weight, group, symmetric, bits):
    """float64: round to nearest without refitting the scale, the error that the quantizer has to beat."""
    w, most = weight.double().unflatten(1, (-1, group)), (1 << bits) - 1
    low, high = w.amin(2, keepdim=True), w.amax(2, keepdim=True)
    if symmetric:
        scale, zero = w.abs().amax(2, keepdim=True) / (most / 2), float(1 << bits - 1)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / most
        zero = (-low / scale).round()
    codes = ((w / scale).round() + zero).clamp(0, most)
    return ((codes - zero) * scale).flatten(1)


def rms(error):
    return error.double().square().mean().sqrt()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "bits"), [(32, 4), (128, 4), (-1, 4), (64, 2), (64, 8)])
def test_it_is_close_and_better_than_plain_rounding(symmetric, group, bits):
    """Rounding a range r to 2^b codes leaves r / (2^b - 1) / sqrt(12) in the mean."""
    weight, width = uniform(), 256 if group == -1 else group
    packed = quantize_weight(weight, group, symmetric, bits)
    assert (packed.bits, packed.group_size, packed.zeros is None) == (bits, width, symmetric)
    error, scales = packed.dequantize() - weight, packed.scales.T.repeat_interleave(width, 1)
    assert rms(error) < rms(plain_rounding(weight, width, symmetric, bits) - weight)
    ranges = 2 * weight.unflatten(1, (-1, width)).abs().amax(2).square().mean().sqrt()
    assert rms(error) < 1.15 * ranges / ((1 << bits) - 1) / 12**0.5
    assert (error.abs() / scales.abs()).max() < (1.6 if bits == 2 else 1.1)
    assert torch.equal(packed.scales, packed.scales.half().float()), "checkpoints hold float16"


def test_the_scale_is_the_least_squares_one_for_its_codes():
    """To float16's rounding, but where the last rounding of all has changed a code."""
    packed, weight = quantize_weight(uniform(), 64), uniform()
    centred = packed.unpacked().double().unflatten(1, (-1, 64)) - 8
    best = (weight.double().unflatten(1, (-1, 64)) * centred).sum(2) / centred.square().sum(2)
    assert (packed.scales.T / best - 1).abs().quantile(0.6) < 2**-11


def test_zero_points_serve_weights_of_one_sign():
    """All codes are used, where a symmetric code wastes half of them."""
    weight = uniform().abs() + 0.1
    skewed, symmetric = quantize_weight(weight, 64, symmetric=False), quantize_weight(weight, 64)
    assert skewed.zeros is not None
    assert (skewed.zeros == 0).all()
    assert rms(skewed.dequantize() - weight) < 0.7 * rms(symmetric.dequantize() - weight)
    negative = quantize_weight(-weight, 64, symmetric=False)
    assert negative.zeros is not None
    assert (negative.zeros == 15).all()
    narrow = quantize_weight(1 + uniform().abs() / 10, 64, symmetric=False)
    error = (narrow.dequantize() - 1 - uniform().abs() / 10).abs()
    assert error.max() < 0.55 * narrow.scales.max(), "zero is a code, however far from the weights it is"


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(symmetric):
    weight = uniform(8, 64)
    weight[3, :32] = 0
    packed = quantize_weight(weight, 32, symmetric)
    assert (packed.dequantize()[3, :32] == 0).all()
    assert (packed.unpacked()[3, :32] == (8 if symmetric else 0)).all(), "the code of zero, and no NaN made an integer"
    assert torch.isfinite(packed.scales).all()


@pytest.mark.parametrize("entries", [NF4, FP4, tuple((i - 8) / 4 for i in range(16))])
def test_codes_of_a_table_are_the_nearest_entries(entries):
    weight = uniform(6, 128)
    packed = quantize_weight(weight, 64, table=entries)
    assert (packed.table, packed.zeros) == (entries, None)
    scales = weight.unflatten(1, (-1, 64)).abs().amax(2) / max(map(abs, entries))
    assert_same_bits(packed.scales.T.contiguous(), scales)
    distance = (weight / scales.repeat_interleave(64, 1)).unsqueeze(2) - torch.tensor(entries)
    got = distance.abs().gather(2, packed.unpacked().long().unsqueeze(2)).squeeze(2)
    assert torch.allclose(got, distance.abs().amin(2), atol=1e-6)
    zero = quantize_weight(torch.zeros(2, 64), 64, table=entries)
    assert (zero.unpacked() == entries.index(0.0)).all(), "the lower of two codes alike: FP4 has two zeros"


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"table": NF4}])
def test_blocks_of_rows_change_nothing(monkeypatch, options):
    weight = uniform(7, 64)
    whole = quantize_weight(weight, 32, **options)
    monkeypatch.setattr(quantize, "BLOCK", 130)  # two rows at a time, and one at last
    parts = quantize_weight(weight, 32, **options)
    assert torch.equal(parts.codes, whole.codes)
    assert_same_bits(parts.scales, whole.scales)
    assert (parts.zeros is None) == (whole.zeros is None)
    if parts.zeros is not None and whole.zeros is not None:
        assert torch.equal(parts.zeros, whole.zeros)


def test_16_bit_weights_are_quantized_as_their_float32():
    weight = uniform(8, 64).bfloat16()
    got, want = quantize_weight(weight, 32), quantize_weight(weight.float(), 32)
    assert torch.equal(got.codes, want.codes)
    assert_same_bits(got.scales, want.scales)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=3), "bits=3: codes have"),
        (dict(bits=8, table=NF4), "a table's codes have 4 bits and no zero points, got bits=8; leave that out"),
        (dict(symmetric=False, table=NF4), "a table's codes have 4 bits and no zero points, got symmetric=False; "),
    ],
)
def test_forms_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        check_form(**{"bits": 4, "symmetric": True, "table": None, **options})
    with pytest.raises(ValueError, match=message):
        quantize_weight(uniform(), **options)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite(value):
    weight = uniform(4, 64)
    weight[2, 7] = value
    for table in (None, NF4):
        with pytest.raises(ValueError, match="the weight holds NaN or infinity: it cannot be quantized"):
            quantize_weight(weight, 32, table=table)
    with pytest.raises(ValueError, match="group_size=128 does not divide in_features=64; use 32, 64, -1"):
        quantize_weight(weight, 128)
