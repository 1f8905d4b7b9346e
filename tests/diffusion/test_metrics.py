"""Measures of a flow-matching model against what they are by definition."""

import itertools

import numpy as np
import pytest
import torch

from qzo.diffusion import metrics
from qzo.diffusion.metrics import STRATA


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fixed_rows_fill_every_stratum_of_the_law():
    rows = metrics.fixed_rows(torch.sigmoid, 5, 2 * STRATA, (1, 3, 3), seed=1)
    again = metrics.fixed_rows(torch.sigmoid, 5, 2 * STRATA, (1, 3, 3), seed=1)
    assert torch.equal(rows.times, again.times)
    assert torch.equal(rows.noise, again.noise)
    probability = torch.special.logit(rows.times.double())  # the law of this test maps u to sigmoid(u)
    assert torch.equal((probability * STRATA).long().view(-1, STRATA), torch.arange(STRATA).repeat(10, 1))
    assert rows.noise.shape == (80, 1, 3, 3)
    assert rows.noise.flatten(1).unique(dim=0).shape[0] == 80


def test_paired_difference_is_that_of_independent_images():
    """Rows of one image move together: the error is that of 6 images, not of 96 rows."""
    of_image = gaussian(6)
    before = gaussian(6 * 16, seed=1)
    found = metrics.paired_difference(before, before + of_image.repeat_interleave(16), 16)
    assert found.mean == pytest.approx(float(of_image.mean()), rel=1e-6)
    assert found.error == pytest.approx(float(of_image.std()) / 6**0.5, rel=1e-6)
    assert found.z == pytest.approx(found.mean / found.error)
    assert found.strata == pytest.approx([found.mean] * STRATA, rel=1e-5)


def test_strata_are_told_apart():
    before = torch.zeros(4 * 16)
    after = (torch.arange(STRATA) / 4.0).repeat(8) + torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat_interleave(16)
    found = metrics.paired_difference(before, after, 16)
    assert found.strata == pytest.approx([0.5 + k / 4 for k in range(STRATA)])
    assert found.strata_errors == pytest.approx([3**-0.5 / 2] * STRATA)


def kid_by_definition(x, y):
    def k(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    within = [sum(k(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kid_and_its_jackknife_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 16)  # a kernel matrix in several blocks
    x, y = gaussian(7, 4).double().numpy(), gaussian(9, 4, seed=1).double().numpy() + 0.5
    found = metrics.kid(torch.from_numpy(x), torch.from_numpy(y))
    assert found.value == pytest.approx(kid_by_definition(x, y), rel=1e-9)
    left = [
        np.array([kid_by_definition(np.delete(x, i, 0), y) for i in range(7)]),
        np.array([kid_by_definition(x, np.delete(y, i, 0)) for i in range(9)]),
    ]
    variance = sum((len(v) - 1) / len(v) * ((v - v.mean()) ** 2).sum() for v in left)
    assert found.error == pytest.approx(variance**0.5, rel=1e-9)


def test_kid_is_zero_on_average_and_its_error_is_the_spread():
    """60 draws of two sets of one distribution, and of two: the spread seen is the error foretold."""
    for shift in (0.0, 0.7):
        found = [metrics.kid(gaussian(40, 6, seed=i), gaussian(50, 6, seed=999 + i) + shift) for i in range(60)]
        values = np.array([f.value for f in found])
        if not shift:
            assert abs(values.mean()) < 4 * values.std() / 60**0.5
        else:
            assert values.mean() > 10 * values.std() / 60**0.5
            assert np.mean([f.error for f in found]) == pytest.approx(values.std(), rel=0.3)


def test_features_are_the_networks_of_every_image():
    images = gaussian(7, 2, 3, 3)
    found = metrics.features_of(lambda part: part.half() * 2, images, rows=3)
    assert found.dtype == torch.float32
    assert torch.allclose(found, images.flatten(1) * 2, atol=1e-2)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_stand_side_by_side(channels):
    before, after = torch.rand(6, channels, 4, 5) - 2, torch.rand(6, channels, 4, 5) + 1  # all black, all white
    after[4] = 0.0
    picture = np.asarray(metrics.side_by_side(before, after, columns=3, zoom=2))
    assert picture.shape == (2 * 8, 2 * (15 + 2 + 15), *([3] if channels == 3 else []))
    left, gap, right = picture[:, :30], picture[:, 30:34], picture[:, 34:]
    assert left.max() == 0
    assert gap.min() == 255
    grey = right[8:, 10:20]  # sample 4: second line, second column
    assert grey.min() == grey.max() == 128
    assert (right == 255).sum() == right.size - grey.size


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: metrics.fixed_rows(torch.sigmoid, 3, 12, (1,)), "draws=12"),
        (lambda: metrics.paired_difference(torch.zeros(16), torch.zeros(8), 8), "same rows"),
        (lambda: metrics.paired_difference(torch.zeros(8), torch.zeros(8), 8), "two or more"),
        (lambda: metrics.kid(torch.zeros(5, 3), torch.zeros(5, 4)), "one network"),
        (lambda: metrics.kid(torch.zeros(2, 3), torch.zeros(5, 3)), "3 images"),
        (lambda: metrics.side_by_side(torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2, 2), 3), "multiple"),
    ],
)
def test_bad_input_is_one_clear_error(call, told):
    with pytest.raises(ValueError, match=told):
        call()
