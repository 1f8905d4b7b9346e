"""Bytes that are held, and when: the ledger, the meters, and the spans that a step is cut in."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import qzo
from qzo.kernels import qmm_torch, update
from qzo.nn.layers import arena_of
from qzo.reports import footprint
from qzo.reports.footprint import Span, Spans, allocated, check_chip, library_bytes, parts_of, weights_bytes
from tests.support.small_layers import Block


def test_what_an_allocator_takes():
    assert [allocated(size, "cuda") for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert [allocated(size, "cpu") for size in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert [allocated(size, "cpu") for size in (1 << 16, (1 << 16) + 1)] == [1 << 16, (1 << 16) + 4096]


def test_chips_and_what_their_libraries_keep():
    assert [check_chip(chip) for chip in footprint.CHIPS] == list(footprint.CHIPS)
    with pytest.raises(ValueError, match="chip 'sm_70' is not known; there are sm_80, "):
        check_chip("sm_70")
    assert library_bytes("cpu", "sm_90") == library_bytes("cuda", "gfx942") == 0
    assert [library_bytes("cuda", chip) for chip in ("sm_80", "sm_89", "sm_90", "sm_120")] == [
        8_519_680,
        8_519_680,
        32 << 20,
        32 << 20,
    ]


def test_what_a_model_holds_counts_each_storage_once():
    model: Any = qzo.quantize_(nn.ModuleDict({"a": Block(), "b": Block()}), group_size=32, symmetric=False)
    model["b"].up = model["a"].up
    model["b"].lm_head.weight = model["a"].lm_head.weight
    model.register_buffer("view", model["a"].lm_head.weight.detach()[:1])
    arena_of(model)
    found, up, down = weights_bytes(model, "cpu"), model["a"].up, model["a"].down
    assert found["codes"] == allocated(up.codes.nbytes, "cpu") + 2 * allocated(down.codes.nbytes, "cpu")
    assert found["zeros"] == allocated(up.zeros.nbytes, "cpu") + 2 * allocated(down.zeros.nbytes, "cpu")
    assert found["scales"] == allocated(up.arena.data.nbytes, "cpu")
    dense = [up.bias, model["a"].lm_head.weight, model["a"].lm_head.bias, model["b"].lm_head.bias]
    assert found["dense"] == sum(allocated(tensor.nbytes, "cpu") for tensor in dense)


# ---------------------------------------------------------------------------------------------- the ledger


def test_the_ledger_counts_what_lives():
    ledger = footprint.Ledger("cuda", "sm_90", labelled=5, padded=True)
    with ledger:
        a = torch.empty(1000, 1000, device="meta")  # 4,000,256 in units of 512
        assert ledger.current() == 4_000_256
        b = a * 2
        c = b.view(-1)[3:]  # a view costs nothing
        assert ledger.current() == 2 * 4_000_256
        del b
        assert ledger.current() == 2 * 4_000_256  # c still holds it
        del c
        assert ledger.current() == 4_000_256
        assert ledger.peak() == 2 * 4_000_256
        ledger.reset()
        row, column = torch.nonzero(a > 0, as_tuple=True)
        assert row.shape == column.shape == (5,)
        assert not bool((a > 0).all())  # padded: not every position is attended
        q = torch.empty(2, 4, 100, 64, device="meta", dtype=torch.float16)
        ledger.reset()
        before = ledger.current()
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert y.shape == q.shape
        assert ledger.peak() - before == 2 * 4 * 100 * 64 * 2 + 3584  # the output, and a float per query: 3200
    assert ledger.current() > 0


def test_storages_that_are_counted_elsewhere_and_bytes_that_stay():
    ledger = footprint.Ledger("cuda", "sm_90", labelled=1, padded=False)
    weight = torch.empty(1000, device="meta")
    ledger.know([weight])
    ledger.hold(100)
    with ledger:
        assert ledger.current() == 100
        weight.view(10, 100).mul_(2)
        assert ledger.current() == 100
        ledger.brush(1)
        assert (ledger.current(), ledger.peak()) == (100, 612), "an operator's own comes and goes"
        assert bool((weight > 0).all()), "not padded: every position is attended"


@pytest.mark.parametrize(("rows", "parts"), [(4, True), (4096, False)])
def test_a_layers_scratch_is_added_to_what_lives(monkeypatch, rows, parts):
    """What the operator allocates inside itself is not seen on the meta device, and known by its formula."""
    with torch.device("meta"):
        layer = qzo.QZOLinear(4096, 4096, group_size=128, bias=False)
    counted: list[int] = []
    ledger = footprint.Ledger("cuda", "sm_90", labelled=1, padded=False)
    monkeypatch.setattr(ledger, "brush", counted.append)
    with ledger, qzo.evaluating(layer, qzo.Evaluations([1], [0.1]).to("meta")):
        layer(torch.empty(rows, 4096, dtype=torch.float16, device="meta"))
    [scratch] = counted
    assert (scratch > 0) == parts, "few rows are summed in parts, many are not"
    assert scratch % (rows * 4096 * 4) == 0, "a float of each output"


def test_on_a_cpu_the_resident_set_is_read():
    meter = object.__new__(footprint.ResidentMeter)  # without what its start sets for the whole process
    meter.start = 0
    before = meter.current()
    assert before == meter._read("VmRSS:") > 1 << 20
    held = torch.ones(128 << 20, dtype=torch.uint8)  # so many are never of what was freed before, as 32 MB may be
    assert meter.current() - before > 0.9 * held.numel()
    assert meter.peak() >= meter.current()
    meter.start = before
    assert meter.current() < 0.5 * before


def highest(function):
    """Most bytes that torch's CPU allocator held at once for `function`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = function()
    events, found = list(record.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if hasattr(event.extra_fields, "alloc_size"):
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = most = 0
    for _, size in sorted(found):
        now += size
        most = max(most, now)
    del kept
    return most


@pytest.mark.parametrize("law", ["rademacher", "ih4", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_cpu_matmuls_scratch_is_as_its_formula(law, dtype):
    m, n, k, group = 64, 2048, 1024, 64
    model: Any = qzo.quantize_(torch.nn.Sequential(torch.nn.Linear(k, n, bias=False)), group_size=group)
    x = torch.randn(m, k, dtype=dtype)
    evaluations = qzo.Evaluations([1, 1], [0.1, -0.1], noise=law)
    with qzo.evaluating(model, evaluations):
        model(x)
        held = highest(lambda: model(x)) - m * n * dtype.itemsize
        formula = qmm_torch.scratch_bytes(m, dtype, model[0].kernel_weight(), evaluations.perturbation, 1)
    assert 0.6 * formula < held < 1.2 * formula


def test_the_updates_scratch_is_as_its_formula():
    arena, seeds, coefs = torch.rand(1 << 20), torch.tensor([1]), torch.tensor([0.1])
    held = highest(lambda: update.update_torch(arena, seeds, coefs, base4=0, law=1, relative=True, floor=0.0))
    assert 0.6 * update.scratch_bytes(1 << 18) < held < 1.2 * update.scratch_bytes(1 << 18)


# ---------------------------------------------------------------------------------------------- spans of a step


class Meter:
    """Readings that a test sets."""

    def __init__(self):
        self.now = self.most = 0

    def current(self):
        return self.now

    def peak(self):
        return self.most

    def reset(self):
        self.most = self.now

    def take(self, held, peak):
        self.now, self.most = held, max(self.most, peak)


class Measured(nn.Module):
    """A body of two layers and a loss; each takes bytes."""

    def __init__(self, meter):
        super().__init__()
        self.meter, self.body = meter, qzo.quantize_(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), group_size=32)
        for held, layer in ((30, self.body[0]), (40, self.body[1])):
            layer.register_forward_hook(lambda *_, held=held: meter.take(held, held + 15))

    def forward(self, x):
        y = self.body(x)
        self.meter.take(50, 90)
        return y


def test_a_step_is_cut_at_every_layer_at_the_end_of_the_body_and_at_the_update():
    meter = Meter()
    model = Measured(meter)
    spans = Spans(model, model.body, meter)
    meter.take(10, 10)
    with spans.watching():
        model(torch.zeros(1, 32))
        spans.enter("update")
        meter.take(50, 60)
    assert spans.found == [
        Span("forward", None, 10, 10, 10),
        Span("forward", "body.0", 10, 45, 30),
        Span("forward", None, 30, 30, 30),
        Span("forward", "body.1", 30, 55, 40),
        Span("forward", None, 40, 40, 40),
        Span("loss", None, 40, 90, 50),
        Span("update", None, 50, 60, 50),
    ]
    model(torch.zeros(1, 32))
    assert len(spans.found) == 7, "its hooks are gone"


def test_another_forward_is_a_forward_again_and_hooks_go_after_an_error():
    meter = Meter()
    model = Measured(meter)
    spans = Spans(model, model.body, meter)

    def three_forwards():
        with spans.watching():
            for width in (32, 32, 31):
                model(torch.zeros(1, width))

    with pytest.raises(ValueError, match="x has 31 columns"):
        three_forwards()
    assert [span.phase for span in spans.found] == ["forward"] * 5 + ["loss"] + ["forward"] * 4 + ["loss"]
    count = len(spans.found)
    model(torch.zeros(1, 32))
    assert len(spans.found) == count


@pytest.mark.parametrize(
    ("span", "activations", "logits", "workspace"),
    [
        (Span("forward", "a", 130, 180, 150), 50, 0, 30),  # more than its input and its output held
        (Span("forward", "a", 130, 150, 150), 50, 0, 0),
        (Span("forward", None, 130, 180, 150), 80, 0, 0),  # between layers all that lives is activations
        (Span("loss", None, 130, 180, 140), 30, 50, 0),
        (Span("update", None, 130, 180, 140), 0, 0, 80),
    ],
)
def test_what_a_peak_consists_of(span, activations, logits, workspace):
    found = parts_of(span, resident=100)
    assert found == {"activations": activations, "logits": logits, "workspace": workspace}
    assert sum(found.values()) == span.peak - 100
