"""What options.py writes out so that `--help` needs no torch is what the modules that it speaks of have."""

import subprocess
import sys

import pytest

from qzo.bench import cases
from qzo.checkpoints.formats import TARGETS
from qzo.cli import options, report_options
from qzo.cli.main import COMMANDS, main
from qzo.kernels import codes, noise, table
from qzo.nn import ops
from qzo.reports import inspect, models
from qzo.reports.codes import CODES
from qzo.reports.memory import Run
from qzo.training import encode, packing
from qzo.training.settings import KEEPS, LEARNING_RATE_PER_DIRECTION, Settings
from tests.support.paths import ROOT


def test_choices_are_those_of_the_modules():
    assert options.NOISES == tuple(noise.VERSIONS)
    assert options.SHARINGS == noise.SHARINGS
    assert options.LARGE_ROWS == ops.LARGE_ROWS
    assert options.PACKINGS == packing.PACKINGS
    assert options.CHAT_LOSSES == encode.CHAT_LOSSES
    assert options.KEEPS == KEEPS
    assert options.FORMATS == tuple(sorted(TARGETS))
    assert options.TABLES == tuple(sorted(table.NAMED))
    assert report_options.BITS == codes.BITS
    assert report_options.CODES == tuple(CODES)
    assert report_options.ZEROS == tuple(models.ZEROS)
    assert report_options.CONFIGS == tuple(models.shipped())
    assert report_options.KINDS == cases.KINDS
    assert (report_options.TOKENS, report_options.TEXT_TOKENS) == (Run.tokens, models.TEXT_TOKENS)
    settings = Settings()
    assert {name: getattr(settings, name) for name in options.DEFAULTS} == options.DEFAULTS
    assert LEARNING_RATE_PER_DIRECTION == options.RATE
    assert settings.text_eos is True
    assert inspect.EXAMPLES == report_options.SIGNAL_EXAMPLES


def test_help_needs_no_torch():
    code = "import sys\nfrom qzo.cli.main import build_parser\nbuild_parser()\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as leave:
        main([command, "--help"])
    assert leave.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: qzo {command}" in text
    assert "--json" in text or command == "bench"


@pytest.mark.parametrize("command", ["train --data d --output-dir o", "eval --data d", "generate", "inspect", "memory"])
def test_a_model_is_given_once(capsys, command):
    name, *rest = command.split()
    assert main([name, "one", "--model", "two", *rest]) == 2
    assert capsys.readouterr().err == f"qzo {name}: MODEL one and --model two: give one of the two\n"


def test_completion_knows_commands_and_their_options():
    """As a shell asks: what was typed in COMP_LINE, the answer on file descriptor 8."""
    code = (
        "import os\nos.environ.update(_ARGCOMPLETE='1', COMP_LINE='qzo train --learn', COMP_POINT='17')\n"
        "os.dup2(1, 8)\nfrom qzo.cli.main import main\nmain([])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "--learning-rate" in done.stdout
