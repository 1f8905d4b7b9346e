"""`qzo replay`: how many steps, where the model goes, and that nothing is loaded for what cannot be."""

import json

import pytest
import torch

import qzo
from qzo.cli.main import main
from tests.support import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    qzo.save_pretrained(
        qzo.from_pretrained(tiny.save_checkpoint(folder / "f"), group_size=32, device="cpu"), folder / "q"
    )
    return folder / "q"


@pytest.fixture(scope="module")
def journal(base):
    """Of three steps."""
    path = base.parent / "journal.qzo"
    optimizer = qzo.QZO(qzo.from_pretrained(base, device="cpu"), lr=0.05, journal=path)
    for first in (1.0, 0.7, 0.4):
        optimizer.step(lambda first=first: torch.tensor([first, 0.5]))
    optimizer.close()
    return path


def replayed(base, journal, out, *more):
    return main(["replay", str(base), str(journal), "--output-dir", str(out), "--device", "cpu", *more])


@pytest.mark.parametrize(
    ("until", "steps"), [((), 3), (("--until", "2"), 2), (("--until", "3"), 3), (("--until", "0"), 0)]
)
def test_the_model_after_so_many_steps_is_written(base, journal, tmp_path, capsys, until, steps):
    assert replayed(base, journal, tmp_path / "out", "--json", *until) == 0
    assert json.loads(capsys.readouterr().out) == {"steps": steps, "output_dir": str(tmp_path / "out")}
    wanted = qzo.from_pretrained(base, device="cpu")
    assert qzo.replay(wanted, journal, steps) == steps
    qzo.save_pretrained(wanted, tmp_path / "wanted")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "wanted")]
    assert weights[0] == weights[1]
    assert (weights[0] == (base / "model.safetensors").read_bytes()) == (steps == 0)


def test_it_says_what_it_did(base, journal, tmp_path, capsys):
    assert replayed(base, journal, tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert shown.out == f"3 steps applied; the tuned model is in {tmp_path / 'out'}\n"
    assert "replaying 3 steps" in shown.err


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("journal.qzo", ["--until", "-1"], "qzo replay: --until -1: expected a step number >= 0\n"),
        ("journal.qzo", ["--until", "4"], "qzo replay: --until 4: {path} has 3 steps\n"),
        ("none", [], "qzo replay: there is no journal {path}; a run's journal is OUT/journal.qzo\n"),
    ],
)
def test_steps_that_there_are_not(journal, tmp_path, capsys, name, more, said):
    path = journal.parent / name
    assert replayed("no-model", path, tmp_path / "o", *more) == 2
    assert capsys.readouterr().err == said.format(path=path), "and nothing of a model that is loaded"
    assert not (tmp_path / "o").exists()
