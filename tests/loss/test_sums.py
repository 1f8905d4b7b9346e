"""Sums of losses: exact, so that parts add up to the whole, and what is made of them."""

import pytest
import torch

from qzo.loss.label_bias import centred, centring
from qzo.loss.sums import GRAIN, exact_sums, fits, means


def test_no_order_and_no_division_changes_a_bit():
    torch.manual_seed(0)
    columns = torch.randn(2, 1000, 3) * 10 ** (12 * torch.rand(2, 1000, 3) - 10)
    whole = exact_sums(columns)
    assert whole.dtype == torch.float64
    order = torch.randperm(1000)
    parts = [exact_sums(columns[:, some]) for some in order.split(137)]
    assert torch.equal(sum(parts[1:], parts[0]), whole)
    torch.testing.assert_close(whole, columns.double().sum(1), rtol=0, atol=1000 / GRAIN)
    assert not torch.equal(columns.double()[:, order].sum(1), columns.double().sum(1)), "sums alone do depend on it"


def test_what_is_not_finite_stays_so():
    columns = torch.tensor([[[torch.nan, 1.0]], [[torch.inf, 1.0]]])
    assert exact_sums(columns).isnan().tolist() == [[True, False], [False, False]]
    assert means(exact_sums(columns))[1] == torch.inf


def test_means_are_rounded_as_losses_are():
    assert torch.equal(means(torch.tensor([[1.0, 3.0], [2.0, 4.0]]).double()), torch.tensor([1 / 3, 0.5]).double())
    losses = torch.tensor([0.1, 2.0], dtype=torch.float64)
    assert torch.equal(means(losses), losses)


def test_losses_are_centred_by_the_sums_of_the_whole_batch():
    """Two ranks of three rows under two evaluations, against the means of all six rows."""
    torch.manual_seed(1)
    scores, label = torch.randn(2, 6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    columns = torch.stack(
        [
            torch.cat([torch.nn.functional.cross_entropy(s, label, reduction="none")[:, None], torch.ones(6, 1)], 1)
            for s in scores
        ]
    )
    columns = torch.cat([columns, torch.stack([centring(s, label) for s in scores])], 2)
    got = means(exact_sums(columns[:, :3]) + exact_sums(columns[:, 3:]))
    plain = columns[..., 0].mean(1)
    torch.testing.assert_close(got.float(), centred(plain, columns[..., 2:].mean(1)))
    assert got[0].float() == pytest.approx(float(plain[0]))
    assert abs(float(got[1] - plain[1])) > 1e-3


@pytest.mark.parametrize(("shape", "good"), [((2,), 1), ((2, 2), 1), ((2, 8), 1), ((3,), 0), ((2, 1), 0), ((), 0)])
def test_losses_or_sums_of_as_many_evaluations(shape, good):
    assert fits(torch.zeros(shape), 2) == bool(good)
