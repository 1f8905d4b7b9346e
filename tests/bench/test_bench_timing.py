"""What a time of the benchmark means: graphs and calls kept apart, weights that no cache holds, roofs, estimates."""

import contextlib
import itertools
import json
import math
import re

import pytest
import torch

from qzo.bench import bandwidth, cases, estimate, readme, results, run, timing
from qzo.bench.providers import EVERY, PROVIDERS, Built, Problem, Provider
from qzo.bench.small import Arena
from qzo.cli.main import main

ROOF = timing.roof.__wrapped__
CASE = cases.Case("linear", "smollm2-135m", 192, 64, 3, 64, "float32")
STEP = cases.Case("step", "smollm2-135m", 0, 0, 2, 64, "float32", blocks=1)
UPDATE = cases.Case("update", "", 0, 5000, 0)
FAST = dict(least_bytes=1, least=2, seconds=0.0)


@pytest.fixture(autouse=True)
def quick_roof(monkeypatch):
    monkeypatch.setattr(timing, "roof", lambda device, dtype: timing.Roof(10.0, 5.0, 0.1))


def built(name, case, least_bytes=1):
    problem = (Problem if case.shapes else Arena)(case, "cpu", least_bytes)
    return next(p for p in run.PROVIDERS if p.name == name and case.kind in p.kinds).build(problem)


# ------------------------------------------------------------------------------------------------ graphs


@pytest.fixture
def capturing(monkeypatch):
    """torch.cuda's graphs as far as random numbers see them: what is drawn from has to be registered before, nothing is
    seeded inside. Returns the graphs that were made."""
    made, active = [], []

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


@pytest.mark.parametrize("name", ["official", "official-fused", "mezo"])
def test_each_step_draws_one_noise_four_times_and_the_next_another(name):
    one = built(name, STEP)
    seen = [one.generators[0].get_state()]
    for _ in range(2):
        one.run()
        states = [generator.get_state() for generator in one.generators]
        assert all(torch.equal(state, states[0]) for state in states)
        seen.append(states[0])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


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


def test_a_ratio_is_between_times_of_one_mode(monkeypatch):
    """The official loop cannot be captured here: it is timed call by call, and so is qzo, once more."""

    def clock(run, device, mode, passes, generators=()):
        if mode == "graph" and generators:
            raise timing.NotCaptured("no luck")
        return lambda: {"graph": 1.0, "eager": 8.0}[mode] * (3.0 if generators else 1.0)

    monkeypatch.setattr(run, "modes", lambda case, device: ("graph",))
    monkeypatch.setattr(timing, "clock", clock)
    rows = run.measure(CASE, "cpu", ["qzo", "dense", "official"], **FAST)
    found = [(r["provider"], r["mode"], r["ms"], r["ratio"], r["note"]) for r in rows]
    why = "timed without a graph: none could be captured (no luck)"
    assert found == [
        ("qzo", "graph", 1.0, 1.0, ""),
        ("qzo", "eager", 8.0, 1.0, ""),
        ("dense", "graph", 1.0, 1.0, ""),
        ("official", "eager", 24.0, 3.0, why),
    ]


def test_how_cases_are_timed():
    assert run.modes(CASE, "cuda") == ("graph",)
    assert run.modes(STEP, "cuda") == ("graph", "eager")
    assert run.modes(STEP, "cpu") == ("eager",)
    assert {c.kind for c in cases.every("cuda")} == set(cases.KINDS) - {"noise"}


def test_what_only_the_host_does_is_timed_on_the_host(monkeypatch):
    """Room for the launch overhead of an operator: a callable's own time, without bytes or operations."""
    asked = []
    monkeypatch.setattr(timing, "clock", lambda run, device, mode, passes, generators: asked.append((device, mode)))
    run._clocks({"qzo": built("qzo", cases.Case("journal", "", 0, 0, 0)), "other": Built(None)}, ("graph",), "cuda", {})
    assert asked == [("cpu", "eager"), ("cuda", "graph")]
    monkeypatch.undo()
    monkeypatch.setattr(
        run,
        "PROVIDERS",
        (
            Provider(
                "qzo",
                lambda problem: Built(lambda part=EVERY: [None for _ in range(100)[part]], 100, host=True),
                kinds=("overhead",),
            ),
        ),
    )
    [row] = run.measure(cases.Case("overhead", "", 0, 1, 0), "cpu", **FAST)
    assert row["ms"] > 0
    assert (row["mode"], row["gbps"], row["roof_ms"], row["note"]) == ("eager", None, None, "")


# ------------------------------------------------------------------------------------------------ turns and roofs


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


@pytest.mark.parametrize("name", [p.name for p in PROVIDERS if not p.cuda_only])
def test_a_part_of_the_passes_is_that_much_work(name):
    one = built(name, CASE, 1 << 17)
    assert one.passes >= 3
    assert len(one.run(slice(1, 3))) == 2
    whole = built(name, STEP)
    assert len(whole.run(slice(0, 1))) == len(STEP.shapes)


def test_the_kernels_of_the_roof_read_and_copy_all():
    x = torch.randint(-(2**31), 2**31 - 1, (3 * bandwidth.BLOCK * bandwidth.TURNS,), dtype=torch.int32)
    y, sums = torch.empty_like(x), bandwidth.sums_of(x)
    bandwidth.copy(x, y)
    bandwidth.read(x, sums)
    assert torch.equal(x, y)
    assert torch.equal(sums, x.view(3, -1).sum(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="1000 numbers: expected a multiple of 32768"):
        bandwidth.sums_of(x[:1000])


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


# ------------------------------------------------------------------------------------------------ files


def rows_of(device, *timed, schema=results.SCHEMA):
    """Rows of one case: (provider, mode, ms)."""
    versions = {"torch": "2.13"} | ({"cuda": "13.0"} if device == "H100" else {})
    rows = [
        {
            **dict.fromkeys(results.FIELDS),
            "schema": schema,
            "kind": "step",
            "case": "step a",
            "note": "",
            "device": device,
            "versions": versions,
            "date": "2026-11-28",
            "provider": provider,
            "mode": mode,
            "ms": ms,
            "p20": ms,
            "p80": ms,
        }
        for provider, mode, ms in timed
    ]
    run.add_ratios(rows)
    return rows


def test_the_readme_shows_both_kinds_of_step_and_no_ratio_across_them():
    rows = rows_of(
        "H100",
        ("qzo", "graph", 2.0),
        ("qzo", "eager", 8.0),
        ("dense", "graph", 3.0),
        ("dense", "eager", 4.0),
        ("official", "eager", 40.0),
    )
    assert readme.ratio_table(rows).splitlines()[2:4] == [
        "| step a, graph | 2 | 1.50x |  |",
        "| step a, eager | 8 | 0.50x | 5.00x |",
    ]
    shown = results.as_markdown(rows)
    assert "| step a, graph | dense | 3 (3-3) |" in shown
    assert "| step a | official | 40 (40-40) |" in shown
    with pytest.raises(ValueError, match="share no case, provider, mode and device"):
        results.compare(rows[:1], rows[1:2], 0.05)


@pytest.mark.parametrize(("device", "mode", "ratio"), [("H100", None, None), ("EPYC, 1 thread", "eager", 2.0)])
def test_files_of_the_first_schema_are_read_and_gpu_ratios_left_out(tmp_path, device, mode, ratio):
    path = tmp_path / "old.jsonl"
    rows = rows_of(device, ("qzo", "eager", 2.0), ("official", "eager", 4.0), schema=1)
    path.write_text(
        "".join(json.dumps({k: v for k, v in r.items() if k not in ("mode", "roof_ms")}) + "\n" for r in rows)
    )
    read = results.read(path)
    assert [(r["mode"], r["ratio"], r["ms"]) for r in read][1] == (mode, ratio, 4.0)
    assert "official" in results.as_markdown(read)
    assert "official" in readme.ratio_table(read)


# ------------------------------------------------------------------------------------------------ how long it takes


def test_run_says_how_long_and_leaves_nothing_out_in_silence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(estimate, "seconds", lambda case, device, names: 0.01 if case.kind == "journal" else 7200.0)
    monkeypatch.setattr(estimate, "probe", lambda device: 1.0)
    out = tmp_path / "out.jsonl"
    assert main(["bench", "run", "--filter", "R", "--seconds", "60", "--providers", "qzo", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    rows = results.read(out)
    assert len(rows) == len(cases.choose("cpu", "R"))
    timed = [r for r in rows if r["ms"]]
    assert [r["kind"] for r in timed] == ["journal"]
    for note in {r["note"] for r in rows if not r["ms"]}:  # a busy machine may have used a second or two
        assert re.fullmatch(r"left out: it takes about 2.0 h, and (60|5\d) s of --seconds 60 are left", note)
    assert said.count("left out") == len(rows) - 1
    assert f"{len(rows)} cases on cpu, about {2 * (len(rows) - 1)}.0 h, --seconds 60;" in said
    assert main(["bench", "run", "--seconds", "0"]) == 2
    assert "--seconds 0: expected more than 0" in capsys.readouterr().err


def test_a_cpu_without_a_filter_has_ten_minutes(capsys, monkeypatch):
    limits = []
    monkeypatch.setattr(
        "qzo.bench.command._measured",
        lambda chosen, device, names, limit: limits.append(limit) or [run.left_out(chosen[0], device, "")],
    )
    for more in ([], ["--seconds", "5"], ["--filter", "smollm2"]):
        assert main(["bench", "run", "--json", *more]) == 0
    assert limits == [600, 5.0, None]


def test_the_budget_learns_from_what_cases_took(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(estimate.time, "monotonic", lambda: now[0])
    budget = estimate.Budget(100, 1.0)
    assert budget.refuses(60) is None
    now[0] = 40.0
    budget.done(20)  # twice what its formula says
    assert budget.refuses(29) is None
    assert budget.refuses(31) == "left out: it takes about 62 s, and 60 s of --seconds 100 are left"
    assert estimate.Budget(None, 1.0).refuses(1e9) is None
    assert [estimate.said(x) for x in (40, 400, 7560)] == ["40 s", "7 min", "2.1 h"]


def test_the_formula_grows_with_the_case():
    few, many = (cases.Case("linear", "llama-2-7b", 4096, 4096, rows, 128, "float32") for rows in (1, 1024))
    assert 2 < estimate.seconds(few, "cpu") < estimate.seconds(many, "cpu")
    assert estimate.seconds(few, "cpu", ["qzo"]) < estimate.seconds(few, "cpu") / 4
    assert sum(estimate.seconds(c, "cpu") for c in cases.default("cpu")) < 600
    assert 0 < estimate.probe("cpu") < 100


def test_a_peer_that_is_wrong_is_named_with_its_version():
    peer = Provider("bitsandbytes", None, package="pytest")
    note = run._wrong(peer, cases.Case("linear", "", 64, 64, 8192), 35.123, 0.2)
    assert note == (
        f"wrong: what bitsandbytes (pytest {pytest.__version__}) gives for 16384 rows is off by 35.1 of "
        "its size (root mean square, against float64; at most 0.2 allowed); not timed"
    )
