"""Whole steps as graphs have the bits of plain steps, whatever shapes come; what cannot be captured runs plainly.

Where there is no GPU, tests/graphs.py stands in for the graphs.
"""

import functools
import math
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import qzo
from qzo.nn.layers import arena_of
from qzo.optim import graph
from qzo.training.settings import Settings
from tests.support import graphs
from tests.support.graphs import ROWS, Reads, batches, closure_steps, losses_of, steps, two_layers


@pytest.fixture
def recorders(monkeypatch):
    return graphs.stand_in(monkeypatch)


def run(journal, rows, poison=None, model=None, closure=None, **options):
    """Steps on batches of `rows`; -> (optimizer, scales, bytes of the journal)."""
    model = two_layers() if model is None else model
    optimizer = qzo.QZO(model, lr=0.1, directions=2, journal=journal, **options)
    losses = closure or losses_of(model, 4)
    for step, batch in enumerate(batches(rows)):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        if step == poison:
            batch["x"].fill_(math.nan)
        optimizer.step(losses, batch=batch)
    optimizer.close()
    return optimizer, arena_of(model).data.clone(), journal.read_bytes()


# ---------------------------------------------------------------------------------------------- bits and shapes


@pytest.mark.parametrize("sharing", ["group", "row"])
@pytest.mark.parametrize("paired", [True, False])
def test_graphs_of_changing_shapes_have_the_bits_of_plain_steps(tmp_path, recorders, sharing, paired):
    """Another rate each step, a loss that is not finite, three shapes that come in turn."""

    def closures(model):
        return losses_of(model, 4) if paired else lambda batch: model(batch["x"][:1]).float().square().mean()

    ends = []
    for name in (False, None):
        model = two_layers()
        ends.append(
            run(tmp_path / str(name), ROWS, 4, model, closures(model), sharing=sharing, paired=paired, cuda_graph=name)
        )
    (_, scales, records), (optimizer, captured, bits) = ends
    assert torch.equal(captured, scales)
    assert bits == records
    [recorder] = recorders
    assert len(optimizer.graphs.captured) == len(recorder.graphs) == 3
    # a shape's first step is plain; one replay of each graph compares it with the plain step
    assert sum(graph.replays for graph in recorder.graphs) == len(ROWS) - 3 + 3


def test_a_graph_keeps_its_own_tensors(tmp_path, recorders):
    """The batches that were given are not written to, and may go."""
    model, seen = two_layers(), set()
    losses = losses_of(model, 4)

    def spy(batch):
        seen.add(batch["x"].data_ptr())
        return losses(batch)

    optimizer = qzo.QZO(model, lr=0.1, directions=2)
    given = list(batches([2] * 5))
    kept = [batch["x"].clone() for batch in given]
    for batch in given:
        optimizer.step(spy, batch=batch)
    assert all(torch.equal(batch["x"], x) for batch, x in zip(given, kept, strict=True))
    assert len(seen) == 2  # the first step's, and the graph's


def test_losses_alone_are_captured_and_stay_when_another_graph_is_replayed(recorders):
    """Under the evaluations of the coming step; the scales stay as they are."""
    model = two_layers()
    optimizer, closure = qzo.QZO(model, lr=0.1, directions=2), losses_of(model, 4)
    before, found = optimizer.arena.data.clone(), []
    held = graph.graphs_of(optimizer)
    assert held is not None
    for step, batch in enumerate(batches([1, 2, 1, 2, 1, 2])):
        optimizer.param_groups[0]["step"] = step
        want = optimizer.losses(functools.partial(closure, batch), optimizer.evaluations(), True).double()
        found.append((held.losses(closure, batch, True), want))
    assert [got is None for got, _ in found] == [True] * 2 + [False] * 4
    assert all(torch.equal(got, want) for got, want in found[2:] if got is not None)
    assert torch.equal(optimizer.arena.data, before)


def test_few_graphs_are_held_and_the_least_used_goes(recorders, monkeypatch):
    model = two_layers()
    optimizer = qzo.QZO(model, lr=0.1, directions=2)
    losses = losses_of(model, 4)

    def after(*rows):
        steps(optimizer, losses, batches(rows))
        assert optimizer.graphs is not None
        given = [graph.batch for graph in optimizer.graphs.captured.values()]
        return sorted(len(batch["x"]) // 4 for batch in given if batch is not None)

    after(1)
    assert optimizer.graphs is not None
    optimizer.graphs.limit = 2
    assert after(1, 1, 2, 2, 2, 2) == [1, 2]  # three uses and four
    assert after(3, 3, 3, 3, 3) == [1, 2]  # five uses are not twice as many
    assert after(3) == [2, 3]
    [recorder] = recorders
    assert [graph.dead for graph in recorder.graphs] == [True, False, False]
    assert after(*[1, 2, 3] * 4) == [2, 3]  # no endless captures
    monkeypatch.setattr(graph, "PERIOD", 4)  # what was used long ago counts less and less
    assert 1 in after(*[1] * 20)
    assert len(recorder.graphs) == 4


def test_the_table_of_uses_stays_short(recorders):
    optimizer = qzo.QZO(two_layers(), lr=0.1)
    for step in range(3 * graph.PERIOD):
        optimizer.step(lambda batch: torch.tensor([1.0, 2.0]), batch={"step": step})
    assert optimizer.graphs is not None
    assert len(optimizer.graphs.uses) <= graph.PERIOD + 1
    assert optimizer.graphs.captured == {}


def test_plain_values_are_part_of_the_shape(recorders):
    model = two_layers()
    optimizer, seen = qzo.QZO(model, lr=0.0), []

    def losses(batch):
        seen.append(batch["scale"])
        return model(batch["x"]).mean(1) * batch["scale"]

    [batch] = batches([1], 2)
    means = [optimizer.step(losses, batch={**batch, "scale": scale}) for scale in (1, 1, 3, 3)]
    assert means == pytest.approx([means[0], means[0], 3 * means[0], 3 * means[0]], rel=0.1)
    assert {1, 3} == set(seen)
    assert optimizer.graphs is not None
    assert len(optimizer.graphs.captured) == 2


def test_settings_that_are_captured_make_another_graph(recorders):
    """eps and the rate are read by the replay, what the noise is like and how many directions there are is not."""
    optimizer = qzo.QZO(two_layers(), lr=0.0)
    plain = qzo.QZO(two_layers(), lr=0.0, cuda_graph=False)
    closures: dict[qzo.QZO, Any] = {}
    for change in ({}, {}, {}, {"eps": 0.1, "clip": 0.5, "lr": 0.3}, {}, {"noise": "ih4"}, {}, {}, {"directions": 2}):
        means = []
        for one in (optimizer, plain):
            one.param_groups[0].update(change)
            count = 2 * one.param_groups[0]["directions"]
            [batch] = batches([1], count)
            if one not in closures or change.get("directions"):
                closures[one] = losses_of(one.module, count)
            one.step(closures[one], batch=batch)
            means.append(one.last)
        assert means[0] == means[1]
    assert optimizer.graphs is not None
    assert len(optimizer.graphs.captured) == 2
    assert torch.equal(optimizer.arena.data, plain.arena.data)


def test_a_model_that_moved_gets_new_graphs(recorders):
    model = two_layers()
    optimizer = qzo.QZO(model, lr=0.1, directions=2)
    losses = losses_of(model, 4)
    for step, batch in enumerate(batches([1] * 6)):
        if step == 3:
            optimizer.arena.data = optimizer.arena.data.clone()  # what a journey to another device leaves
        before = optimizer.arena.data.clone()
        optimizer.step(losses, batch=batch)
        assert not torch.equal(optimizer.arena.data, before)
    first, second = recorders
    assert [len(recorder.alive) for recorder in recorders] == [0, 1]
    assert len(first.graphs) == len(second.graphs) == 1


# ---------------------------------------------------------------------------------------------- what is not captured


def test_without_a_gpu_nothing_is_said_unless_a_graph_was_asked_for(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, plain, records = run(tmp_path / "a", [1, 1, 1])
        run(tmp_path / "c", [1, 1, 1], cuda_graph=False)
    with pytest.warns(UserWarning, match="cuda_graph=True: the scales are on 'cpu'.*run without a graph") as said:
        _, scales, bits = run(tmp_path / "b", [1, 1, 1], cuda_graph=True)
    assert len(said) == 1
    assert torch.equal(scales, plain)
    assert bits == records == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("wrong", ["auto", 1, 0])
def test_cuda_graph_is_none_or_a_bool(wrong):
    with pytest.raises(ValueError, match=rf"cuda_graph={wrong!r}: expected None .*, True or False"):
        qzo.QZO(two_layers(), lr=0.1, cuda_graph=wrong)
    with pytest.raises(ValueError, match=f"cuda_graph={wrong!r}: expected true or false"):
        Settings(cuda_graph=wrong)


def test_a_batch_is_a_mapping():
    with pytest.raises(TypeError, match="batch=Tensor: expected a mapping of tensors"):
        qzo.QZO(two_layers(), lr=0.1).step(lambda batch: batch, batch=torch.ones(2))  # type: ignore[arg-type]


def test_what_reads_on_the_host_runs_plainly_after_one_warning_that_names_it(tmp_path, recorders):
    def model():
        layers = two_layers()
        return nn.Sequential(layers[0], nn.Sequential(nn.ReLU(), Reads()), layers[2])

    own = model()
    with pytest.warns(UserWarning, match="cuda_graph") as said:
        optimizer, scales, records = run(tmp_path / "a", ROWS, model=own, closure=losses_of(own, 4))
    [text] = {str(one.message) for one in said}
    assert "1.1 (Reads) cannot be captured (operation not permitted when stream is capturing" in text
    assert "second line" not in text
    assert text.endswith("the steps run without a graph")
    assert optimizer.graphs.captured == {}
    _, plain, bits = run(tmp_path / "b", ROWS, model=model(), cuda_graph=False)
    assert torch.equal(scales, plain)
    assert records == bits


def test_a_closure_that_reads_is_named_as_such(recorders):
    model = two_layers()
    optimizer = qzo.QZO(model, lr=0.1)

    def losses(batch):
        return model(batch["x"]).mean(1) + float(batch["x"].sum())

    with pytest.warns(UserWarning, match=r"the closure cannot be captured \(operation not permitted") as said:
        steps(optimizer, losses, batches([1] * 4, 2))
    assert len(said) == 1


def test_graphs_that_exist_go_when_a_capture_fails(recorders):
    model = two_layers()
    optimizer, losses = qzo.QZO(model, lr=0.1), losses_of(model, 2)

    def picky(batch):
        return losses(batch) + (float(batch["x"].sum()) if len(batch["x"]) > 2 else 0)

    steps(optimizer, picky, batches([1, 1, 1], 2))
    assert len(recorders[0].alive) == 1
    with pytest.warns(UserWarning, match="cannot be captured"):
        steps(optimizer, picky, batches([2, 2, 1], 2))
    assert recorders[0].alive == []


class Watches(nn.Module):
    """Takes another way while it is captured."""

    def forward(self, x):
        return 2 * x if torch.cuda.is_current_stream_capturing() else x


def test_a_graph_with_other_losses_than_the_plain_step_is_not_used(tmp_path, recorders):
    def model():
        layers = two_layers()
        return nn.Sequential(layers[0], Watches(), layers[2])

    own = model()
    with pytest.warns(UserWarning, match="its losses in a graph are not those without"):
        _, scales, _ = run(tmp_path / "a", ROWS, model=own, closure=losses_of(own, 4))
    assert torch.equal(scales, run(tmp_path / "b", ROWS, model=model(), cuda_graph=False)[1])
    assert recorders[0].alive == []


def test_values_that_cannot_be_compared_run_plainly(recorders):
    optimizer = qzo.QZO(two_layers(), lr=0.1)
    with pytest.warns(UserWarning, match=r"cuda_graph: the batch cannot be kept .*\(more is a list") as said:
        steps(optimizer, lambda batch: torch.ones(2), [{"more": [torch.ones(1)]}] * 3)
    assert len(said) == 1


def test_a_batch_that_cannot_be_written_to_runs_plainly(recorders):
    optimizer = qzo.QZO(two_layers(), lr=0.1)
    batch = types.MappingProxyType({"x": torch.ones(2)})
    with pytest.warns(UserWarning, match=r"cannot be kept .*\(a mappingproxy cannot be written to"):
        steps(optimizer, lambda batch: batch["x"], [batch] * 3)
    assert optimizer.param_groups[0]["step"] == 3


def test_a_wrong_closure_is_an_error_as_without_a_graph(recorders):
    with pytest.raises(ValueError, match=r"must return a tensor \[2\]"):
        qzo.QZO(two_layers(), lr=0.1).step(lambda batch: torch.ones(3), batch={})
    with pytest.raises(ValueError, match=r"paired=False the closure must return one number.*got \[3\]"):
        qzo.QZO(two_layers(), lr=0.1, paired=False).step(lambda batch: torch.ones(3), batch={})


def test_experts_run_plainly_and_are_named(recorders):
    """Routing looks on the host which expert has which rows."""
    config = MixtralConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = qzo.quantize_(MixtralForCausalLM(config).eval(), group_size=32)
    optimizer = qzo.QZO(model, lr=0.1)
    batch = {
        "input_ids": torch.tensor([[3, 4, 5]]),
        "sources": torch.tensor([[0, 1]]),
        "targets": torch.tensor([[4, 5]]),
        "slots": torch.tensor([[0, 0]]),
        "static": True,
    }

    def losses(batch):
        return qzo.losses(model, batch, 2)

    with pytest.warns(UserWarning, match=r"model\.layers\.0\.mlp\.experts \(Experts\) cannot be captured"):
        steps(optimizer, losses, [qzo.pair(batch, 2)] * 2)


# ---------------------------------------------------------------------------------------------- without a batch


def test_a_closure_is_captured_when_it_is_asked_for_and_comes_again(recorders):
    ends = []
    for choice in (None, True):
        model = two_layers()
        closure_steps(model, torch.empty(4, 96), choice, 4)
        ends.append(arena_of(model).data)
    assert torch.equal(*ends)
    [recorder] = recorders  # None: what a closure reads is not known, nothing is captured
    assert [graph.replays for graph in recorder.graphs] == [4]


def test_closures_that_never_come_again_are_said_once(recorders):
    model, x = two_layers(), torch.ones(2, 96)
    optimizer = qzo.QZO(model, lr=0.1, cuda_graph=True)

    def closures():
        for _ in range(4):
            optimizer.step(lambda: model(x).float().mean(1))

    with pytest.warns(UserWarning, match="another closure than the one before") as said:
        closures()
    assert len(said) == 1
    assert recorders[0].graphs == []


# ---------------------------------------------------------------------------------------------- the calls of torch.cuda


def test_graphs_share_a_pool_and_a_stream():
    cuda = graphs.Cuda()
    recorder = graph.Recorder(torch.device("cuda"), cuda)
    assert recorder.warm(lambda: cuda.now, 2) == [recorder.side] * 2
    assert cuda.log[1:] == ["main waits"]
    assert [recorder.record(lambda: cuda.now)[1] for _ in range(2)] == [recorder.side] * 2
    assert cuda.log[2:] == [("captures in", "pool 1")] * 2
    assert cuda.now == "main"


def test_after_a_capture_that_failed_the_stream_is_the_one_before_and_the_first_error_is_told():
    cuda = graphs.Cuda()

    def fails():
        raise RuntimeError("the reason")

    with pytest.raises(RuntimeError, match="the reason"):
        graph.Recorder(torch.device("cuda"), cuda).record(fails)
    assert cuda.now == "main"
    assert cuda.log[-1] == "synchronize"
