"""What long loops show: silent in Python, a line now and then inside a command, a bar on a terminal."""

import json
import re
import sys

import pytest
import torch

import qzo
from qzo.cli.main import main
from qzo.system import progress
from qzo.system.progress import showing, tracked
from tests.support import tiny
from tests.support.checkpoints import TYPES, write_gguf


class Clock:
    """A time that goes on by `step` seconds whenever it is asked."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


@pytest.fixture
def slow(monkeypatch):
    """As if every item took 11 seconds."""
    monkeypatch.setattr(progress.time, "monotonic", Clock(progress.EVERY_SECONDS + 1))


def test_python_is_silent(slow, capsys):
    assert list(tracked(range(5), "loading", "tensors")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress.time, "monotonic", Clock(4.0))
    with showing():
        assert list(tracked(iter("abcdefg"), "loading", "tensors", 7)) == list("abcdefg")
        list(tracked(iter("abcd"), "loading", "tensors"))
        list(tracked([1, 2], "replaying", "steps"))
    assert capsys.readouterr().err.splitlines() == [
        "loading: 2 of 7 tensors",
        "loading: 5 of 7 tensors",
        "loading: 2 tensors",
    ]
    list(tracked([1, 2, 3, 4], "replaying", "steps"))
    assert capsys.readouterr().err == ""


def test_quick_loops_show_nothing(capsys):
    with showing():
        list(tracked(range(1000), "loading", "tensors"))
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True, raising=False)
    bar = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda *given, **options: bar(*given, **{**options, "delay": 0}))
    with showing():
        assert list(tracked([1, 2, 3], "writing", "tensors")) == [1, 2, 3]
    assert re.search(r"writing: .*/3 \[", capsys.readouterr().err)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(float folder, data, GGUF, journal of two steps on it)."""
    folder = tmp_path_factory.mktemp("progress")
    base = tiny.save_checkpoint(folder / "base")
    data = tiny.write_jsonl(folder / "data.jsonl", tiny.RECORDS)
    write_gguf(folder / "m.gguf", TYPES.Q4_0)
    model = qzo.from_pretrained(folder / "m.gguf", device="cpu")
    ids = torch.arange(24).view(2, 12)
    optimizer = qzo.QZO(model, lr=1e-2, directions=1, journal=folder / "journal.qzo")
    for _ in range(2):
        optimizer.step(lambda: qzo.losses(model, {"input_ids": ids, "labels": ids}, 2))
    optimizer.close()
    return base, data, folder / "m.gguf", folder / "journal.qzo"


COMMANDS = {
    "eval BASE --data DATA --group-size 32": {"loading", "tokenizing", "evaluating"},
    "quantize BASE --output-dir OUT --group-size 32": {"writing"},
    "replay GGUF JOURNAL --output-dir OUT": {"loading", "replaying", "saving"},
    "export GGUF --to gptq --journal JOURNAL --output-dir OUT": {"loading", "replaying", "writing"},
    "inspect GGUF": {"reading"},
}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_show_what_takes_long(line, files, tmp_path, slow, capsys):
    places = dict(zip(("BASE", "DATA", "GGUF", "JOURNAL"), map(str, files), strict=True))
    words = [places.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in line.split()]
    assert main([*words, "--json"]) == 0
    told = capsys.readouterr()
    json.loads(told.out)  # progress is on standard error only
    found = dict(re.findall(r"^(\w+): \d+ of (\d+) \w+$", told.err, re.M))
    unsized = set(re.findall(r"^(\w+): \d+ \w+$", told.err, re.M))
    assert found.keys() | unsized >= COMMANDS[line], told.err
    if "replaying" in COMMANDS[line]:
        assert found["replaying"] == "2"


def test_a_model_that_is_quantized_whole_is_shown(slow, capsys):
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3)))
    with showing():
        qzo.quantize_(model, group_size=32)
    assert capsys.readouterr().err.splitlines() == [f"quantizing: {done} of 3 layers" for done in range(3)]
