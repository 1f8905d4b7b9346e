"""What train_options.py writes out so that `--help` needs no torch is what the modules that it speaks of have."""

from qzo.cli import train_options as options
from qzo.kernels import noise
from qzo.nn import ops
from qzo.training import encode, packing
from qzo.training.settings import KEEPS, LABEL_BIASES, RATE, Settings


def test_choices_and_defaults_are_those_of_the_modules():
    assert options.NOISES == tuple(noise.VERSIONS)
    assert options.SHARINGS == noise.SHARINGS
    assert options.LARGE_ROWS == ops.LARGE_ROWS
    assert options.PACKINGS == packing.PACKINGS
    assert options.CHAT_LOSSES == encode.CHAT_LOSSES
    assert options.KEEPS == KEEPS
    settings = Settings()
    assert {name: getattr(settings, name) for name in options.DEFAULTS} == options.DEFAULTS
    assert RATE == options.RATE
    assert LABEL_BIASES == options.LABEL_BIASES
    assert settings.text_eos is True
