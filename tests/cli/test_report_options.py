"""What report_options.py writes out so that `--help` needs no torch is what the modules that it speaks of have."""

import argparse

import pytest

from qzo.bench import cases, command
from qzo.cli import report_options
from qzo.kernels import codes
from qzo.reports import inspect, models
from qzo.reports.codes import CODES
from qzo.reports.memory import Run


def test_choices_are_those_of_the_modules():
    assert report_options.BITS == codes.BITS
    assert report_options.CODES == tuple(CODES)
    assert report_options.ZEROS == tuple(models.ZEROS)
    assert report_options.CONFIGS == tuple(models.shipped())
    assert report_options.KINDS == cases.KINDS
    assert (report_options.TOKENS, report_options.TEXT_TOKENS) == (Run.tokens, models.TEXT_TOKENS)
    assert report_options.SIGNAL_EXAMPLES == inspect.EXAMPLES
    assert report_options.CPU_SECONDS == command.CPU_SECONDS


def parsed(add, *given):
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args(given)


def test_defaults_of_a_step_are_those_of_a_run():
    run = Run()
    for add in (report_options.add_inspect, report_options.add_memory):
        found = parsed(add)
        assert (found.batch_size, found.directions) == (run.rows, run.directions)
    found = parsed(report_options.add_memory)
    assert (found.labels, found.sequential, found.large_rows) == (run.labels, run.sequential, run.large_rows)
    assert parsed(report_options.add_inspect).seq_len == run.tokens
    assert found.seq_len is None, "an image model has another number of them"


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["run", "--rows", "1", "16", "--json"], dict(rows=[1, 16], json=True, overwrite=None, out=None)),
        (["compare", "a", "b"], dict(old="a", new="b", threshold=0.05, json=False)),
        (["table", "a"], dict(file="a")),
        (["plot", "a", "--out", "b.png", "--overwrite"], dict(file="a", out="b.png", overwrite=True)),
    ],
)
def test_actions_of_the_benchmark(given, want):
    found = vars(parsed(report_options.add_bench, *given))
    assert {name: found[name] for name in want} == want
    assert found["action"] == given[0]


@pytest.mark.parametrize("given", [[], ["plot", "a"], ["compare", "a"], ["draw"]])
def test_what_an_action_needs(given, capsys):
    with pytest.raises(SystemExit) as leave:
        parsed(report_options.add_bench, *given)
    assert leave.value.code == 2
    assert "error: " in capsys.readouterr().err
