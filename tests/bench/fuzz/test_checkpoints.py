"""Checkpoints with faults: each is read, or refused in one line, within little memory and time."""

import pytest

from qzo.bench.fuzz import checkpoints
from tests.support.fuzzing import fuzz


@pytest.mark.parametrize("name", checkpoints.PARSERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path):
    ends = fuzz(name, tmp_path)
    assert ends["loaded"] > 0  # so what the faults are put into is whole
    assert ends["refused"] > 10
