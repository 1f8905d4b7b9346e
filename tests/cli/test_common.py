"""What several commands share: loading as the options say, the steps of a journal, results as text."""

import warnings

import pytest
import torch

import qzo
from qzo.cli import common
from qzo.nn.layers import layers
from tests.support import tiny

PLAIN = dict.fromkeys(("device", "dtype", "group_size", "trust_remote_code", "weight_only", "strict"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base):
    """(journal of three steps of the upper block, the model after them)."""
    model = qzo.from_pretrained(base, group_size=32, device="cpu")
    qzo.train_only_(model, lambda name: ".layers.1." in name)
    optimizer = qzo.QZO(model, lr=0.05, journal=base / "j")
    for first in (1.0, 0.7, 0.4):
        optimizer.step(lambda first=first: torch.tensor([first, 0.5]))
    optimizer.close()
    return base / "j", model


# ---------------------------------------------------------------------------------------------- loading


def test_only_options_that_were_given_are_passed_on(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(common, "from_pretrained", lambda *a, **k: seen.append((a, k)))
    common.load("nowhere", PLAIN)
    common.load("nowhere", PLAIN | {"device": "cpu", "dtype": "bfloat16", "group_size": -1, "trust_remote_code": True})
    assert seen == [
        (("nowhere",), {"trust_remote_code": False, "weight_only": False, "strict": False}),
        (
            ("nowhere",),
            dict(
                device="cpu",
                dtype=torch.bfloat16,
                group_size=-1,
                trust_remote_code=True,
                weight_only=False,
                strict=False,
            ),
        ),
    ]
    assert capsys.readouterr().err == "loading nowhere\n" * 2


@pytest.mark.parametrize("device", ["cuda:99", "warp"])
def test_a_device_that_there_is_not_is_said_before_anything_is_loaded(monkeypatch, device):
    monkeypatch.setattr(common, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=rf"--device {device} cannot be used: [^\n]+$"):
        common.load("nowhere", PLAIN | {"device": device})


def test_the_size_of_what_is_loaded_is_said_where_it_is_known_and_large(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "from_pretrained", lambda *a, **k: None)
    with open(tmp_path / "m.gguf", "wb") as file:
        file.truncate(1_234_000_000)
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        with open(tmp_path / "folder" / name, "wb") as file:
            file.truncate(600_000_000)
    (tmp_path / "folder" / "c").mkdir()
    (tmp_path / "small").write_text("x")
    for name in ("m.gguf", "folder", "small"):
        common.load(tmp_path / name, PLAIN)
    said = capsys.readouterr().err.replace(str(tmp_path), "")
    assert said == "loading /m.gguf, 1.23 GB\nloading /folder, 1.20 GB\nloading /small\n"


# ---------------------------------------------------------------------------------------------- a journal


@pytest.mark.parametrize("until", [None, 2, 9])
def test_a_journals_layers_train_and_have_its_scales(base, run, capsys, until):
    journal, tuned = run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, steps = common.replayed(base, journal, until, PLAIN | {"group_size": 32, "device": "cpu"})
    assert steps == (3 if until is None else min(until, 3))
    assert f"replaying {steps} steps" in capsys.readouterr().err
    assert list(layers(model)) == list(layers(tuned)), "the layers that trained, and no others"
    same = [torch.equal(scales, qzo.scales(model)[name]) for name, scales in qzo.scales(tuned).items()]
    assert all(same) == (steps == 3)


def test_steps_of_a_journal_and_what_is_none(run, tmp_path):
    assert common.steps_of(run[0]) == 3
    with pytest.raises(FileNotFoundError, match=r"there is no journal .*none; a run's journal is OUT/journal.qzo"):
        common.steps_of(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"is a folder; a run's journal is OUT/journal.qzo"):
        common.steps_of(tmp_path)
    (tmp_path / "cut").write_bytes(run[0].read_bytes()[:20])
    with pytest.raises(ValueError, match="cut has no whole header: the run ended before its first step"):
        common.replayed("nowhere", tmp_path / "cut", None, PLAIN)


# ---------------------------------------------------------------------------------------------- text


def test_results_stand_in_columns():
    rows: list[tuple[str, dict[str, float | None]]] = [
        ("zero-shot", {"loss": 1.23456, "accuracy": 0.5}),
        ("x", {"loss": 12.5, "accuracy": None}),
    ]
    assert common.scores_as_text(rows).split("\n") == [
        "           accuracy    loss",
        "zero-shot    50.0 %   1.235",
        "x                 -  12.500",
    ]
