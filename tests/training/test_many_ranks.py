"""Runs of several ranks: the bits of one process, whatever they divide among them; what stops all of them."""

import copy
import hashlib
import json
import math
import warnings

import pytest
import torch

import qzo
from qzo.nn.layers import arena_of
from qzo.training.loop import build_task, fit
from qzo.training.settings import Settings
from qzo.training.task import Task
from qzo.training.validation import Validation
from tests.support import ranks, tiny
from tests.support.journals import read_whole

TEXTS = [{"text": "Headline : " + " ".join(tiny.WORDS[i : i + 1 + i % 6])} for i in range(11)]
STEPS = 4
DIVISIONS = [(2, {"sequential": True}), (3, {}), (4, {"parallel": "directions"}), (4, {"parallel": "2x2"})]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    base = tiny.save_checkpoint(tmp_path_factory.mktemp("base"))
    return qzo.from_pretrained(base, group_size=32, device="cpu"), qzo.load_tokenizer(base)


def settings_of(**changes):
    return Settings(**{"max_steps": STEPS, "batch_size": 7, "directions": 4, "learning_rate": 0.1, **changes})


def digest(model):
    return hashlib.sha256(arena_of(model).data.numpy().tobytes()).hexdigest()


def trained(loaded, out, records=TEXTS, resume=False, faulty=None, **changes):
    """A run -> what it leaves of bits. faulty: (rank, fault), of the task on a rank."""
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    settings = settings_of(**changes)
    task = build_task(model, records, tokenizer, settings, None)
    if faulty is not None and faulty[0] == torch.distributed.get_rank():
        faulty[1](task)
    validation = Validation(task.evaluate, 2)
    already = fit(task, settings, out, resume=resume, show=False, validation=validation)
    return {"digest": digest(model), "valid": validation.history, "already": already}


def records_of(out):
    return read_whole(out / "journal.qzo")[1]


@pytest.mark.parametrize("kind", ["texts", "options"])
def test_any_division_has_the_bits_of_one_process(kind, loaded, tmp_path):
    """Uneven parts too: 7 examples over 2 and 3 ranks, 6 evaluations over 4; the rows of a part are as wide as all. Of
    options the losses are centred by the means of all ranks."""
    records = TEXTS if kind == "texts" else tiny.RECORDS
    one = json.loads(json.dumps(trained(loaded, tmp_path / "one", records)))
    assert one["digest"] != digest(loaded[0])
    for number, (count, changes) in enumerate(DIVISIONS if kind == "texts" else DIVISIONS[1:2] + DIVISIONS[3:]):
        out = tmp_path / str(number)
        assert ranks.run(tmp_path / f"ranks-{number}", count, of_rank, loaded, out, records, changes) == [one] * count
        assert records_of(out) == records_of(tmp_path / "one")
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(STEPS)]


def of_rank(loaded, out, records, changes):
    return trained(loaded, out, records, **changes)


def test_a_resumed_run_goes_on_from_the_journal_on_every_rank(loaded, tmp_path):
    """Only rank 0 reads it: the others are given another folder, as on another machine. That of another number of ranks
    is refused, on all."""
    whole = trained(loaded, tmp_path / "one")
    ranks.run(tmp_path / "ranks", 2, lambda: trained(loaded, tmp_path / "two"))
    path = tmp_path / "two" / "journal.qzo"
    data = path.read_bytes()
    path.write_bytes(data[: -32 * 4 - 40])  # four directions a step: two whole steps and more are gone

    def again():
        first = torch.distributed.get_rank() == 0
        return trained(loaded, tmp_path / ("two" if first else "elsewhere"), resume=True)

    found = ranks.run(tmp_path / "again", 2, again)
    assert [f["already"] for f in found] == [2, 2]
    assert {f["digest"] for f in found} == {whole["digest"]}
    assert path.read_bytes() == data
    assert not (tmp_path / "elsewhere").exists()

    [first, second] = ranks.run(tmp_path / "more", 2, lambda: trained(loaded, tmp_path / "one", resume=True))
    assert first.startswith("JournalError: ")
    assert "its ranks is null, this run's is 2" in first
    assert second == f"FirstFailed: rank 0: {first.partition(': ')[2]}"


def test_ranks_of_other_settings_or_data_are_refused_before_the_first_step(loaded, tmp_path):
    def second_differs(changes):
        return trained(loaded, tmp_path / "out", **(changes if torch.distributed.get_rank() else {}))

    for number, (changes, text) in enumerate(
        [
            ({"max_steps": 9}, "rank 1: its settings.max_steps is 9, rank 0's is 4"),
            ({"records": TEXTS[1:]}, 'rank 1: its recipe.data is "sha256:'),
        ]
    ):
        for found in ranks.run(tmp_path / str(number), 2, second_differs, changes):
            assert found.startswith(f"RanksDiffer: {text}")
    assert not (tmp_path / "out").exists()


def nan_at_the_second_step(task: Task) -> None:
    calls: list[int] = []
    sums = task.compiled_sums

    def faulty(*arguments):
        calls.append(1)
        return sums(*arguments) * (math.nan if len(calls) == 2 else 1)

    task.compiled_sums = faulty  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:step 1 had a NaN")
def test_a_nan_on_one_rank_skips_the_step_on_all(loaded, tmp_path):
    warnings.simplefilter("ignore")
    found = ranks.run(
        tmp_path / "ranks", 3, lambda: trained(loaded, tmp_path / "out", faulty=(2, nan_at_the_second_step))
    )
    assert len({f["digest"] for f in found}) == 1
    assert [step[0].skipped for step in records_of(tmp_path / "out")] == [False, True, False, False]


def flip(task: Task) -> None:
    """From the third step on this rank's first scale has another bit."""
    calls: list[int] = []
    sums = task.compiled_sums

    def faulty(*arguments):
        calls.append(1)
        if len(calls) == 3:
            arena_of(task.model).data.view(-1)[0] *= 1 + 2.0**-20
        return sums(*arguments)

    task.compiled_sums = faulty  # type: ignore[method-assign]


def test_ranks_whose_scales_differ_stop_at_the_next_comparison(loaded, tmp_path):
    found = ranks.run(
        tmp_path / "ranks", 3, lambda: trained(loaded, tmp_path / "out", faulty=(1, flip), check_every=2, max_steps=8)
    )
    for one in found:
        assert one.startswith("RanksDiverged: after step 4 the scales of rank 1 of 3 have other bits"), one
        assert "after step 2 all were the same" in one
    assert len(records_of(tmp_path / "out")) == 4
