"""bench/gpu_check.py without a GPU: it says so; its parts run on a CPU at small sizes, in the interpreter."""
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qzo
from qzo import ops
from qzo.bench import cases, gpu_check, results
from qzo.bench.providers import Problem
from qzo.kernels import qmm, tiles
from qzo.kernels.tiles import Tile
from qzo.layers import evaluating

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", [["bench/gpu_check.py"], ["-m", "qzo.bench.gpu_check"]])
def test_without_a_gpu_it_says_so_and_exits_2(command, tmp_path):
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command, "--out", str(tmp_path / "out.jsonl")], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert "no CUDA or ROCm device" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_its_parts_run_and_one_that_breaks_is_a_row(tmp_path, monkeypatch):
    def breaks(check):
        raise RuntimeError("no  luck")

    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}))
    monkeypatch.setattr(gpu_check, "MEMORY", ((str(config), 2, 16),))
    monkeypatch.setattr(gpu_check, "CASES", ("576x192 rows 16 g64 float32 rademacher", "journal"))
    monkeypatch.setattr(gpu_check, "TILES", ())
    monkeypatch.setitem(gpu_check.PARTS, "tests", breaks)
    check = gpu_check.Check(tmp_path / "out.jsonl", 200, device="cpu")
    gpu_check.run(check, ["tests", "memory", "bench", "tiles"])
    rows = results.read(check.out)
    assert rows == check.rows
    by_case = {row["case"]: row for row in rows}
    assert by_case["tests"]["note"] == "failed: RuntimeError: no luck"
    assert by_case[f"{config} 2 x 16"]["measured"]["total"] > 0
    steps = [row for row in rows if row["kind"] == "whole step"]
    assert [row["rows"] for row in steps] == [1, 1, 16, 16]
    assert all(row["ms"] > 0 for row in steps)
    assert "a graph needs a CUDA device" in steps[1]["note"]
    assert by_case["linear smollm2-135m 576x192 rows 16 g64 float32 rademacher"]["case"]
    assert {row["provider"] for row in rows if row["kind"] == "linear"} > {"qzo", "official", "mezo", "gemlite"}
    assert "whole step" in results.table(rows)


def test_what_no_time_is_left_for_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "CASES", ("576x192 rows 16 g64 float32 rademacher",))
    check = gpu_check.Check(tmp_path / "out.jsonl", 0, device="cpu")
    gpu_check.run(check, ["memory", "bench"])
    assert len(check.rows) == 1 + len(gpu_check.MEMORY)
    assert all(row["note"] == "no time left" for row in check.rows)


def test_tiles_are_checked_timed_and_the_fastest_is_named(tmp_path, monkeypatch):
    wrong, refused = Tile(16, 32, 4, 1), Tile(32, 32, 4, 1)
    neighbours, launch = gpu_check.neighbours, qmm.launch

    def faulty(*arguments, tile, **keywords):
        if tile == refused:
            raise RuntimeError("out of resources")
        launch(*arguments, tile=tile, **keywords)
        if tile == wrong:
            arguments[7].view(-1)[7] = torch.nan

    monkeypatch.setattr(qmm, "launch", faulty)
    monkeypatch.setattr(gpu_check, "TILES", ("smollm2-135m 576x192 rows 1 g64 float32 rademacher",))
    monkeypatch.setattr(gpu_check, "neighbours", lambda tile: [wrong, refused, *neighbours(tile)[:1]])
    monkeypatch.setattr("qzo.bench.timing.cache_bytes", lambda device: 1)
    check = gpu_check.Check(tmp_path / "out.jsonl", 600, device="cpu")
    gpu_check.run(check, ["tiles"])
    [found] = json.loads((tmp_path / "out.tiles.json").read_text()).values()
    timed = [row for row in check.rows if row["ms"]]
    assert [row["note"].partition(":")[0] for row in check.rows] == ["", "wrong", "RuntimeError", ""]
    assert found["ms"] == min(row["ms"] for row in timed)
    assert found["picked_ms"] == timed[0]["ms"]


@pytest.mark.parametrize(("codes", "group"), [("int4", 64), ("nf4", 64), ("aqlm-2x8", 192)])
def test_tiles_are_picked_and_launched_as_a_layer_does(codes, group, tmp_path, monkeypatch):
    """A tile timed for other codes than the case's would agree with every other such tile."""
    pick, launch, picks, launches = tiles.pick, qmm.launch, [], []

    def picking(*arguments, **keywords):
        bound = inspect.signature(pick).bind(*arguments, **keywords)
        bound.apply_defaults()
        picks.append(bound.arguments)
        return pick(*arguments, **keywords)

    def launching(*arguments, **keywords):
        bound = inspect.signature(launch).bind(*arguments, **keywords)
        bound.apply_defaults()
        launches.append({name: value for name, value in bound.arguments.items() if not torch.is_tensor(value)})
        launch(*arguments, **keywords)

    monkeypatch.setattr(tiles, "pick", picking)
    monkeypatch.setattr(qmm, "launch", launching)
    monkeypatch.setattr(gpu_check, "neighbours", lambda tile: [])
    monkeypatch.setattr("qzo.bench.timing.cache_bytes", lambda device: 1)
    case = cases.Case("linear", "smollm2-135m", 192, 64, 1, group, "float32", codes=codes)
    times, _ = gpu_check._tiles_of(gpu_check.Check(tmp_path / "out.jsonl", 600, device="cpu"), case)
    assert len(times) == 1
    tiled = launches[0]
    problem = Problem(case, "cpu", 1)
    model, _ = problem.model()
    with ops.backend("triton"), evaluating(model, qzo.Evaluations([7, 7], [0.01, -0.01])):
        model[0](problem.x[192])
    assert picks[0] == picks[-1]
    assert tiled == launches[-1]
    assert tiled["table"] == case.form.table


def test_the_cases_that_are_named_are_there():
    names = [c.name for c in cases.every("cuda")]
    found = [next(name for name in names if text in name) for text in (*gpu_check.CASES, *gpu_check.TILES)]
    pairs = {name.removesuffix(" nf4") for name in found[:len(gpu_check.CASES)] if name.endswith(" nf4")}
    assert {name.split(" rows ")[1].split()[0] for name in pairs} == {"1", "16"}
    assert pairs < set(found)
    assert [name.rpartition("rademacher")[2] for name in found[-2:]] == [" nf4", " aqlm 2x8"]
    assert {name.rpartition("rademacher ")[2] for name in found} >= {"nf4", "aqlm 2x8", "aqlm 1x16"}


def test_neighbours_differ_in_one_thing():
    tile = Tile(64, 128, 8, 3, deep=True, splits=2)
    found = gpu_check.neighbours(tile)
    assert len(found) == 10
    for other in found:
        assert sum(a != b for a, b in zip(vars(tile).values(), vars(other).values(), strict=True)) == 1
    assert gpu_check.neighbours(Tile(16, 32, 4, 2)) != []
    assert all(t.rows >= 16 and t.outputs >= 32 for t in gpu_check.neighbours(Tile(16, 32, 4, 2)))
