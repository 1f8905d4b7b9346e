"""The learning rates of a run, whole, resumed and extended."""

import copy
import json

import pytest

import qzo
from qzo.optim.journal import RECORD_BYTES
from qzo.optim.optimizer import QZO
from qzo.training.loop import build_task, choose_layers, fit
from qzo.training.schedule import schedule
from qzo.training.settings import PAPER, Settings
from tests.support import small_layers, tiny

RUNS = [
    {"learning_rate": 0.08},
    {"max_steps": 1, "learning_rate": 0.08},
    {"max_steps": 7, "learning_rate": 0.1, "decay": 0.3},
    {"max_steps": 176, "learning_rate": 0.06},
    {"max_steps": 1000, "learning_rate": 1 / 3, "decay": 0.0},
    {"max_steps": 333, "learning_rate": 0.07, "decay": 1.7},
    {"max_steps": 50, "learning_rate": 0},
    {**PAPER, "max_steps": 64},
    {**PAPER, "max_steps": 99, "decay": 1 / 7},
]


def formula(settings, step):
    """By which journals were written, bit for bit: linear from learning_rate to decay * learning_rate."""
    return settings.learning_rate * (1 - (1 - settings.decay) * step / settings.max_steps)


def rates(settings, start=0):
    """{step: rate} of a run that has made `start` steps before."""
    optimizer = QZO(small_layers.block(), settings.learning_rate)
    optimizer.param_groups[0]["step"] = start
    scheduler, found = schedule(optimizer, settings), {}
    for step in range(start, settings.max_steps):
        found[step] = optimizer.param_groups[0]["lr"]
        assert scheduler.get_last_lr() == [found[step]]
        vars(optimizer)["_opt_called"] = True  # what its step would say
        scheduler.step()
    return found


@pytest.mark.parametrize("given", RUNS)
def test_every_step_has_the_rate_of_the_formula(given):
    settings = Settings(**given)
    want = {step: formula(settings, step) for step in range(settings.max_steps)}
    assert rates(settings) == want  # of floats: the same bits
    for start in {1, settings.max_steps // 2, settings.max_steps - 1} & set(want):
        assert rates(settings, start) == {step: rate for step, rate in want.items() if step >= start}
    assert rates(settings, settings.max_steps) == {}


def test_a_run_and_one_that_goes_on_have_these_rates_and_one_journal(tmp_path):
    base = tiny.save_checkpoint(tmp_path / "base")
    settings = Settings(max_steps=9, batch_size=4, directions=2, learning_rate=0.07, decay=0.3)

    def run(name, resume=False):
        model, tokenizer = qzo.from_pretrained(base, group_size=32, device="cpu"), qzo.load_tokenizer(base)
        task = build_task(model, tiny.RECORDS, tokenizer, settings, choose_layers(model, None))
        fit(task, settings, tmp_path / name, resume=resume, show=False)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["lr"] for line in lines], (tmp_path / name / "journal.qzo").read_bytes()

    whole = run("whole")
    assert whole[0] == [formula(settings, step) for step in range(9)]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "journal.qzo").write_bytes(whole[1][: -5 * 2 * RECORD_BYTES])
    (tmp_path / "cut" / "metrics.jsonl").write_text((tmp_path / "whole" / "metrics.jsonl").read_text())
    assert run("cut", resume=True) == whole


def test_a_run_that_is_extended_goes_on_at_its_last_rate(tmp_path):
    """The first steps have the bits of the run as it began, whether it had ended or was killed; others follow."""
    base = qzo.from_pretrained(tiny.save_checkpoint(tmp_path / "base"), group_size=32, device="cpu")
    tokenizer = qzo.load_tokenizer(tmp_path / "base")

    def run(name, steps, resume=False):
        model = copy.deepcopy(base)
        settings = Settings(max_steps=steps, batch_size=2, directions=1, learning_rate=0.1)
        task = build_task(model, tiny.RECORDS, tokenizer, settings, choose_layers(model, None))
        fit(task, settings, tmp_path / name, resume=resume, show=False)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["lr"] for line in lines], (tmp_path / name / "journal.qzo").read_bytes()

    short, journal = run("out", 4)
    long, extended = run("out", 7, resume=True)
    assert long[:4] == short
    assert long[4:] == [pytest.approx(0.01)] * 3
    assert extended[: len(journal)] == journal
    assert len(extended) == len(journal) + 3 * RECORD_BYTES
    (tmp_path / "out/journal.qzo").write_bytes(extended[: -RECORD_BYTES * 5])  # as if killed in its second step
    assert run("out", 7, resume=True) == (long, extended)
    with pytest.raises(ValueError, match=r"max_steps=4: .*has 7 steps already"):
        run("out", 4, resume=True)
    run("other", 4)
    (tmp_path / "other/journal.qzo").write_bytes(journal[: -RECORD_BYTES * 2])
    with pytest.raises(qzo.JournalError, match="its max_steps is 4, this run's is 3"):
        run("other", 3, resume=True)
