"""Validation while a run goes: when it is measured, which step is best, when the run ends, what is kept."""

import contextlib
import io
import json
import math

import pytest
import torch

from qzo.checkpoints.load import from_pretrained
from qzo.checkpoints.tokenizer import load_tokenizer
from qzo.cli.main import main
from qzo.nn.layers import arena_of, scales
from qzo.optim.replay import replay
from qzo.training.loop import build_task
from qzo.training.settings import Settings
from qzo.training.validation import Base, Measured, Validation
from tests.support import tiny


def measuring(losses):
    """A measure that says these losses, one after another."""
    left = iter(losses)
    return lambda: {"loss": next(left), "accuracy": None}


def test_it_measures_every_so_many_steps_and_the_last():
    validation = Validation(measuring([3.0, 2.0, 2.5]), every=3)
    for step in range(1, 9):
        validation.after(step, last=step == 8)
    assert [(one.step, one.loss) for one in validation.history] == [(3, 3.0), (6, 2.0), (8, 2.5)]
    assert validation.best == Measured(6, 2.0, None)


def test_a_step_that_was_to_be_measured_is_when_a_run_goes_on_from_it():
    validation = Validation(measuring([3.0, 2.0]), every=3)
    assert [validation.catch_up(step, last=False) for step in (0, 2, 3, 3)] == [
        *[None] * 2,
        {"loss": 3.0, "accuracy": None},
        None,
    ]
    assert validation.catch_up(4, last=True) == {"loss": 2.0, "accuracy": None}
    assert [one.step for one in validation.history] == [3, 4]


@pytest.mark.parametrize(
    ("losses", "patience", "ends_after"),
    [
        ([3, 2, 2.5, 2.4, 1], 2, 4),  # two in a row no better than 2
        ([3, 2, 2.5, 1.9, 2], 2, None),  # better in time
        ([2, 2, 2], 2, 3),  # an equal loss is none that is lower
        ([math.nan, 2, math.nan, 3], 2, 4),  # NaN is never the best
        ([3, 4, 5, 6], None, None),
    ],
)
def test_patience(losses, patience, ends_after):
    validation, ended = Validation(measuring(losses), 1, patience), None
    for step in range(1, len(losses) + 1):
        validation.after(step, last=False)
        if validation.exhausted:
            ended = step
            break
    assert ended == ends_after


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(base checkpoint, data whose valid split has the answers that the base favours: learning makes it worse)."""
    folder = tmp_path_factory.mktemp("validation")
    base, data = tiny.save_checkpoint(folder / "base"), folder / "data"
    data.mkdir()
    tiny.write_jsonl(data / "train.jsonl", tiny.RECORDS)
    model, tokenizer = from_pretrained(base, group_size=32), load_tokenizer(base)
    scores = build_task(model, tiny.RECORDS, tokenizer, Settings(), None).scores()
    favoured = scores.argmax(1).tolist()
    tiny.write_jsonl(
        data / "valid.jsonl", [{**one, "label": label} for one, label in zip(tiny.RECORDS, favoured, strict=True)]
    )
    return base, data


def run(data, out, *more, steps=6):
    """(results, what was said, {step: validation loss}) of a run."""
    base, folder = data
    options = ["--group-size", 32, "--max-steps", steps, "--eval-every", 2, "--learning-rate", 0.1, "--json"]
    options += ["--label-bias", "none"]  # else the table's are fitted on training data, those on the way on valid
    arguments = ["train", base, "--data", folder, "--output-dir", out, *options, *more]
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.redirect_stderr(io.StringIO()) as said:
        assert main([*map(str, arguments)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"] + 1: line["valid"]["loss"] for line in lines if "valid" in line}
    return json.loads(told.getvalue()), said.getvalue(), losses


@pytest.fixture(scope="module")
def kept_best(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("best") / "out"
    return out, *run(data, out, "--keep", "best")


def test_the_best_step_is_what_is_saved(data, kept_best):
    out, result, said, losses = kept_best
    assert list(losses) == [2, 4, 6]
    best = min(losses, key=losses.get)
    assert best < 6  # else this shows nothing
    assert result["best"] == {"step": best, "loss": losses[best], "accuracy": result["best"]["accuracy"]}
    assert (result["model_step"], result["steps"]) == (best, 6)
    assert result["tuned"]["loss"] == losses[best]
    assert f"rebuilding the model of step {best}" in said
    assert f"valid {losses[2]:.3f} (" in said
    replayed = from_pretrained(data[0], group_size=32)
    replay(replayed, out / "journal.qzo", until=best)
    saved = scales(from_pretrained(out / "model"))
    for name, wanted in scales(replayed).items():
        assert torch.equal(saved[name], wanted.to(torch.float16).float()), name


def test_the_controls_stand_beside_the_tuned_model(kept_best):
    result = kept_best[1]
    of_split = result["splits"]["valid"]
    assert list(of_split) == ["before", "control", "linear_probe", "tuned"]
    for name, scores in of_split.items():
        assert set(scores) == {"loss", "accuracy"}
        assert result[name] == scores
    assert len({scores["loss"] for scores in of_split.values()}) == 4


def test_a_base_is_rebuilt_bit_for_bit(data, kept_best):
    journal = kept_best[0] / "journal.qzo"
    model = from_pretrained(data[0], group_size=32)
    base = Base(model)
    before = arena_of(model).data.clone()
    replay(model, journal)
    after = arena_of(model).data.clone()
    assert not torch.equal(before, after)
    base.rebuild(journal, 0)
    assert torch.equal(arena_of(model).data, before)
    base.rebuild(journal, 6)
    assert torch.equal(arena_of(model).data, after)


def test_the_last_step_is_the_default_has_the_same_journal_and_a_worse_model_is_said(data, kept_best, tmp_path):
    result, said, losses = run(data, tmp_path / "out", "--eval-every", 1)
    assert result["model_step"] == result["steps"] == 6
    assert result["tuned"]["loss"] == losses[6]
    best = result["best"]["step"]
    assert best == min(losses, key=losses.get)
    assert f"made the model worse on valid: loss {result['before']['loss']:.3f} before, {losses[6]:.3f} after" in said
    assert f"(the best step on valid was {best}: {losses[best]:.3f})" in said
    journals = [(out / "journal.qzo").read_bytes() for out in (tmp_path / "out", kept_best[0])]
    assert journals[0] == journals[1]  # measuring changes no bit of the run


def test_patience_ends_a_run_and_a_resumed_one_knows(data, tmp_path):
    out = tmp_path / "out"
    whole, _, _ = run(data, out, "--patience", 1, "--keep", "best", steps=20)
    assert whole["steps"] < 20
    assert whole["steps"] - whole["best"]["step"] == 2
    again, _, _ = run(data, out, "--patience", 1, "--keep", "best", "--resume", steps=20)
    assert again["resumed_from"] == again["steps"] == whole["steps"]  # no step more
    assert again["best"] == whole["best"]
    assert again["tuned"] == whole["tuned"]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join(lines[:-1]))  # killed between the last step's record and its line
    again, _, _ = run(data, out, "--patience", 1, "--keep", "best", "--resume", steps=20)
    assert again["resumed_from"] == again["steps"] == whole["steps"]
    assert (again["best"], again["tuned"]) == (whole["best"], whole["tuned"])
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["valid"]) == (whole["steps"] - 1, json.loads(lines[-1])["valid"])
    assert last["loss"] == pytest.approx(json.loads(lines[-1])["loss"], rel=1e-6)


def test_patience_without_a_split_is_refused_before_anything_is_loaded(data, tmp_path, capsys):
    out = tmp_path / "out"
    file = data[1] / "train.jsonl"
    assert main(["train", "no-model", "--data", str(file), "--output-dir", str(out), "--patience", "2"]) == 2
    assert "--patience needs a validation split" in capsys.readouterr().err
    assert not out.exists()
