"""The benchmark's cases: bytes and operations by hand, what the registry promises, names."""

import dataclasses

import pytest

from qzo.bench import cases, results
from qzo.bench.codegen import launches
from tests.support.bench_cases import CASE
from tests.support.paths import ROOT


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
