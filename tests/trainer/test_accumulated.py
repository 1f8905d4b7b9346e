"""The optimizer of a trainer: losses in parts, from micro-batches and ranks, are added up in one order."""

import functools
from typing import Any, cast

import pytest
import torch

from qzo.nn.layers import arena_of
from qzo.optim.optimizer import QZO
from qzo.trainer.accumulated import UNMOVED, AccumulatedQZO
from tests.support import graphs
from tests.support.small_layers import block

PARTS = torch.tensor([[1.5, 2.25], [0.125, 3.0], [7.0, 0.5], [2.0, 1.0]])


@pytest.mark.parametrize("sided", [{}, {"one_sided": True, "directions": 2}])
def test_parts_that_were_added_up_are_one_step_of_their_sum(sided):
    added, whole = AccumulatedQZO(block(), 1e-2, **sided), QZO(block(), 1e-2, **sided)
    for part in PARTS:
        added.accumulate(part)
    total = PARTS.double().sum(0)
    assert added.step() == whole.step(lambda: total) == float(total.mean())
    assert torch.equal(arena_of(added.module).data, arena_of(whole.module).data)
    assert not torch.equal(arena_of(added.module).data, arena_of(block()).data)


def test_steps_that_run_ahead_are_refused():
    with pytest.raises(ValueError, match="staleness=2: steps of a trainer are taken at once"):
        AccumulatedQZO(block(), 1e-2, staleness=2)


def test_ranks_are_added_in_their_order_and_divided_by_their_number(monkeypatch):
    """1e16 + 1 - 1e16 is 0 in float64: another order of the ranks has other bits."""
    of_others = torch.tensor([[[1.0, 1], [4, 1]], [[-1e16, 1], [8, 1]]], dtype=torch.float64)
    optimizer = AccumulatedQZO(block(), 1e-2, eps=0.5)
    monkeypatch.setattr(optimizer.ranks, "count", 3)
    monkeypatch.setattr(optimizer.ranks, "send", lambda losses: lambda: torch.cat([losses[None], of_others]))
    optimizer.accumulate(torch.tensor([1e16, 3.0], dtype=torch.float64))
    assert optimizer.reduce().tolist() == [-5.0]  # (0 - 15) / 3 over 2 eps
    optimizer.step()
    assert optimizer.last is not None
    assert optimizer.last.losses == [0.0, 5.0]


def test_ranks_are_asked_once_a_step(monkeypatch):
    asked: list[torch.Tensor] = []
    optimizer = AccumulatedQZO(block(), 1e-2)
    send = optimizer.ranks.send
    monkeypatch.setattr(optimizer.ranks, "send", lambda losses: asked.append(losses) or send(losses))
    for step in range(2):
        optimizer.accumulate(torch.tensor([1.0, 2.0]))
        first = optimizer.reduce()
        assert torch.equal(optimizer.reduce(), first)
        optimizer.step()
        assert len(asked) == step + 1
    assert {tuple(losses.shape) for losses in asked} == {(2, 2)}
    assert {losses.dtype for losses in asked} == {torch.float64}


def test_micro_batches_of_a_step_share_their_evaluations():
    optimizer = AccumulatedQZO(block(), 1e-2)
    first = optimizer.evaluations()
    assert optimizer.evaluations() is first
    optimizer.accumulate(torch.tensor([1.0, 2.0]))
    optimizer.step()
    assert optimizer.evaluations() is not first


@pytest.mark.parametrize(("static", "count"), [(True, 1), (False, 1), (True, 2)])
def test_static_batches_of_one_process_are_captured(monkeypatch, static, count):
    """Their losses are those without a graph; steps of several ranks have none."""
    recorders = graphs.stand_in(monkeypatch)
    model = block()
    optimizer = AccumulatedQZO(model, 1e-2)
    monkeypatch.setattr(optimizer.ranks, "count", count)

    def closure(batch):
        return model(batch["x"]).square().mean(1)

    for step in range(4):
        x = torch.randn(1, 64, generator=torch.Generator().manual_seed(step)).repeat(2, 1)
        found = optimizer.evaluate(closure, {"x": x, "static": static})
        assert found.dtype == torch.float64
        want = optimizer.losses(functools.partial(closure, {"x": x}), optimizer.evaluations(), True)
        assert torch.equal(found, want.double())
        optimizer._coming = None
        optimizer.param_groups[0]["step"] += 1
    assert [graph.replays for recorder in recorders for graph in recorder.graphs] == [4] * (static and count == 1)


@pytest.mark.parametrize(
    ("sided", "among"), [({}, r"\+eps and -eps"), ({"one_sided": True, "directions": 2}, "all directions")]
)
def test_an_objective_that_ignores_the_perturbation_ends_the_run(sided, among):
    optimizer = AccumulatedQZO(block(), 1e-2, **sided)
    moved, same = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.5])
    steps = [same] * (UNMOVED - 1) + [moved] + [same] * (UNMOVED - 1)
    for losses in steps:
        optimizer.accumulate(losses)
        optimizer.step()
    optimizer.accumulate(same)
    with pytest.raises(ValueError, match=rf"ignores .* in {UNMOVED} steps in a row .*{among} .*\[1.5, 1.5\]"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:step 0 had a NaN")
def test_losses_that_are_infinite_are_no_such_objective():
    optimizer = AccumulatedQZO(block(), 1e-2, max_skipped=UNMOVED + 1)
    for _ in range(UNMOVED):
        optimizer.accumulate(torch.tensor([torch.inf, torch.inf]))
        optimizer.step()
    assert optimizer.last is not None
    assert optimizer.last.skipped


def test_losses_without_a_step_are_forgotten():
    optimizer = AccumulatedQZO(block(), 1e-2)
    optimizer.accumulate(torch.tensor([100.0, 1.0]))
    optimizer.zero_grad()
    optimizer.accumulate(torch.tensor([2.0, 1.0]))
    optimizer.step()
    assert optimizer.last is not None
    assert optimizer.last.losses == [2.0, 1.0]
    with pytest.raises(RuntimeError, match="accumulate"):
        optimizer.step()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(cast(Any, lambda: 0.0))
