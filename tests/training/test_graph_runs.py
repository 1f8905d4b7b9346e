"""Training runs as graphs, and everything of graphs that takes a GPU: the journals are those of plain runs."""

import contextlib
import copy
import math
import warnings

import pytest
import torch
from torch import nn

import qzo
from qzo.nn.layers import arena_of
from qzo.optim import graph
from qzo.training import loop as train
from qzo.training.settings import Settings
from tests.support import graphs, tiny
from tests.support.graphs import ROWS, Reads, batches, closure_steps, losses_of, steps, two_layers
from tests.support.journals import read_whole


@pytest.fixture
def recorders(monkeypatch):
    return graphs.stand_in(monkeypatch)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tiny.save_checkpoint(tmp_path_factory.mktemp("base"))
    return qzo.from_pretrained(folder, group_size=32, device="cpu"), qzo.load_tokenizer(folder)


WORDS = " ".join(tiny.WORDS[:8])
TEXTS = [{"prompt": WORDS[: 5 + 3 * i], "completion": " ".join(["up", "down", "left"][: 1 + i % 3])} for i in range(12)]


def fit(loaded, out, records=TEXTS, resume=False, bucketed=True, **changes):
    """-> (bytes of the journal, scales)."""
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    settings = Settings(**{"max_steps": 10, "batch_size": 2, "directions": 2, "learning_rate": 0.02, **changes})
    prefix = train.choose_layers(model, settings.train_layers)
    task = train.build_task(model, records, tokenizer, settings, prefix)
    task.bucketed = bucketed
    train.fit(task, settings, out, resume, show=False)
    return (out / "journal.qzo").read_bytes(), arena_of(model).data


@pytest.mark.parametrize(
    "changes",
    [{}, {"train_layers": 1}, {"sequential": True}, {"packing": "auto"}, {"records": tiny.RECORDS, "train_layers": 1}],
    ids=str,
)
def test_a_run_in_graphs_writes_the_journal_of_a_plain_one(loaded, tmp_path, recorders, changes):
    plain = fit(loaded, tmp_path / "plain", cuda_graph=False, **changes)
    assert recorders == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = fit(loaded, tmp_path / "graphs", **changes)
    assert captured[0] == plain[0]
    assert torch.equal(captured[1], plain[1])
    [recorder] = recorders
    assert 1 <= len(recorder.graphs) <= graph.LIMIT
    assert sum(one.replays for one in recorder.graphs) > len(recorder.graphs)


def test_a_run_in_graphs_that_was_cut_goes_on_in_the_same_bits(loaded, tmp_path, recorders):
    """Resumed with graphs and without; what was captured before the cut is captured anew, or not."""
    whole, scales = fit(loaded, tmp_path / "a")
    for name, choice in (("b", None), ("c", False)):
        fit(loaded, tmp_path / name)
        path = tmp_path / name / "journal.qzo"
        path.write_bytes(whole[: -4 * 64 - 7])  # four steps and a torn record short
        again = fit(loaded, tmp_path / name, resume=True, cuda_graph=choice)
        assert again[0] == whole
        assert torch.equal(again[1], scales)


def test_a_journal_says_how_batches_were_padded(loaded, tmp_path):
    assert "padding" not in read_whole(_journal(loaded, tmp_path / "cpu", False))[0]["recipe"]
    fit(loaded, tmp_path / "gpu", max_steps=1)
    for name, bucketed in (("cpu", True), ("gpu", False)):
        with pytest.raises(qzo.JournalError, match=r"its padding is .*as on a CUDA device"):
            fit(loaded, tmp_path / name, resume=True, bucketed=bucketed, max_steps=1)


def _journal(loaded, out, bucketed):
    fit(loaded, out, bucketed=bucketed, max_steps=1)
    return out / "journal.qzo"


# ---------------------------------------------------------------------------------------------- on a GPU


def on_gpu():
    return two_layers().cuda().half()


def gpu_run(journal, rows, choice, sharing="group", limit=graph.LIMIT, resume=False):
    """Steps on batches of changing shapes, another rate each, one loss not finite; -> (graphs, scales, journal)."""
    model = on_gpu()
    optimizer = qzo.QZO(model, lr=0.1, directions=2, sharing=sharing, journal=journal, cuda_graph=choice, resume=resume)
    losses, start = losses_of(model, 4), optimizer.param_groups[0]["step"]
    for t, batch in enumerate(batches(rows)):
        if t < start:
            continue
        x = batch["x"].cuda().half()
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        optimizer.step(losses, batch={"x": x.fill_(math.nan) if t == 4 else x})
        if optimizer.graphs is not None:
            optimizer.graphs.limit = limit
    optimizer.close()
    return optimizer.graphs and optimizer.graphs.captured, arena_of(model).data.cpu(), journal.read_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("sharing", ["group", "row"])
@pytest.mark.parametrize("limit", [graph.LIMIT, 1])
def test_captured_steps_have_the_bits_of_plain_ones(tmp_path, sharing, limit):
    """With room for all shapes, and for one, which gives way to another."""
    rows = [*ROWS, *[2] * 12]
    none, scales, records = gpu_run(tmp_path / "plain", rows, False, sharing)
    held, captured, bits = gpu_run(tmp_path / "graphs", rows, None, sharing, limit)
    assert none is None
    assert len(held) == min(limit, 3)
    assert torch.equal(captured, scales)
    assert bits == records


@pytest.mark.gpu
def test_a_run_on_a_gpu_that_was_cut_goes_on_in_the_same_bits(tmp_path):
    _, scales, whole = gpu_run(tmp_path / "whole", ROWS, None)
    for choice in (None, False):
        path = tmp_path / f"{choice}"
        path.write_bytes(whole[: -4 * 64 - 7])
        _, again, bits = gpu_run(path, ROWS, choice, resume=True)
        assert bits == whole
        assert torch.equal(again, scales)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{}, {"train_layers": 1}, {"sequential": True}, {"packing": "auto"}, {"records": tiny.RECORDS, "train_layers": 1}],
    ids=str,
)
def test_a_run_on_a_gpu_writes_the_journal_of_a_plain_one(loaded, tmp_path, changes):
    model = copy.deepcopy(loaded[0]).cuda().half()
    ends = [
        fit((model, loaded[1]), tmp_path / f"{choice}", bucketed=True, cuda_graph=choice, **changes)
        for choice in (False, None)
    ]
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])
    assert b"as on a CUDA device" in ends[0][0]


@pytest.mark.gpu
def test_a_closure_is_replayed_on_a_gpu():
    ends = []
    for choice in (False, True):
        model = on_gpu()
        optimizer = closure_steps(model, torch.empty(4, 96, dtype=torch.float16, device="cuda"), choice, 5)
        ends.append(arena_of(model).data.cpu())
    assert len(optimizer.graphs.captured) == 1
    assert torch.equal(*ends)


@pytest.mark.gpu
def test_after_a_capture_that_failed_a_gpu_goes_on():
    """Scales, stream and allocator are as if nothing had been tried, and another optimizer captures."""
    ends = []
    for choice in (False, None):
        layers = on_gpu()
        model = nn.Sequential(layers[0], nn.Sequential(nn.ReLU(), Reads()), layers[2])
        optimizer = qzo.QZO(model, lr=0.1, directions=2, cuda_graph=choice)
        given = [{"x": batch["x"].cuda().half()} for batch in batches([1] * 4)]
        with contextlib.nullcontext() if choice is False else pytest.warns(UserWarning, match=r"1\.1 \(Reads\) cannot"):
            steps(optimizer, losses_of(model, 4), given)
        ends.append(arena_of(model).data.cpu())
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(*ends)
    model = on_gpu()
    optimizer = qzo.QZO(model, lr=0.1, directions=2)
    steps(optimizer, losses_of(model, 4), given)
    assert optimizer.graphs is not None
    assert len(optimizer.graphs.captured) == 1
