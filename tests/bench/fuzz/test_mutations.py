"""Faults: what they are put into stays as it was, and they do what their names say."""

import json
import random

import torch

from qzo.bench.fuzz import mutations

TREE = {"a": {"b": [1, 2, {"c": "x"}], "d": True}, "e": 3}


def test_what_is_given_stays_and_most_of_what_comes_back_differs():
    before, whole = json.dumps(TREE), bytes(range(64))
    named = {"x": torch.arange(6).view(2, 3), "y": torch.ones(2)}
    draws = [random.Random(seed) for seed in range(100)]
    assert sum(mutations.tree(TREE, each) != TREE for each in draws) > 80
    assert sum(mutations.data(whole, each) != whole for each in draws) > 95
    assert sum(repr(mutations.tensors(named, each)) != repr(named) for each in draws) > 80
    assert json.dumps(TREE) == before
    assert repr(named) == repr({"x": torch.arange(6).view(2, 3), "y": torch.ones(2)})


def test_a_seed_is_a_case():
    for make in (mutations.value, lambda draws: mutations.data(b"abcdef", draws)):
        assert repr(make(random.Random(5))) == repr(make(random.Random(5)))


def test_every_kind_of_value_comes():
    kinds = {type(mutations.value(random.Random(seed))) for seed in range(200)}
    assert kinds == {type(None), bool, int, float, str, list, dict}


def test_a_checksum_is_that_of_the_bytes():
    assert mutations.checked(b"IEND") == b"IEND" + bytes.fromhex("ae426082")[::-1]  # as every PNG ends


def test_depth_is_what_is_asked_for():
    assert mutations.deep(2, True) == [[None]]
    assert mutations.deep(2, False) == {"a": {"a": None}}
