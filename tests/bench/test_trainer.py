"""What transformers' Trainer costs a step: how steps are cut from a clock, and the bound that the page promises."""

import json
import time

import torch

from qzo.bench import trainer
from tests.support import trainers

pytestmark = trainers.needs_accelerate


def test_what_it_costs_a_step():
    """Under 3 % of 50 ms by bench/trainer.py on a quiet core; twice that here, where others run beside it."""
    row = trainer.measure(blocks=1, steps=15, turns=2)
    assert 0 < row["overhead_ms"] < 3, row


def test_a_step_lasts_from_the_end_of_one_to_the_end_of_the_next():
    clock = trainer.Clock()
    clock.at = [0.0, 10.0, 20.0, 30.0, 31.0, 33.0]
    clock.inside = [0.0, 9.0, 18.0, 27.0, 27.25, 28.25]
    assert clock.steps() == [(1.0, 0.75), (2.0, 1.0)], "the first steps warm up"


def test_the_clock_adds_up_what_the_losses_and_the_update_take(monkeypatch):
    class Optimizer:
        def losses(self, more):
            return 40 + more

        def _finish(self, *, less):
            return 40 - less

    times = iter([1.0, 3.0, 10.0, 10.5])
    clock, optimizer = trainer.Clock(), Optimizer()
    clock.watch(optimizer)
    monkeypatch.setattr(time, "process_time", lambda: next(times))
    assert (optimizer.losses(2), optimizer._finish(less=2)) == (42, 38), "what is timed does what it did"
    assert clock.total == 2.5


def test_every_token_of_an_example_is_a_label():
    examples = trainer.examples_of(3)
    assert len(examples) == 3
    for row in examples:
        assert row["input_ids"].shape == (trainer.TOKENS,)
        assert torch.equal(row["labels"], row["input_ids"])
        assert row["attention_mask"].all()


def test_the_command_prints_a_row_and_appends_it_to_a_file(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(trainer, "measure", lambda *arguments: asked.append(arguments) or {"overhead_ms": 0.5})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: asked.append(count))
    out = tmp_path / "rows.jsonl"
    out.write_text("{}\n")
    trainer.main(["--layers", "2", "--hidden", "32", "--steps", "9", "--out", str(out)])
    assert asked == [1, (2, 32, 9)]
    assert json.loads(capsys.readouterr().out) == {"overhead_ms": 0.5}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{}, {"overhead_ms": 0.5}]
