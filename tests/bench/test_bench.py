"""The benchmark command: formulas, checks before timing, files, errors. Times themselves are not asserted."""

import dataclasses
import json
import math

import pytest
import torch

from qzo.bench import cases, results, run, timing
from qzo.bench.codegen import launches
from qzo.bench.providers import (
    EPS,
    EXACT,
    PROVIDERS,
    Built,
    Problem,
    Provider,
    error_of,
    four_alike,
    in_place_pair,
    sweep,
)
from qzo.cli.main import main
from tests.support.paths import FIXTURES, ROOT

CASE = cases.Case("linear", "smollm2-135m", 192, 64, 3, 64, "float32", "ih4")
NF4_CASE = dataclasses.replace(CASE, codes="nf4")
FAST = dict(least_bytes=1, least=2, seconds=0.0)


@pytest.fixture(autouse=True)
def quick_roof(monkeypatch):
    monkeypatch.setattr(timing, "roof", lambda device, dtype: timing.Roof(10.0, 5.0, 0.1))


def test_bytes_and_operations_by_hand():
    case = cases.Case("linear", "llama-2-7b", 4096, 11008, 16, 128, "bfloat16")
    codes, scales, rows = 4096 * 11008 // 2, 4 * 32 * 11008, 2 * 16 * (4096 + 11008) * 2
    assert case.bytes == codes + scales + rows
    assert case.flops == 2 * 2 * 16 * 4096 * 11008
    assert cases.Case("update", "", 0, 1000, 0).bytes == 8000
    step = cases.Case("step", "smollm2-135m", 0, 0, 1, 64, "float32", blocks=2)
    assert step.flops == 2 * sum(4 * k * n for k, n in cases.BLOCKS["smollm2-135m"][0])


def test_the_registry_holds_what_is_promised():
    names = {c.name for c in cases.every("cuda")}
    assert len(names) == len(cases.every("cuda"))
    models = {c.model for c in cases.every("cuda") if c.kind == "linear"}
    assert models == {"llama-2-7b", "llama-2-13b", "llama-3.1-8b", "opt-6.7b", "sd3.5-large", "smollm2-135m"}
    linear = [c for c in cases.every("cuda") if c.kind == "linear"]
    assert {c.rows for c in linear} == {1, 4, 16, 64, 128, 512, 2048, 8192}
    assert {c.noise for c in linear} == set(cases.LAWS)
    assert {c.group for c in linear if c.group != c.k} == {32, 64, 128}
    assert {2432, 9728} <= {c.k for c in linear}
    assert {c.kind for c in cases.every("cpu")} == set(cases.KINDS) == {c.kind for c in cases.default("cpu")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vectors_stand_beside_int4_rows(device):
    every = cases.every(device)
    found = [c for c in every if c.form.books]
    assert {c.codes for c in found} == ({"aqlm-2x8"} if device == "cpu" else {"aqlm-1x16", "aqlm-2x8"})
    for case in found:
        beside = dataclasses.replace(case, codes="int4")
        assert beside in every
        assert case.group == case.k
        books = case.form.books * 2**case.form.bits * 8 * cases.DTYPES[case.dtype].itemsize
        assert beside.bytes - case.bytes == case.k * case.n // 4 - books


@pytest.mark.parametrize("provider", ["qzo", "qzo-unperturbed", "dequantize", "official", "official-fused", "dense"])
@pytest.mark.parametrize("codes", ["aqlm-2x8", "aqlm-1x16"])
def test_vectors_agree_with_the_truth(provider, codes):
    case = cases.Case("linear", "", 256, 80, 3, 256, "float32", codes=codes)
    problem = Problem(case, "cpu", 1)
    built = next(p for p in PROVIDERS if p.name == provider).build(problem)
    assert error_of(built, problem) < built.allowed


@pytest.mark.parametrize(
    ("device", "wanted"),
    [
        ("cpu", {("smollm2-135m", 16)}),
        ("cuda", {("llama-2-7b", rows) for rows in (1, 16, 64, 512)} | {("sd3.5-large", 512)}),
    ],
)
def test_nf4_stands_beside_int4_in_the_same_groups(device, wanted):
    every = cases.every(device)
    found = [c for c in every if c.codes == "nf4"]
    assert {(c.model, c.rows) for c in found} == wanted
    for case in found:
        beside = dataclasses.replace(case, codes="int4")
        assert beside in every
        assert (case.group, case.name, case.bytes) == (64, f"{beside.name} nf4", beside.bytes)
        assert set(cases.LAYERS[case.model]) == {(c.k, c.n) for c in found if c.model == case.model}
    if device == "cpu":
        assert set(found) < set(cases.default(device))


def test_names_are_those_of_the_results_files():
    [path] = (ROOT / "bench" / "results").glob("bench-cpu-*.jsonl")
    assert {r["case"] for r in results.read(path)} <= {c.name for c in cases.every("cpu")}
    named = {codes: dataclasses.replace(CASE, codes=codes).name for codes in cases.CODES}
    plain = "linear smollm2-135m 192x64 rows 3 g64 float32 ih4"
    suffixes = {
        "int4": "",
        "int2": " 2 bits",
        "int8": " 8 bits",
        "nf4": " nf4",
        "aqlm-1x16": " aqlm 1x16",
        "aqlm-2x8": " aqlm 2x8",
    }
    assert named == {codes: plain + suffix for codes, suffix in suffixes.items()}
    assert set(named) <= set(launches.CODES)


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


@pytest.mark.parametrize(("codes", "most"), [("nf4", 1e-5), ("int4", 0.2)])
def test_bitsandbytes_takes_both(codes, most):
    """It quantizes the dense weight itself: NF4 in blocks of 64 it finds again."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    problem = Problem(dataclasses.replace(CASE, codes=codes), "cpu", 1)
    built = next(p for p in run.LAYER_PROVIDERS if p.name == "bitsandbytes").build(problem)
    assert error_of(built, problem) < most <= built.allowed


def test_a_provider_that_is_wrong_is_reported_and_not_timed(monkeypatch):
    def never(*_):
        pytest.fail("a wrong provider was timed")

    def wrong(problem):
        good = run.LAYER_PROVIDERS[0].build(problem)
        output = good.output
        assert output is not None
        return Built(
            never,
            1,
            lambda: output() * 1.01,
            good.want,
            good.allowed,
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


@pytest.mark.parametrize("name", ["qzo", "dense", "dequantize", "official", "official-fused", "mezo"])
def test_weights_are_larger_than_the_cache(name):
    """As many outputs a pass as there are sets of weights, and these together exceed the cache."""
    provider = next(p for p in run.LAYER_PROVIDERS if p.name == name)
    built = provider.build(Problem(CASE, "cpu", 1 << 20))
    outputs = built.run()
    assert isinstance(outputs, list)
    assert len(outputs) == built.passes
    assert built.passes * 64 * 192 * (4 if name in ("dense", "mezo") else 0.5) >= 1 << 20


def test_the_official_loop_is_the_papers():
    """+eps, -2 eps, +eps, then the update, with one seed: four sweeps, two forwards."""
    scales = torch.full((4, 8), 0.5)
    before, seen = scales.clone(), []

    def forward(some):
        seen.append(scales.clone())
        return [torch.zeros(some.stop - some.start, 1)]

    in_place_pair([scales], forward, 2, False, four_alike("cpu"))
    z = torch.zeros(4, 8)
    sweep([z], 1.0, torch.Generator().manual_seed(7))
    assert torch.allclose(seen[0], before + EPS * 0.02 * z)
    assert torch.allclose(seen[1], before - EPS * 0.02 * z)
    assert torch.allclose(scales, before, atol=1e-7)
    assert len(seen) == 2


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def measured(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in run.measure(CASE, "cpu", **FAST)))
    return path


def test_compare_finds_what_got_slower(measured, tmp_path, capsys):
    rows = results.read(measured)
    slow = tmp_path / "new.jsonl"
    for row in rows:
        row["ms"] = row["ms"] and row["ms"] * (1.2 if row["provider"] == "qzo" else 1.01)
    slow.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["bench", "compare", str(measured), str(slow)]) == 1
    marked = [line for line in capsys.readouterr().out.splitlines() if "SLOWER" in line]
    assert len(marked) == 1
    assert ", qzo:" in marked[0]
    assert "1.200x" in marked[0]
    assert main(["bench", "compare", str(measured), str(measured)]) == 0


def test_table_and_plot(measured, tmp_path, capsys):
    assert main(["bench", "table", str(measured)]) == 0
    text = capsys.readouterr().out
    assert sum(line.startswith(f"| {CASE.name} |") for line in text.splitlines()) == 8
    assert "gemlite: not there: gemlite is not installed" in text
    assert main(["bench", "plot", str(measured), "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_run_writes_lines_and_names_cases(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    out = tmp_path / "out.jsonl"
    assert main(["bench", "run", "--filter", "JOURNAL", "--json", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == results.read(out)
    assert "1 cases on cpu" in captured.err
    assert main(["bench", "run", "--list", "--filter", "576x192", "--rows", "16"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed
    assert all("576x192 rows 16 " in name for name in listed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--filter", "llama-9"], "no case of cpu has 'llama-9' in its name; there are"),
        (["run", "--providers", "qzo,marlin2"], "no provider marlin2; there are qzo, qzo-row"),
        (["run", "--filter", "576x192", "--rows", "3"], "--rows 3: the chosen cases have 1, 16, 256, 1024 rows"),
        (["run", "--rows", "0"], "--rows 0: expected rows per evaluation, each at least 1"),
        (["table", str(FIXTURES / "ct-w4a16-asym-g128-rtn/model.safetensors")], "model.safetensors is no text"),
        (["run", "--device", "cuda"], "--device cuda: there is no CUDA device here; use --device cpu"),
        (["table", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, said):
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema": 1', "line 1: not JSON"),
        ('{"schema": 9}', "line 1: schema 9, this qzo reads schemas 1 and 2"),
        ("[1]", "schema none"),
        ('{"schema": 1, "case": "a"}', "line 1: the fields provider, rows"),
        ("", "holds no results"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, content, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert main(["bench", "table", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
