"""What a run is given or has left, with faults: each is read, or refused in one line, within little memory and time."""

import pytest

from qzo.bench.fuzz import inputs
from tests.support.fuzzing import fuzz


@pytest.mark.parametrize("name", inputs.PARSERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path):
    ends = fuzz(name, tmp_path)
    assert ends["loaded"] > 0 or name == "settings"  # so what the faults are put into is whole; there are always some
    assert ends["refused"] > 10
