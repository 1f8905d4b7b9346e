"""What a run will do, in numbers and in words, against what it then does."""

import json

import pytest

import qzo
from qzo.nn.linear import QZOLinear
from qzo.training.loop import build_task, choose_layers, trained_count
from qzo.training.plan import lines, plan
from qzo.training.settings import Settings
from tests.support import tiny

SEVERAL = [{**record, "options": ["warm", "cold cold", "warm cold one"]} for record in tiny.RECORDS]
TEXTS = [{"text": " ".join(tiny.WORDS[:length])} for length in (2, 3, 4, 5, 20)]


@pytest.fixture
def loaded(tmp_path):
    base = tiny.save_checkpoint(tmp_path / "base")
    return qzo.from_pretrained(base, group_size=32, device="cpu"), qzo.load_tokenizer(base)


def planned(loaded, records, train_layers=None, **given):
    model, tokenizer = loaded
    settings = Settings(train_layers=train_layers, **given)
    task = build_task(model, records, tokenizer, settings, choose_layers(model, train_layers))
    told = plan(task, settings, model)
    assert json.loads(json.dumps(told)) == told
    return told, task


def test_of_the_whole_model(loaded):
    told, task = planned(loaded, tiny.RECORDS, max_steps=12, batch_size=4, directions=3, one_sided=False)
    assert told["layers"] == told["layers_in_all"] == sum(isinstance(m, QZOLinear) for m in loaded[0].modules()) == 14
    assert told["scales"] == trained_count(loaded[0])
    assert (told["blocks"], told["codebook_numbers"], told["cut"]) == (None, 0, 0)
    assert (told["steps"], told["examples_per_step"], told["evaluations"]) == (12, 4, 6)
    batch = task.batch(task.indices(0, 4, 0), 6)
    assert told["rows_per_step"] == told["at_once"] == len(batch["input_ids"]) == 24
    assert told["tokens_per_row"] == {"mean": 4.0, "longest": 4}
    assert (told["examples"], told["passes"]) == (24, 2.0)
    assert lines(told) == [
        f"trains: {told['scales']:,} scales of 14 of 14 layers",
        "data: 24 examples, 4 tokens a row, 4 the longest",
        "steps: 12 of 4 examples under 6 evaluations (3 directions): 24 rows, 24 at once; 2 passes over the data",
    ]


def test_of_the_top_blocks_one_evaluation_at_a_time(loaded):
    told, _ = planned(loaded, tiny.RECORDS, 1, max_steps=3, batch_size=4, directions=1, sequential=True)
    assert (told["layers"], told["layers_in_all"], told["blocks"]) == (7, 14, 1)
    assert (told["rows_per_step"], told["at_once"], told["passes"]) == (8, 4, 0.5)
    assert lines(told)[0].endswith(" scales of 7 of 14 layers, the top block")


@pytest.mark.parametrize("shares", [True, False])
def test_of_options_of_several_tokens(loaded, shares):
    """A row each, or one row behind the prompt they share: as the batches are."""
    _, task = planned(loaded, SEVERAL, batch_size=4, directions=1)
    vars(task)["shares"] = shares  # what is decided once
    told = plan(task, Settings(batch_size=4, directions=1), loaded[0])
    batch = task.batch(task.indices(0, 4, 0), 2)
    assert told["rows_per_step"] == len(batch["input_ids"]) == (8 if shares else 24)
    lengths = [len(row) for example in task.examples for row in task.rows(example)]
    assert told["tokens_per_row"] == {"mean": round(sum(lengths) / len(lengths), 1), "longest": max(lengths)}


def test_of_texts_that_are_cut(loaded):
    with pytest.warns(UserWarning, match="1 of 5 lines have more than 10 tokens"):
        told, _ = planned(loaded, TEXTS, max_length=10, batch_size=2)
    assert (told["cut"], told["tokens_per_row"]) == (1, {"mean": (3 + 4 + 5 + 6 + 10) / 5, "longest": 10})
    assert lines(told)[1] == "data: 5 examples, 5.6 tokens a row, 10 the longest; cut to 10 tokens: 1"
