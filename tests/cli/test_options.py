"""What options.py writes out so that `--help` needs no torch is what the modules that it speaks of have."""

import pytest

from qzo.checkpoints.formats import TARGETS
from qzo.cli import options
from qzo.cli.main import main
from qzo.kernels import noise, table
from qzo.nn import ops
from qzo.training import encode, packing
from qzo.training.settings import CLASSIFICATION_RATE, KEEPS, LABEL_BIASES, RATE, Settings


def test_choices_are_those_of_the_modules():
    assert options.NOISES == tuple(noise.VERSIONS)
    assert options.SHARINGS == noise.SHARINGS
    assert options.LARGE_ROWS == ops.LARGE_ROWS
    assert options.PACKINGS == packing.PACKINGS
    assert options.CHAT_LOSSES == encode.CHAT_LOSSES
    assert options.KEEPS == KEEPS
    assert options.FORMATS == tuple(sorted(TARGETS))
    assert options.TABLES == tuple(sorted(table.NAMED))
    settings = Settings()
    assert {name: getattr(settings, name) for name in options.DEFAULTS} == options.DEFAULTS
    assert (RATE, CLASSIFICATION_RATE) == (options.RATE, options.CLASSIFICATION_RATE)
    assert LABEL_BIASES == options.LABEL_BIASES
    assert settings.text_eos is True


@pytest.mark.parametrize("command", ["train --data d --output-dir o", "eval --data d", "generate", "inspect", "memory"])
def test_a_model_is_given_once(capsys, command):
    name, *rest = command.split()
    assert main([name, "one", "--model", "two", *rest]) == 2
    assert capsys.readouterr().err == f"qzo {name}: MODEL one and --model two: give one of the two\n"
