"""Cases are run: checked before they are timed, every row whole, ratios between times of one mode."""

import dataclasses
import math

import pytest
import torch

from qzo.bench import cases, results, run, timing
from qzo.bench.providers import (
    EVERY,
    EXACT,
    Built,
    Problem,
    Provider,
)
from tests.support.bench_cases import CASE, FAST, NF4_CASE, STEP, built

pytestmark = pytest.mark.usefixtures("quick_roof")


def test_every_field_of_a_row_and_every_provider(capsys):
    rows = run.measure(CASE, "cpu", **FAST)
    assert [r["provider"] for r in rows] == [p.name for p in run.LAYER_PROVIDERS]
    for row in rows:
        assert set(results.FIELDS) <= set(row)
        if row["note"]:
            assert row["ms"] is None
            assert "is not installed" in row["note"] or "needs a CUDA device" in row["note"]
        else:
            numbers = [
                row[name]
                for name in ("ms", "p20", "p80", "gbps", "tflops", "bandwidth_fraction", "matmul_fraction", "ratio")
            ]
            assert all(math.isfinite(x) and x > 0 for x in numbers)
            assert row["p20"] <= row["ms"] <= row["p80"]
            assert row["error"] < 1e-5
            assert row["codes"] == "int4"
            assert row["gbps"] == pytest.approx(1e-6 * CASE.bytes / row["ms"])
            assert row["bandwidth_fraction"] == pytest.approx(row["gbps"] / 10)
    timed = {r["provider"] for r in rows if r["ms"]}
    assert timed == {"qzo", "qzo-row", "qzo-unperturbed", "dense", "dequantize", "official", "official-fused", "mezo"}
    assert next(r["ratio"] for r in rows if r["provider"] == "qzo") == 1.0


@pytest.mark.parametrize(
    "case",
    [
        cases.Case("step", "smollm2-135m", 0, 0, 2, 64, "float32", blocks=1),
        cases.Case("update", "", 0, 5000, 0),
        cases.Case("noise", "", 0, 100000, 0),
        cases.Case("journal", "", 0, 0, 0),
    ],
    ids=lambda c: c.kind,
)
def test_the_other_kinds(case):
    rows = [r for r in run.measure(case, "cpu", **FAST) if not r["note"]]
    assert "qzo" in {r["provider"] for r in rows}
    assert all(r["ms"] > 0 for r in rows)


@pytest.mark.parametrize("dtype", EXACT)
def test_nf4_is_run_by_all_that_can(dtype):
    rows = {r["provider"]: r for r in run.measure(dataclasses.replace(NF4_CASE, dtype=dtype), "cpu", **FAST)}
    timed = {name for name, row in rows.items() if row["ms"]}
    assert timed == {"qzo", "qzo-row", "qzo-unperturbed", "dense", "dequantize", "official", "official-fused", "mezo"}
    assert {(row["codes"], row["bits"]) for row in rows.values()} == {("nf4", 4)}
    assert rows["gemlite"]["note"] == "not there: gemlite is timed with int4 codes only"
    assert "timed with" not in rows["bitsandbytes"]["note"]
    step = dataclasses.replace(NF4_CASE, kind="step", blocks=1, k=0, n=0)
    assert run.measure(step, "cpu", ["qzo"], **FAST)[0]["ms"] > 0


def test_the_truth_knows_the_table(monkeypatch):
    packed = Problem.packed
    monkeypatch.setattr(Problem, "packed", lambda *args: dataclasses.replace(packed(*args), table=None))
    names = ["qzo", "qzo-unperturbed", "dequantize", "official", "official-fused"]
    rows = run.measure(NF4_CASE, "cpu", names, **FAST)
    assert len(rows) == len(names)
    assert all(row["note"].startswith(f"wrong: what {row['provider']} gives for 6 rows is off by") for row in rows)


def test_a_provider_that_is_wrong_is_reported_and_not_timed(monkeypatch):
    def wrong(problem):
        good = run.LAYER_PROVIDERS[0].build(problem)
        output = good.output
        assert output is not None
        return Built(
            lambda: pytest.fail("a wrong provider was timed"), 1, lambda: output() * 1.01, good.want, good.allowed
        )

    monkeypatch.setattr(run, "PROVIDERS", (Provider("wrong", wrong), *run.LAYER_PROVIDERS[:1]))
    bad, good = run.measure(CASE, "cpu", **FAST)
    assert (bad["ms"], bad["ratio"]) == (None, None)
    assert bad["note"] == (
        "wrong: what wrong gives for 6 rows is off by 0.01 of its size (root mean square, against "
        "float64; at most 1e-05 allowed); not timed"
    )
    assert good["ms"] > 0


def test_a_peer_of_another_version_is_reported_and_ours_is_not_forgiven(monkeypatch):
    def broken(problem):
        raise TypeError("unexpected keyword")

    peer = Provider("peer", broken, package="torch")
    monkeypatch.setattr(run, "PROVIDERS", (peer,))
    assert run.measure(CASE, "cpu", **FAST)[0]["note"] == "failed: TypeError: unexpected keyword"
    monkeypatch.setattr(run, "PROVIDERS", (Provider("ours", broken),))
    with pytest.raises(TypeError, match="unexpected keyword"):
        run.measure(CASE, "cpu", **FAST)


def test_out_of_memory_says_what_to_do(monkeypatch):
    def greedy(problem):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB. GPU 0 has 1 GiB")

    monkeypatch.setattr(run, "PROVIDERS", (Provider("greedy", greedy),))
    note = run.measure(CASE, "cpu", **FAST)[0]["note"]
    assert "106.30 GB more were asked for" in note
    assert "fewer --rows" in note


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
    run._clocks({"qzo": built("qzo", cases.Case("journal", "", 0, 0, 0)), "other": Built(list)}, ("graph",), "cuda", {})
    assert asked == [("cpu", "eager"), ("cuda", "graph")]
    monkeypatch.undo()

    def calls(part: slice = EVERY) -> list[None]:
        return [None for _ in range(100)[part]]

    only = Provider("qzo", lambda problem: Built(calls, 100, host=True), kinds=("overhead",))
    monkeypatch.setattr(run, "PROVIDERS", (only,))
    [row] = run.measure(cases.Case("overhead", "", 0, 1, 0), "cpu", **FAST)
    assert row["ms"] > 0
    assert (row["mode"], row["gbps"], row["roof_ms"], row["note"]) == ("eager", None, None, "")


def test_a_peer_that_is_wrong_is_named_with_its_version():
    peer = Provider("bitsandbytes", lambda problem: pytest.fail("it is not built"), package="pytest")
    note = run._wrong(peer, cases.Case("linear", "", 64, 64, 8192), 35.123, 0.2)
    assert note == (
        f"wrong: what bitsandbytes (pytest {pytest.__version__}) gives for 16384 rows is off by 35.1 of "
        "its size (root mean square, against float64; at most 0.2 allowed); not timed"
    )
