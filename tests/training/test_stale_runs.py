"""Runs whose steps are evaluated ahead of the scales: what they write, cut anywhere, and on two ranks."""

import copy
import json
from typing import Any

import pytest
import torch

import qzo
from qzo.cli.main import main
from qzo.nn.layers import arena_of
from qzo.optim.journal import RECORD_BYTES
from qzo.optim.optimizer import QZO
from qzo.training.loop import build_task, fit
from qzo.training.schedule import schedule
from qzo.training.settings import Settings
from qzo.training.validation import Validation
from tests.support import ranks, tiny
from tests.support.close import assert_same_bits
from tests.support.journals import read_whole

STEPS, S = 7, 2
TEXTS = [{"text": f"Headline : {word}"} for word in tiny.WORDS[:8]]
GIVEN: dict[str, Any] = {"max_steps": STEPS, "batch_size": 4, "directions": 3, "learning_rate": 0.1, "staleness": S}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    base = tiny.save_checkpoint(tmp_path_factory.mktemp("base"))
    return qzo.from_pretrained(base, group_size=32, device="cpu"), qzo.load_tokenizer(base)


def task_of(loaded, settings):
    return build_task(copy.deepcopy(loaded[0]), TEXTS, loaded[1], settings, None)


def run(loaded, out, resume=False, patience=None, **changes):
    """(scales, lines of metrics but for the seconds, measurements, steps there were)."""
    settings = Settings(**{**GIVEN, **changes})
    task = task_of(loaded, settings)
    rising = {"patience": patience} if patience else {}

    def measure():  # with patience it rises from the fourth step on
        size = float(arena_of(task.model).data.double().square().sum())
        return {"loss": len(validation.history) if rising else size, "accuracy": None}

    validation = Validation(measure, 2, **rising)
    already = fit(task, settings, out, resume=resume, show=False, validation=validation)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if out.exists() else []
    for line in lines:
        line.pop("seconds", None)
    return arena_of(task.model).data, lines, validation.history, already


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, *run(loaded, out)


def test_a_run_is_the_optimizers_own_with_a_line_for_each_step_that_was_taken(loaded, whole, tmp_path):
    out, scales, lines, history, _ = whole
    settings = Settings(**GIVEN)
    task = task_of(loaded, settings)
    optimizer = QZO(
        task.model, 0.1, directions=3, one_sided=True, floor=settings.floor, staleness=S, journal=tmp_path / "j"
    )
    rates, wanted = schedule(optimizer, settings), []
    for step in range(STEPS):
        wanted.append(rates.get_last_lr()[0])
        batch = task.batch(task.indices(step, 4, 0), 3)
        optimizer.step(lambda batch: task.compiled_sums(batch, 3), batch=batch)
        rates.step()
    optimizer.drain()
    optimizer.close()
    assert_same_bits(scales, arena_of(task.model).data)
    header, steps, _ = read_whole(out / "journal.qzo")
    assert header["recipe"]["staleness"] == S
    assert steps == read_whole(tmp_path / "j")[1]
    assert [line["step"] for line in lines] == [*range(STEPS)]
    assert [line["lr"] for line in lines] == wanted
    assert [line["loss"] for line in lines] == pytest.approx(
        [sum(record.loss_plus for record in records) / 3 for records in steps], rel=1e-6
    )
    for measured in history:  # of the scales after so many steps, and not of those that were evaluated
        model = copy.deepcopy(loaded[0])
        qzo.replay(model, out / "journal.qzo", measured.step)
        assert measured.loss == float(arena_of(model).data.double().square().sum())
    assert [measured.step for measured in history] == [2, 4, 6, 7]


@pytest.mark.parametrize("held", range(STEPS + 1))
def test_cut_after_any_step_it_goes_on_to_the_same_bits(held, loaded, whole, tmp_path):
    """The kill came between the last step's record and its line of metrics."""
    out, scales, lines, history, _ = whole
    journal = (out / "journal.qzo").read_bytes()
    (tmp_path / "journal.qzo").write_bytes(journal[: len(journal) - RECORD_BYTES * 3 * (STEPS - held)])
    told = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(told[: max(0, held - 1)]))
    again = run(loaded, tmp_path, resume=True)
    assert_same_bits(again[0], scales)
    assert (tmp_path / "journal.qzo").read_bytes() == journal
    assert again[2:] == (history, held)
    cut = [line for line in lines if line["step"] != held - 1]
    assert [line for line in again[1] if line["step"] != held - 1] == cut
    caught = [line["valid"] for line in again[1] if line["step"] == held - 1]
    assert caught == [line["valid"] for line in lines if line["step"] == held - 1 and "valid" in line]


def test_steps_that_are_ahead_when_the_patience_ends_are_not_taken(loaded, tmp_path):
    scales, lines, history, _ = run(loaded, tmp_path, patience=1)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    again = run(loaded, tmp_path, patience=1, resume=True)
    assert_same_bits(again[0], scales)
    assert again[1:] == (lines, history, 4)
    told = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(told[:-1]))
    again = run(loaded, tmp_path, patience=1, resume=True)
    assert_same_bits(again[0], scales)
    assert again[2:] == (history, 4)
    assert len(read_whole(tmp_path / "journal.qzo")[1]) == 4


def test_two_ranks_have_the_bits_of_one_process(loaded, whole, tmp_path):
    def of_rank(patience, out):
        scales, _, history, _ = run(loaded, out, parallel="directions", patience=patience)
        return [scales.tolist(), history]

    for patience in (None, 1):
        wanted = whole[1:] if patience is None else run(loaded, tmp_path / "one", patience=patience)
        found = ranks.run(tmp_path / f"ranks-{patience}", 2, of_rank, patience, tmp_path / f"out-{patience}")
        for scales, history in found:
            assert_same_bits(torch.tensor(scales), wanted[0])
            assert [tuple(measured) for measured in history] == wanted[2]


def test_the_command_line_records_it_and_refuses_another(tmp_path, capsys):
    base = tiny.save_checkpoint(tmp_path / "base")
    tiny.write_jsonl(tmp_path / "data.jsonl", TEXTS)
    (tmp_path / "run.yaml").write_text(f"staleness: {S}\n")
    command = ["train", str(base), "--data", str(tmp_path / "data.jsonl"), "--output-dir", str(tmp_path / "out")]
    command += ["--group-size", "32", "--max-steps", "4", "--batch-size", "2", "--directions", "1"]
    assert main([*command, "--config", str(tmp_path / "run.yaml")]) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["staleness"] == S
    assert read_whole(tmp_path / "out" / "journal.qzo")[0]["recipe"]["staleness"] == S
    assert main([*command, "--staleness", "1", "--resume"]) == 2
    assert f"its staleness is {S}, this run's is 1" in capsys.readouterr().err
