"""Damaged checkpoints: each is read, or refused in one line, within little memory and time."""

import random

import pytest

from qzo.bench.fuzz import checkpoints
from qzo.bench.fuzz.runs import write
from tests.support.fuzzing import fuzz


@pytest.mark.parametrize("name", checkpoints.PARSERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path):
    ends = fuzz(name, tmp_path)
    assert ends["refused"] > 10
    assert sum(ends.values()) > 20


@pytest.mark.parametrize("name", checkpoints.PARSERS)
def test_what_the_faults_are_put_into_is_read(name, tmp_path, monkeypatch):
    for fault in ("data", "tree", "tensors", "tensor"):
        monkeypatch.setattr(f"qzo.bench.fuzz.mutations.{fault}", lambda whole, *_: whole)
    make, read = checkpoints.PARSERS[name]
    for seed in SOUND.get(name, range(8)):
        write(tmp_path, make(random.Random(seed)))
        read(tmp_path)
