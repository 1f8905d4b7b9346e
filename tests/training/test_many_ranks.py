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
STEPS = 6
DIVISIONS = [(2, "data"), (3, "data"), (4, "directions"), (4, "2x2")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    base = tiny.save_checkpoint(tmp_path_factory.mktemp("base"))
    return qzo.from_pretrained(base, group_size=32, device="cpu"), qzo.load_tokenizer(base)


def settings_of(**changes):
    return Settings(**{"max_steps": STEPS, "batch_size": 7, "directions": 3, "learning_rate": 0.1, **changes})


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
    """Uneven parts too: 7 examples over 2 and 3 ranks, 6 evaluations over 4; the rows of a part are as wide as all."""
    records = TEXTS if kind == "texts" else tiny.RECORDS
    one = json.loads(json.dumps(trained(loaded, tmp_path / "one", records)))
    assert one["digest"] != digest(loaded[0])
    for count, parallel in DIVISIONS[: 4 if kind == "texts" else 2]:
        out = tmp_path / f"{count}-{parallel}"
        found = ranks.run(
            tmp_path / f"ranks-{count}-{parallel}",
            count,
            lambda o=out, p=parallel: trained(loaded, o, records, parallel=p),
        )
        assert found == [one] * count, parallel
        assert records_of(out) == records_of(tmp_path / "one")
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(STEPS)]


def test_one_process_at_a_time_of_the_evaluations_too(loaded, tmp_path):
    one = trained(loaded, tmp_path / "one", sequential=True)
    found = ranks.run(tmp_path / "ranks", 2, lambda: trained(loaded, tmp_path / "two", sequential=True))
    assert {f["digest"] for f in found} == {one["digest"]}


def test_a_resumed_run_goes_on_from_the_journal_on_every_rank(loaded, tmp_path):
    """Only rank 0 reads it: the others are given another folder, as on another machine."""
    whole = trained(loaded, tmp_path / "one")
    found = ranks.run(tmp_path / "ranks", 2, lambda: trained(loaded, tmp_path / "two"))
    path = tmp_path / "two" / "journal.qzo"
    data = path.read_bytes()
    path.write_bytes(data[: -3 * 32 * 3 - 40])  # three directions a step: two whole steps and more are gone

    def again():
        first = torch.distributed.get_rank() == 0
        return trained(loaded, tmp_path / ("two" if first else "elsewhere"), resume=True)

    found = ranks.run(tmp_path / "again", 2, again)
    assert [f["already"] for f in found] == [2, 2]
    assert {f["digest"] for f in found} == {whole["digest"]}
    assert path.read_bytes() == data
    assert not (tmp_path / "elsewhere").exists()


def test_a_journal_of_another_number_of_ranks_is_refused(loaded, tmp_path):
    trained(loaded, tmp_path / "out")
    [first, second] = ranks.run(tmp_path / "ranks", 2, lambda: trained(loaded, tmp_path / "out", resume=True))
    assert first.startswith("JournalError: ")
    assert 'its parallel is null, this run\'s is "data"' in first
    assert second == f"FirstFailed: rank 0: {first.partition(': ')[2]}"


def test_ranks_of_other_settings_or_data_are_refused_before_the_first_step(loaded, tmp_path):
    def of(rank_1, rank_0=None):
        changes = rank_1 if torch.distributed.get_rank() else rank_0 or {}
        return trained(loaded, tmp_path / "out", **changes)

    for changes, text in [
        ({"max_steps": 9}, "rank 1: its settings.max_steps is 9, rank 0's is 6"),
        ({"records": TEXTS[1:]}, 'rank 1: its recipe.data is "sha256:'),
    ]:
        for found in ranks.run(tmp_path / text[9:25], 2, of, changes):
            assert found.startswith(f"RanksDiffer: {text}")
    assert not (tmp_path / "out").exists()


def nan_at_the_second_step(task: Task) -> None:
    calls, sums = [], task.compiled_sums

    def faulty(batch, count):
        calls.append(1)
        return sums(batch, count) * (math.nan if len(calls) == 2 else 1)

    task.compiled_sums = faulty  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:step 1 had a NaN")
def test_a_nan_on_one_rank_skips_the_step_on_all(loaded, tmp_path):
    warnings.simplefilter("ignore")
    found = ranks.run(
        tmp_path / "ranks", 3, lambda: trained(loaded, tmp_path / "out", faulty=(2, nan_at_the_second_step))
    )
    assert len({f["digest"] for f in found}) == 1
    assert [step[0].skipped for step in records_of(tmp_path / "out")] == [False, True, False, False, False, False]


def flip(task: Task) -> None:
    """From the third step on this rank's first scale has another bit."""
    calls, sums = [], task.compiled_sums

    def faulty(batch, count):
        calls.append(1)
        if len(calls) == 3:
            arena_of(task.model).data.view(-1)[0] *= 1 + 2.0**-20
        return sums(batch, count)

    task.compiled_sums = faulty  # type: ignore[method-assign]


def test_ranks_whose_scales_differ_stop_at_the_next_comparison(loaded, tmp_path):
    found = ranks.run(
        tmp_path / "ranks", 3, lambda: trained(loaded, tmp_path / "out", faulty=(1, flip), check_every=2, max_steps=8)
    )
    for one in found:
        assert one.startswith("RanksDiverged: after step 4 the scales of rank 1 of 3 have other bits"), one
        assert "after step 2 all were the same" in one
    assert len(records_of(tmp_path / "out")) == 4
