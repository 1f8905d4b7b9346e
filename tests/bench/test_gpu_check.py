"""bench/gpu_check.py without a GPU: it says so; its parts run on a CPU at small sizes, in the interpreter."""

import functools
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import qzo
from qzo.bench import (
    cases,
    gpu_check,
    gpu_diffusion,
    gpu_e2e,
    gpu_parts,
    gpu_steps,
    gpu_warm,
    providers,
    readme,
    results,
    timing,
)
from qzo.bench.providers import Built, Problem, Provider
from qzo.kernels import tiles
from qzo.kernels.tiles import Tile
from qzo.nn import ops
from qzo.nn.layers import evaluating, layers
from qzo.reports import models
from tests.support.close import assert_same_bits
from tests.support.paths import ROOT


@pytest.mark.parametrize("command", [["bench/gpu_check.py"], ["-m", "qzo.bench.gpu_check"]])
def test_without_a_gpu_it_says_so_and_exits_2(command, tmp_path):
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path / "out.jsonl")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 2
    assert "no CUDA or ROCm device" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 64,
            }
        )
    )
    return str(path)


@pytest.fixture
def small(monkeypatch, config):
    """Parts of a size for a CPU."""
    monkeypatch.setattr(gpu_parts, "MEMORY", ((config, 2, 16),))
    monkeypatch.setattr(gpu_parts, "CASES", ("576x192 rows 16 g64 float32 rademacher", "journal"))
    monkeypatch.setattr(gpu_parts, "TILES", ())
    monkeypatch.setattr(gpu_steps, "CONFIG", config)
    monkeypatch.setattr(gpu_steps, "SIZES", ((1, 8), (16, 8)))
    monkeypatch.setattr(timing, "roof", lambda device, dtype: timing.Roof(10.0, 5.0, 0.1))
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)


def test_its_parts_run_and_one_that_breaks_is_a_row(tmp_path, monkeypatch, small, config):
    def breaks(check):
        raise RuntimeError("no  luck")

    monkeypatch.setattr(gpu_parts, "tests", breaks)
    check = gpu_check.Check(tmp_path / "out.jsonl", 200, device="cpu")
    gpu_check.run(check, ["tests", "memory", "bench", "tiles"], warm=False)
    rows = results.read(check.out)
    assert rows == check.rows
    by_case = {row["case"]: row for row in rows}
    assert by_case["tests"]["note"] == "failed: RuntimeError: no luck"
    assert by_case[f"{config} 2 x 16"]["measured"]["total"] > 0
    assert by_case["linear smollm2-135m 576x192 rows 16 g64 float32 rademacher"]["case"]
    assert {row["provider"] for row in rows if row["kind"] == "linear"} > {"qzo", "official", "mezo", "gemlite"}
    assert [row["part"] for row in rows][:2] == ["tests", "memory"]


def test_whole_steps_stand_beside_the_rivals(tmp_path, small, config):
    check = gpu_check.Check(tmp_path / "out.jsonl", 300, device="cpu")
    gpu_check.run(check, ["steps"], warm=False)
    found = {(r["provider"], r["mode"], r["rows"]): r for r in check.rows}
    names = ("qzo", "dense, two forwards", "official", "mezo")
    assert set(found) == {(name, mode, rows) for name in names for mode in timing.MODES for rows in (1, 16)} | {
        ("qlora", "eager", rows) for rows in (1, 16)
    }
    for (name, mode, _), row in found.items():
        if name == "qlora":
            assert row["ms"] or row["note"] == "not there: peft and bitsandbytes not installed"
        elif mode == "eager":
            assert row["p20"] <= row["ms"] <= row["p80"]
            assert row["ratio"] == row["ms"] / found["qzo", "eager", row["rows"]]["ms"]
        else:
            assert (row["ms"], row["ratio"]) == (None, None)
            assert "graph" in row["note"]
    assert f"| whole step {config} 16 x 8 | " in readme.ratio_table(results.read(check.out))


def test_the_official_loop_and_mezo_are_steps_of_the_whole_model(config, monkeypatch):
    """Four sweeps over all that they train and two forwards with a loss; the official model is the quantized one."""
    monkeypatch.setattr(gpu_steps, "CONFIG", config)
    check = SimpleNamespace(device="cpu", dtype=torch.float32)
    ours, theirs, dense = gpu_steps._qzo_model(check), gpu_steps._official_model(check), gpu_steps._dense_model(check)
    batch = gpu_steps.batch_of(ours, 2, 8, "cpu")
    with torch.no_grad():
        want, got = models.batch_losses(ours, batch, 1), models.batch_losses(theirs, batch, 1)
    assert want.item() == pytest.approx(got.item(), rel=1e-3)  # float16 scales
    for model, prepare, trained in (
        (theirs, gpu_steps._official, len(layers(ours))),
        (dense, gpu_steps._mezo, len(list(dense.parameters()))),
    ):
        swept: list[object] = []
        forwards: list[int] = []

        def forward(*given, forwards=forwards):
            forwards.append(1)
            return torch.zeros(1)

        with monkeypatch.context() as patch:
            patch.setattr(providers, "sweep", lambda some, factor, generator, swept=swept: swept.append(len(some)))
            patch.setattr(models, "batch_losses", forward)
            prepare(model, batch, "eager")[0]()
        assert swept == [trained] * 4
        assert len(forwards) == 2


def test_steps_of_a_diffusion_transformer_are_measured(tmp_path, monkeypatch):
    """Stable Diffusion 3.5's shapes with two blocks of four heads, on a CPU: every field is there."""
    pytest.importorskip("diffusers")
    small = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "dual_attention_layers": []}
    config = models.read_config(gpu_diffusion.CONFIG) | small
    monkeypatch.setattr(models, "read_config", lambda name: dict(config))
    monkeypatch.setattr(gpu_diffusion, "SIZES", ((64, 2),))
    check = gpu_check.Check(tmp_path / "out.jsonl", 300, device="cpu")
    gpu_check.run(check, ["diffusion"], warm=False)
    [row] = check.rows
    assert row["measured"]["total"] > 0
    assert row["predicted"]["total"] > 0
    assert row["ms"] > 0
    assert 0 < row["modulations"] < 1
    assert "of what was predicted; modulations" in row["note"]


def test_a_part_that_is_run_again_replaces_its_rows_only(tmp_path, monkeypatch):
    def once(check):
        check.note("tests", "GPU tests", note=said)

    out, said = tmp_path / "out.jsonl", "first"
    monkeypatch.setattr(gpu_parts, "tests", once)
    monkeypatch.setattr(gpu_parts, "memory", once)
    gpu_check.run(gpu_check.Check(out, 100, device="cpu"), ["tests", "memory"], warm=False)
    said = "second"
    gpu_check.run(gpu_check.Check(out, 100, device="cpu"), ["memory"], warm=False)
    assert [(row["part"], row["note"]) for row in results.read(out)] == [("tests", "first"), ("memory", "second")]
    row = results.read(out)[0] | {"device": "another GPU"}
    out.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"holds results of another GPU, this is .*: give another --out"):
        gpu_check.Check(out, 100, device="cpu")


def test_calls_hold_every_part_and_end_in_six_minutes():
    assert sorted(gpu_check.parts()) == sorted(sum(gpu_check.CALLS.values(), ()))
    assert gpu_check.SECONDS < 360
    for call in gpu_check.CALLS.values():
        assert sum(gpu_check.SHARES[name] for name in ("warm", *call)) <= 350


def test_what_no_time_is_left_for_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "CASES", ("576x192 rows 16 g64 float32 rademacher",))
    monkeypatch.setattr(gpu_e2e.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    check = gpu_check.Check(tmp_path / "out.jsonl", 0, device="cpu")
    gpu_check.run(check, ["memory", "bench", "steps", "e2e"], warm=False)
    assert {row["note"] for row in check.rows if "not there" not in row["note"]} == {"no time left"}
    assert sum(row["kind"] == "memory" for row in check.rows) == len(gpu_parts.MEMORY)
    assert sum(row["part"] == "steps" for row in check.rows) == 2 * (2 * 4 + 1)
    assert sum(row["case"].startswith("folder ") for row in check.rows) == 14
    assert check.rows[-1]["case"] == "the command line"


# ------------------------------------------------------------------------------------------------ compiled ahead


def test_the_jobs_are_all_that_is_timed():
    found = gpu_warm.jobs("cuda", ["tests", "steps", "bench", "e2e", "tiles", "memory"])
    kinds = [job[0] for job in found]
    assert kinds.count("case") == len(gpu_parts.CASES)
    assert kinds.count("tiles") == gpu_warm.TILE_JOBS * len(gpu_parts.TILES)
    steps = {(gpu_steps.CONFIG, *size) for size in gpu_steps.SIZES}
    assert {tuple(job[1:]) for job in found if job[0] == "step"} == steps | set(gpu_parts.MEMORY)
    assert len({json.dumps(job) for job in found}) == len(found)
    assert gpu_warm.jobs("cuda", ["tests", "e2e"]) == []


def test_jobs_run_in_processes_and_those_that_fail_are_named(tmp_path, config):
    check = gpu_check.Check(tmp_path / "out.jsonl", 200, device="cpu")
    check.share_ends = check.ends
    gpu_warm.warm(check, [["case", "nowhere"], ["step", config, 1, 8]], processes=1)
    [row] = check.rows
    assert row["case"] == "2 jobs in 1 processes"
    assert "1 failed: case nowhere: StopIteration" in row["note"]
    assert len(row["failed"]) == 1


def test_a_job_of_tiles_launches_its_part_of_them(monkeypatch):
    launched: list[Tile] = []
    tiles_ = [Tile(16, 32 * i, 4, 2) for i in (1, 2, 4, 8)]
    monkeypatch.setattr(gpu_parts, "named", lambda device, name: name)
    monkeypatch.setattr(gpu_parts, "launcher", lambda case, device, least: (launched.append, 1, tiles_[0]))
    monkeypatch.setattr(gpu_parts, "neighbours", lambda tile: tiles_[1:])
    for number in range(gpu_warm.TILE_JOBS):
        gpu_warm.run("cpu", ["tiles", "a case", number])
    assert sorted(launched, key=lambda t: t.outputs) == tiles_


def test_a_job_of_a_case_runs_what_is_timed(small, monkeypatch):
    ran = []
    made = Built(lambda part=None: ran.append("run"), 1, None)
    monkeypatch.setattr("qzo.bench.run.PROVIDERS", (Provider("qzo", lambda problem: made),))
    gpu_warm.run("cpu", ["case", cases.every("cpu")[0].name])
    assert ran == ["run"]


# ------------------------------------------------------------------------------------------------ tiles


def test_tiles_are_checked_timed_and_the_fastest_is_named(tmp_path, monkeypatch):
    wrong, refused, idle = Tile(16, 32, 4, 1), Tile(32, 32, 4, 1), Tile(64, 32, 4, 1)
    neighbours, fill = gpu_parts.neighbours, ops._Fused.__call__

    def faulty(self, x, weight, perturbation, y):
        tile = ops._choice.get().tile
        if tile == refused:
            raise RuntimeError("out of resources")
        y.fill_(torch.nan)
        if tile == idle:  # writes nothing: the last tile's product may not pass for its own
            return
        fill(self, x, weight, perturbation, y)
        if tile == wrong:
            y.view(-1)[7] = torch.nan

    def clock(run, device, mode, passes):
        def turn():
            begun = time.perf_counter()
            run(slice(None))
            return time.perf_counter() - begun

        return turn

    monkeypatch.setattr(timing, "clock", clock)  # as on a GPU: all weights in each turn
    monkeypatch.setattr(timing, "interleaved", functools.partial(timing.interleaved, least=1))  # a turn takes a second
    monkeypatch.setattr(ops._Fused, "__call__", faulty)
    monkeypatch.setattr(gpu_parts, "TILES", ("smollm2-135m 576x192 rows 1 g64 float32 rademacher",))
    monkeypatch.setattr(gpu_parts, "neighbours", lambda tile: [idle, wrong, refused, *neighbours(tile)[:1]])
    monkeypatch.setattr("qzo.bench.timing.cache_bytes", lambda device: 1)
    check = gpu_check.Check(tmp_path / "out.jsonl", 600, device="cpu")
    gpu_check.run(check, ["tiles"], warm=False)
    [found] = json.loads((tmp_path / "out.tiles.json").read_text()).values()
    timed = [row for row in check.rows if row["ms"]]
    assert [row["note"].partition(":")[0] for row in check.rows] == ["", "wrong", "wrong", "RuntimeError", ""]
    assert found["ms"] == min(row["ms"] for row in timed)
    assert found["picked_ms"] == timed[0]["ms"]


@pytest.mark.parametrize(("codes", "group"), [("int4", 64), ("nf4", 64), ("aqlm-2x8", 192)])
def test_tiles_are_picked_and_launched_as_a_layer_does(codes, group, tmp_path, monkeypatch):
    """A tile timed for other codes than the case's would agree with every other such tile."""
    pick, picks = tiles.pick, []

    def picking(problem):
        picks.append(problem)
        return pick(problem)

    monkeypatch.setattr(tiles, "pick", picking)
    monkeypatch.setattr("qzo.bench.timing.cache_bytes", lambda device: 1)
    case = cases.Case("linear", "smollm2-135m", 192, 64, 1, group, "float32", codes=codes)
    run, _, picked = gpu_parts.launcher(case, "cpu", 1)
    problem = Problem(case, "cpu", 1)
    model, _ = problem.model()
    with ops.backend("triton"), evaluating(model, qzo.Evaluations([7, 7], [0.01, -0.01])):
        y = [layer(problem.x[192]) for layer in model][-1]
    assert picks[0] == picks[-1]
    assert_same_bits(run(picked), y)


def test_the_cases_that_are_named_are_there():
    names = [c.name for c in cases.every("cuda")]
    found = [next(name for name in names if text in name) for text in (*gpu_parts.CASES, *gpu_parts.TILES)]
    pairs = {name.removesuffix(" nf4") for name in found[: len(gpu_parts.CASES)] if name.endswith(" nf4")}
    assert {name.split(" rows ")[1].split()[0] for name in pairs} == {"1", "16"}
    assert pairs < set(found)
    assert [name.rpartition("rademacher")[2] for name in found[-2:]] == [" nf4", " aqlm 2x8"]
    assert {name.rpartition("rademacher ")[2] for name in found} >= {"nf4", "aqlm 2x8", "aqlm 1x16"}


def test_neighbours_differ_in_one_thing():
    tile = Tile(64, 128, 8, 3, deep=True, splits=2)
    found = gpu_parts.neighbours(tile)
    assert len(found) == 10
    for other in found:
        assert sum(a != b for a, b in zip(vars(tile).values(), vars(other).values(), strict=True)) == 1
    assert gpu_parts.neighbours(Tile(16, 32, 4, 2)) != []
    assert all(t.rows >= 16 and t.outputs >= 32 for t in gpu_parts.neighbours(Tile(16, 32, 4, 2)))
