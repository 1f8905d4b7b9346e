"""Weight and Perturbation: when two say the same, what a plan may be kept for, one evaluation of several."""
import dataclasses

import pytest
import torch

from qzo.kernels import forms, operands
from qzo.kernels.operands import Perturbation, addresses
from tests.support.close import assert_same_bits
from tests.support.matmuls import Matmul, pack_rows

MATMUL = Matmul(k=256, group=64, n=5, zeros="uint8", bias=True)


@pytest.fixture
def weight():
    return MATMUL.operands()[0]


def test_sizes_come_from_the_tensors(weight):
    assert (weight.out_features, weight.groups, weight.zero_type, weight.in_rows) == (5, 4, torch.uint8, False)
    assert weight.form == forms.Integers(4)
    assert set(weight.tensors()) == {"codes", "scales", "zeros", "bias"}
    rows = Matmul(zeros=None).operands(form=pack_rows)[0]
    assert (rows.zero_type, rows.in_rows) == (None, True)
    assert set(rows.tensors()) == {"codes", "scales"}


OTHERS = {
    "codes": lambda w: w.codes.clone(), "scales": lambda w: w.scales.clone(), "zeros": lambda w: w.zeros.clone(),
    "bias": lambda w: None, "in_features": lambda w: 512, "group": lambda w: 128, "base4": lambda w: 1001,
    "bits": lambda w: 8, "table": lambda w: tuple(range(16)), "codebooks": lambda w: torch.zeros(1, 16, 8),
    "book4": lambda w: 0,
}


@pytest.mark.parametrize("field", [
    f.name for f in dataclasses.fields(operands.Weight) if f.name not in ("plans", "turned")     # copies of the same
])
def test_two_weights_are_the_same_until_a_field_differs(weight, field):
    """By memory, not by values: a plan holds addresses."""
    assert weight.same(dataclasses.replace(weight, plans={}))
    other = dataclasses.replace(weight, **{field: OTHERS[field](weight)})
    assert not weight.same(other)
    assert not other.same(weight)


def test_other_memory_of_the_same_tensor_is_seen(weight):
    before = weight.addresses()
    weight.scales.mul_(2)
    assert weight.addresses() == before
    weight.scales.data = weight.scales.data + 1
    assert weight.addresses() != before
    assert addresses(None, weight.codes) == [None, weight.codes.data_ptr()]


def test_codebooks_that_are_put_in_do_not_train_and_bring_no_plan_along():
    weight = dataclasses.replace(Matmul(group=0, books=2, bits=8).operands()[0], book4=7)
    weight.keep("rows", "made")
    books = weight.codebooks.half() * 2
    other = weight.with_codebooks(books)
    assert other.codebooks is books
    assert (other.book4, other.plans) == (-1, {})
    assert other.codes is weight.codes
    assert other.form.codebooks is books
    assert weight.plans == {"rows": "made"}


def test_the_oldest_plan_goes(weight, monkeypatch):
    monkeypatch.setattr(operands, "MOST_PLANS", 2)
    for key in "abc":
        assert weight.keep(key, key.upper()) == key.upper()
    assert weight.plans == {"b": "B", "c": "C"}


def test_one_evaluation_of_several():
    several = Perturbation(torch.tensor([5, 5, 9]), torch.tensor([0.1, -0.1, 0.2]), 2, False, True, True)
    assert len(several) == 3
    one = several.one(1)
    assert (one.law, one.relative, one.shared, one.pair) == (2, False, True, False)     # one is no pair
    assert_same_bits(one.seeds, torch.tensor([5]))
    assert_same_bits(one.coefs, torch.tensor([-0.1]))


def test_a_plan_is_for_every_seed_and_coefficient_of_one_form():
    seeds, coefs = torch.tensor([5, 5]), torch.tensor([0.1, -0.1])
    form = Perturbation(seeds, coefs, 1).form
    assert Perturbation(seeds + 1, 2 * coefs, 1).form == form
    others = [Perturbation(seeds[:1], coefs[:1], 1), Perturbation(seeds, coefs, 2),
              Perturbation(seeds, coefs, 1, relative=False), Perturbation(seeds, coefs, 1, shared=True),
              Perturbation(seeds, coefs, 1, pair=True), Perturbation(seeds.to("meta"), coefs, 1)]
    assert len({form, *(other.form for other in others)}) == 1 + len(others)
