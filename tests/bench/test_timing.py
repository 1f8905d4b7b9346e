"""What a time means: graphs that are captured or say why not, weights used in turn, roofs."""

import contextlib
import itertools
import math
from typing import Any

import pytest
import torch

from qzo.bench import cases, run, timing
from tests.support.bench_cases import CASE, FAST, STEP, UPDATE, built

pytestmark = pytest.mark.usefixtures("quick_roof")
ROOF = timing.roof.__wrapped__


@pytest.fixture
def capturing(monkeypatch):
    """torch.cuda's graphs as far as random numbers see them: what is drawn from has to be registered before, nothing is
    seeded inside. Returns the graphs that were made."""
    made: list[Any] = []
    active: list[Any] = []

    class Graph:
        def __init__(self):
            self.registered, self.replays = [], 0
            made.append(self)

        def register_generator_state(self, generator):
            assert not active, "registered inside of a capture"
            self.registered.append(generator)

        def replay(self):
            self.replays += 1

    @contextlib.contextmanager
    def graph(one):
        active.append(one)
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904  as torch does
        finally:
            active.clear()

    def drawing(draw):
        def drawn(*arguments, generator, **keywords):
            if active and not any(generator is known for known in active[0].registered):
                raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
            return draw(*arguments, generator=generator, **keywords)

        return drawn

    generator = torch.Generator

    class Seeding:
        def __new__(cls, *arguments):
            if active:
                raise RuntimeError("Cannot construct a new CUDAGeneratorImpl")
            return generator(*arguments)

    for name, value in (("CUDAGraph", Graph), ("graph", graph), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("normal", "randn"):
        monkeypatch.setattr(torch, name, drawing(getattr(torch, name)))
    monkeypatch.setattr(torch, "Generator", Seeding)
    return made


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(
            (name, case)
            for case in (CASE, STEP)
            for name in ("qzo", "dense", "dequantize", "official", "official-fused", "mezo")
        ),
        ("qzo", UPDATE),
        ("official", UPDATE),
    ],
    ids=lambda x: getattr(x, "kind", x),
)
def test_every_rival_can_be_captured(capturing, name, case):
    one = built(name, case)
    timing.capture(one.run, one.generators)()
    [graph] = capturing
    assert graph.replays == 1
    sweeps = {"official": 4, "official-fused": 4, "mezo": 4} if case.shapes else {"official": 1}
    assert len(graph.registered) == sweeps.get(name, 0)


def test_a_capture_that_breaks_says_why_and_leaves_the_generators_usable(capturing):
    class Generator:
        now = "being captured"

        def clone_state(self):
            return "fresh"

        def graphsafe_set_state(self, state):
            self.now = state

    calls, generator = [], Generator()

    def reads_back():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore words")

    with pytest.raises(timing.NotCaptured, match=r"^operation not permitted when stream is capturing$"):
        timing.capture(reads_back, [generator])
    assert generator.now == "fresh"


def test_a_turn_goes_on_with_the_weights_used_longest_ago(monkeypatch):
    now, parts = [0.0], []

    def once(part):
        parts.append((part.start, part.stop))
        now[0] += 0.012 * (part.stop - part.start)

    monkeypatch.setattr(timing.time, "process_time", lambda: now[0])
    clock = timing.clock(once, "cpu", passes=10)
    parts.clear()
    assert [clock() for _ in range(4)] == pytest.approx([12.0] * 4)
    assert {stop - start for start, stop in parts} == {4}
    for (_, stop), (start, _) in itertools.pairwise(parts):
        assert start == (stop if stop + 4 <= 10 else 0)


def test_the_roof_is_measured(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: (1 << 27) + 4000)  # no whole number of blocks
    roof = ROOF("cpu", torch.float32)
    assert all(0 < value < math.inf for value in (roof.read, roof.copy, roof.dense))


def test_few_rows_are_held_against_reading_and_many_against_a_copy():
    roof = timing.Roof(read=3000.0, copy=2400.0, dense=600.0)
    few, many = (cases.Case("linear", "llama-2-7b", 4096, 11008, rows, 128, "float16") for rows in (16, 2048))
    assert few.written == 2 * 16 * 11008 * 2
    assert roof.bandwidth(few.bytes, few.written) == 3000
    assert roof.bandwidth(many.bytes, many.written) == 2400
    assert roof.bandwidth(UPDATE.bytes, UPDATE.written) == 2400
    assert roof.ms(few.bytes, few.written, few.flops) == pytest.approx(1e-6 * few.bytes / 3000)
    assert roof.ms(many.bytes, many.written, many.flops) == pytest.approx(1e-9 * many.flops / 600)
    [row] = run.measure(CASE, "cpu", ["qzo"], **FAST)
    assert row["bandwidth_fraction"] == pytest.approx(row["gbps"] / 10)
    [row] = run.measure(UPDATE, "cpu", ["qzo"], **FAST)
    assert row["bandwidth_fraction"] == pytest.approx(row["gbps"] / 5)
    assert row["roof_ms"] == pytest.approx(1e-6 * UPDATE.bytes / 5)
