"""The YAML file of `qzo train --config` is a command line: converted, checked and overruled by the parser itself."""

import dataclasses
import subprocess
import sys

import pytest

from qzo.cli.config_file import arguments_of
from qzo.cli.main import main, parse
from qzo.cli.train import merge_options
from qzo.training.settings import Settings
from tests.support.paths import ROOT

LINE = ["train", "m", "--data", "d", "--output-dir", "o"]


def config(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_every_setting_is_an_option_and_every_option_a_key(tmp_path):
    known = vars(parse(LINE)).keys() - {"command", "json", "checkpoint", "config", "line"}
    assert known >= {field.name for field in dataclasses.fields(Settings)}
    with pytest.raises(ValueError) as error:
        arguments_of(config(tmp_path, "lr: 1\nsteps: 2\nconfig: x\n"))
    assert str(error.value) == (
        f"{tmp_path}/run.yaml: unknown keys config, lr, steps; known are {', '.join(sorted(known))}"
    )


def test_values_are_converted_and_the_command_line_wins(tmp_path):
    text = (
        "model: file\nmax-steps: 7\nlearning_rate: 3e-2\neps: 1.0e-7\nclip: .inf\nseed: -3\nnoise: ih4\n"
        "relative: false\nsequential: true\ncompile: false\ntext_eos: false\ntrain_layers: null\ndecay: 1\n"
    )
    given = ["--max-steps", "8", "--text-eos", "--noise", "gaussian", "--config", config(tmp_path, text)]
    settings, own = merge_options(parse([*LINE, *given]))
    want = Settings(
        max_steps=8, learning_rate=3e-2, eps=1e-7, clip=float("inf"), seed=-3, noise="gaussian", relative=False,
        sequential=True, text_eos=True, decay=1.0,
    )  # fmt: skip
    assert settings == want
    assert own["model"] == "m"
    from_file = parse(["train", "--config", config(tmp_path, "model: file\ndata: d\noutput-dir: o\n")])
    assert merge_options(from_file)[1]["model"] == "file"
    assert merge_options(parse(["train", "--config", config(tmp_path, text), *LINE[2:], "--model", "n"]))[1][
        "model"
    ] == ("n")


def test_the_recipe_is_below_the_file_and_the_command_line(tmp_path):
    given = ["--config", config(tmp_path, "recipe: paper\nclip: 7\nbatch_size: 3\n"), "--batch-size", "2"]
    settings, _ = merge_options(parse([*LINE, *given]))
    assert (settings.eps, settings.clip, settings.batch_size) == (1e-3, 7.0, 2)
    assert (settings.floor, settings.decay, settings.relative) == (0.0, 1.0, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_steps: 1.5", "{}: max_steps=1.5: invalid int value: '1.5'"),
        ("max-steps: true", "{}: max_steps=True: expected a value, not true or false"),
        ("batch_size: [1, 2]", "{}: batch_size=[1, 2]: expected one value, got a list"),
        ("eps: small", "{}: eps='small': invalid float value: 'small'"),
        ("noise: pink", "{}: noise='pink': invalid choice: 'pink' (choose from"),
        ("recipe: mine", "{}: recipe='mine': invalid choice: 'mine'"),
        ("compile: maybe", "{}: compile='maybe': expected true or false, or null"),
        ("- a\n- b", "{} must hold keys and values, got list"),
        ("a: [", "{} is not YAML: "),
        ("eps: 5", "eps=5.0: expected a number > 0 and <= 1"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_of_file_and_key(tmp_path, capsys, text, said):
    path = config(tmp_path, text)
    assert main([*LINE, "--config", path]) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("qzo train: " + said.format(path))


def test_a_file_that_is_not_there(tmp_path, capsys):
    for path in (tmp_path / "none.yaml", tmp_path):
        assert main([*LINE, "--config", str(path)]) == 2
        assert capsys.readouterr().err == (
            f"qzo train: --config {path}: there is no such file; give a YAML file of options\n"
        )


def test_an_empty_file_says_nothing(tmp_path):
    assert arguments_of(config(tmp_path, "# nothing\n")) == []


def test_a_file_is_refused_without_torch(tmp_path):
    path = config(tmp_path, "lr: 1\n")
    code = (
        f"import sys\nfrom qzo.cli.main import main\nstatus = main({[*LINE, '--config', path]!r})\n"
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
