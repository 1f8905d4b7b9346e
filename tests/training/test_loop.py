"""The loop: what it writes at which step, and that a run that was cut ends in the same bits."""

import copy
import json
import os
import random
import signal
import time
import types

import pytest
import torch
from torch import nn

import qzo
from qzo.nn.layers import arena_of, layers, train_codebooks_
from qzo.optim.journal import RECORD_BYTES, JournalError
from qzo.training.loop import (
    build_task,
    choose_layers,
    fit,
    pad_id,
    recipe,
    trained_count,
    trained_text,
)
from qzo.training.settings import Settings
from tests.support import tiny
from tests.support.aqlm_checkpoints import a_layer
from tests.support.journals import read_whole


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    base = tiny.save_checkpoint(tmp_path_factory.mktemp("base"))
    return qzo.from_pretrained(base, group_size=32, device="cpu"), qzo.load_tokenizer(base)


def test_killed_twenty_times_it_ends_in_the_same_bits(loaded, tmp_path):
    """SIGKILL at random lengths of the journal; forks of this process, so that a run costs its steps and no imports."""
    model, tokenizer = loaded
    settings = Settings(max_steps=16, batch_size=1, directions=2, learning_rate=0.02)

    def run(out, resume):
        """In a fork: train a copy of the model; returns the process."""
        process = os.fork()
        if process:
            return process
        try:
            mine = copy.deepcopy(model)
            task = build_task(mine, tiny.RECORDS, tokenizer, settings, choose_layers(mine, None))
            fit(task, settings, out, resume=resume, show=False)
            torch.save(arena_of(mine).data, out / "arena.pt")
        finally:
            os._exit(0)

    os.waitpid(run(tmp_path / "whole", False), 0)
    want = torch.load(tmp_path / "whole" / "arena.pt")
    journal = (tmp_path / "whole" / "journal.qzo").read_bytes()
    records = RECORD_BYTES * settings.max_steps * settings.directions
    moments, cut = random.Random(0), 0
    for turn in range(20):
        out = tmp_path / str(turn)
        process, path = run(out, False), out / "journal.qzo"
        reached = len(journal) - records * moments.uniform(0.1, 1.1)  # also before the header, and in a record
        while not path.exists() or path.stat().st_size < reached:
            time.sleep(1e-3)
        time.sleep(1e-3 * moments.random())
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        cut += path.exists() and path.stat().st_size < len(journal)
        os.waitpid(run(out, True), 0)
        assert path.read_bytes() == journal
        assert torch.equal(torch.load(out / "arena.pt"), want)
    assert cut >= 15, "most kills came after the last step: they proved nothing"


def test_a_run_writes_a_line_of_metrics_a_step_and_goes_on_where_it_was(loaded, tmp_path):
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    settings = Settings(max_steps=2, batch_size=4, directions=1)
    task = build_task(model, tiny.RECORDS, tokenizer, settings, choose_layers(model, None))
    assert fit(task, settings, tmp_path / "new" / "out", show=False) == 0
    lines = [json.loads(line) for line in (tmp_path / "new/out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert set(lines[0]) == {"step", "loss", "derivative", "lr", "skipped", "seconds"}
    header, steps, _ = read_whole(tmp_path / "new/out/journal.qzo")
    assert [line["loss"] for line in lines] == pytest.approx(
        [(records[0].loss_plus + records[0].loss_minus) / 2 for records in steps], rel=1e-6
    )
    assert header["recipe"] == recipe(task, settings, 2)
    with pytest.raises(JournalError, match="exists already: resume it"):
        fit(task, settings, tmp_path / "new/out", show=False)


def test_fewer_examples_than_a_batch_are_refused_before_anything_is_written(loaded, tmp_path):
    settings = Settings(batch_size=25)
    task = build_task(loaded[0], tiny.RECORDS, loaded[1], settings, None)
    with pytest.raises(ValueError, match="batch_size=25, but there are 24 training examples"):
        fit(task, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- its parts


def test_layers_of_the_top_blocks_are_chosen(loaded):
    model = copy.deepcopy(loaded[0])
    prefix = choose_layers(model, 1)
    assert {name.split(".")[2] for name in layers(model)} == {"1"}
    assert prefix is not None
    assert len(prefix.below) == 1
    assert trained_count(model) == sum(scales.numel() for scales in qzo.scales(model).values())
    assert trained_text(model) == f"{trained_count(model):,} scales"
    assert choose_layers(model, None) is None
    assert {name.split(".")[2] for name in layers(model)} == {"0", "1"}


def test_blocks_without_a_layer_that_could_train_are_refused(loaded):
    model = copy.deepcopy(loaded[0])
    for name in layers(model, trainable=None):
        if ".layers.1." in name:
            layer = model.get_submodule(name)
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, nn.Linear(layer.in_features, layer.out_features))
    with pytest.raises(ValueError, match="the top 1 blocks hold no 4-bit layer: nothing would train"):
        choose_layers(model, 1)


def test_codebooks_are_told_beside_scales():
    model = nn.ModuleDict({"a": a_layer(), "b": a_layer()})
    train_codebooks_(model["a"])
    arena_of(model, exact=True)
    assert trained_text(model) == "48 scales and 4,096 numbers of codebooks"


def test_what_a_resumed_run_has_to_share(loaded):
    """Another order of the data, another recipe; how it is launched is none."""

    def made(records=tiny.RECORDS, bucketed=False, **given):
        task = build_task(loaded[0], records, loaded[1], Settings(), None)
        task.bucketed = bucketed
        return recipe(task, Settings(**given), 7)

    plain = made()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["max_steps"] == 7
    assert made(cuda_graph=False, max_steps=3) == plain
    for other in (
        made(tiny.RECORDS[::-1]),
        made(bucketed=True),
        made(sequential=True),
        made(packing="auto"),
        made(compile=True),
        made(large_rows="folded"),
        made(learning_rate=0.5),
    ):
        assert other != plain


@pytest.mark.parametrize(("pad", "eos", "want"), [(5, 2, 5), (0, 2, 0), (None, 2, 2), (None, 0, 0), (None, None, 0)])
def test_padding_is_the_tokenizers_else_its_last_token_else_any(pad, eos, want):
    assert pad_id(types.SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == want
