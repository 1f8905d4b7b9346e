"""What options.py writes out so that `--help` needs no torch is what the modules that it speaks of have."""

import pytest

from qzo.checkpoints.formats import TARGETS
from qzo.cli import options
from qzo.cli.main import main
from qzo.kernels import table


def test_choices_are_those_of_the_modules():
    assert options.FORMATS == tuple(sorted(TARGETS))
    assert options.TABLES == tuple(sorted(table.NAMED))


@pytest.mark.parametrize("command", ["train --data d --output-dir o", "eval --data d", "generate", "inspect", "memory"])
def test_a_model_is_given_once(capsys, command):
    name, *rest = command.split()
    assert main([name, "one", "--model", "two", *rest]) == 2
    assert capsys.readouterr().err == f"qzo {name}: MODEL one and --model two: give one of the two\n"
