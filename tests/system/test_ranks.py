"""What ranks tell each other: in order, the same on each, with the first difference named."""

import json
import os
from typing import Any

import pytest
import torch

from qzo.system.ranks import Ranks, _start, difference, digest, joined
from tests.support import ranks

FIELDS = {"seed": 1, "recipe": {"batch_size": 8, "data": "abc"}, "versions": {"qzo": "1"}}
CHANGES: dict[str, tuple[dict[str, Any], str]] = {  # field: what rank 1 of 3 has there, and what is said of it
    "seed": ({"seed": 2}, "rank 1: its seed is 2, rank 0's is 1"),
    "data": ({"recipe": {"batch_size": 8, "data": "x"}}, """rank 1: its recipe.data is "x", rank 0's is "abc\""""),
    "version": ({"versions": {"qzo": "2"}}, """rank 1: its versions.qzo is "2", rank 0's is "1\""""),
    "missing": ({"recipe": {"data": "abc"}}, "rank 1: its recipe.batch_size is null, rank 0's is 8"),
}


def fails():
    raise ValueError("no such journal")


def said(function, *arguments):
    """What it raises, None if nothing."""
    try:
        function(*arguments)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def conversation():
    """All that ranks can say, in one process group."""
    one = Ranks()
    found: dict[str, Any] = {
        "gathered": one.gather(torch.tensor([one.rank, 10.0 * one.rank], dtype=torch.float64)).tolist()
    }
    found["sent"] = one.sent
    column = 10 * one.rank + torch.arange(2, dtype=torch.int16).view(1, 2).t()  # of another stride than a [2, 1] has
    found["exchanged"] = [parts.tolist() for parts in one.exchange(column)]
    found["told"] = one.from_first(lambda: {"of": one.rank, "x": float("nan")})["of"]
    found["failed"] = said(one.from_first, fails)
    found["same"] = said(one.check_same, FIELDS)
    found["differ"] = {
        name: said(one.check_same, {**FIELDS, **change} if one.rank == 1 else FIELDS)
        for name, (change, _) in CHANGES.items()
    }
    scales = torch.arange(200_000, dtype=torch.float32)
    found["alike"] = said(one.check_alike, scales, 100, 0)
    scales[150_000] += 2.0**-3 * (one.rank == 2)
    found["diverged"] = said(one.check_alike, scales, 200, 100)
    found["alone"] = Ranks(alone=True).count
    return found


def one_ends():
    """Rank 1 is gone when rank 0 asks."""
    one = Ranks()
    if one.rank:
        os._exit(1)
    return said(one.gather, torch.zeros(1))


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    return ranks.run(tmp_path_factory.mktemp("ranks"), 3, conversation)


def test_what_is_gathered_is_in_the_order_of_the_ranks_and_counted(heard):
    for one in heard:
        assert one["gathered"] == [[0, 0], [1, 10], [2, 20]]
        assert one["sent"] == 16
        assert one["alone"] == 1


def test_what_is_exchanged_keeps_its_shape_and_type(heard):
    for one in heard:
        assert one["exchanged"] == [[[0], [1]], [[10], [11]], [[20], [21]]]


def test_what_the_first_does_is_told_to_all_and_so_is_its_failure(heard):
    assert [one["told"] for one in heard] == [0, 0, 0]
    assert heard[0]["failed"] == "ValueError: no such journal"
    assert {one["failed"] for one in heard[1:]} == {"FirstFailed: rank 0: no such journal"}


def test_ranks_that_were_started_otherwise_are_refused_on_all(heard):
    for one in heard:
        assert one["same"] is None
        for name, (_, text) in CHANGES.items():
            assert one["differ"][name].startswith(f"RanksDiffer: {text}: start all ranks"), name


def test_the_rank_whose_scales_differ_is_named_on_all(heard):
    for one in heard:
        assert one["alike"] is None
        assert one["diverged"].startswith("RanksDiverged: after step 200 the scales of rank 2 of 3 have other bits")
        assert "after step 100 all were the same" in one["diverged"]


def test_a_rank_that_has_ended_is_said_to_have(tmp_path):
    [told] = ranks.run(tmp_path, 2, one_ends, left=1)
    assert told.startswith("RankLost: another rank has ended or does not answer (")


def name_of_start(kept, count):
    store = torch.distributed.FileStore(str(kept), count)
    return _start(store, torch.distributed.get_rank(), count)


def test_every_start_of_the_ranks_has_a_name_of_its_own_in_a_store_that_stays(tmp_path):
    starts = [ranks.run(tmp_path / str(life), 3, name_of_start, tmp_path / "kept", 3) for life in range(2)]
    assert [len({*names}) for names in starts] == [1, 1]
    assert starts[0][0] != starts[1][0]


def test_one_process_is_the_first_of_one_and_sends_nothing():
    one = Ranks()
    assert (one.rank, one.count, one.first) == (0, 1, True)
    assert one.gather(torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0]]
    assert one.from_first(lambda: {"kept": (1, 2)}) == {"kept": (1, 2)}
    one.check_same(FIELDS)
    one.check_alike(torch.zeros(3), 1, 0)
    assert one.sent == 0


def test_the_first_difference_is_found_at_any_depth():
    assert difference(FIELDS, json.loads(json.dumps(FIELDS))) is None
    assert difference({"a": {"b": [1, 2]}, "c": 1}, {"a": {"b": [1, 3]}, "c": 2}) == ("a.b", [1, 2], [1, 3])


def test_a_digest_sees_every_bit_and_no_other_than_the_bytes():
    scales = torch.rand(3, 50_000)
    assert digest(scales) == digest(scales.clone())
    other = scales.clone()
    other[2, 49_999] = torch.nextafter(other[2, 49_999], torch.tensor(2.0))
    assert digest(other) != digest(scales)


def test_without_a_launcher_there_is_nothing_to_join():
    with pytest.raises(ValueError, match="environment variable"), joined():
        pass
