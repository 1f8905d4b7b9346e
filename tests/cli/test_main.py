"""The command line's parser: help and completion without torch, wrong usage in one line, a module for each command."""

import importlib
import shlex
import subprocess
import sys
import warnings

import pytest

import qzo
from qzo.cli.main import COMMANDS, build_parser, main
from tests.support.paths import ROOT


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
    assert "--json" in text or command in ("bench", "journal"), "their actions have their own"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "qzo: the following arguments are required: COMMAND; see qzo --help"),
        (["tune"], "invalid choice: 'tune'"),
        (["train", "--no-such"], "qzo: unrecognized arguments: --no-such; see qzo --help"),
        (["train", "--noise", "white"], "qzo train: argument --noise: invalid choice: 'white'"),
        (["replay", "base"], "qzo replay: the following arguments are required: journal, --output-dir; see qzo replay"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(capsys, given, said):
    with pytest.raises(SystemExit) as leave:
        main(given)
    assert leave.value.code == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as leave:
        main(["--version"])
    assert leave.value.code == 0
    assert capsys.readouterr().out == f"qzo {qzo.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_with_execute_and_an_example_that_parses(name):
    assert callable(importlib.import_module(f"qzo.cli.{name.replace('-', '_')}").execute)
    _, example, _ = COMMANDS[name]
    options = build_parser().parse_args(shlex.split(example)[1:])
    assert options.command == name


def test_a_command_is_given_its_options_and_warnings_become_lines(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets another
    seen = []

    def execute(options):
        seen.append(options)
        warnings.warn("mind the step", stacklevel=1)

    monkeypatch.setattr("qzo.cli.memory.execute", execute)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        replaced = warnings.showwarning
        assert main(["memory", "m.gguf", "--json", "--batch-size", "3"]) == 0
        assert warnings.showwarning is not replaced
    assert (seen[0].checkpoint, seen[0].json, seen[0].batch_size) == ("m.gguf", True, 3)
    assert capsys.readouterr().err == "qzo: warning: mind the step\n"


def test_completion_knows_commands_and_their_options():
    """As a shell asks: what was typed in COMP_LINE, the answer on file descriptor 8."""
    code = (
        "import os\nos.environ.update(_ARGCOMPLETE='1', COMP_LINE='qzo train --learn', COMP_POINT='17')\n"
        "os.dup2(1, 8)\nfrom qzo.cli.main import main\nmain([])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "--learning-rate" in done.stdout
