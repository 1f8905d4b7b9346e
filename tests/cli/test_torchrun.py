"""`qzo train` under torchrun: one command, whose ranks may die; the bits of one process."""

import json
import subprocess
import sys

import pytest

import qzo
from qzo.cli.main import main
from qzo.nn.layers import arena_of
from tests.support import elastic, tiny
from tests.support.journals import read_whole
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    tiny.save_checkpoint(folder / "llama")
    tiny.write_jsonl(folder / "train.jsonl", tiny.RECORDS)
    return folder


def started(folder, *command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_run_whose_ranks_were_killed_twice_ends_in_the_bits_of_the_unbroken_run(folder):
    """200 steps on 4 ranks; one process makes the unbroken run."""
    where = [str(folder / name) for name in ("llama", "train.jsonl", "out")]
    started(folder, "tests.support.elastic", "4", *where)
    assert all((folder / f"out-killed-{step}").exists() for _, step in elastic.KILLS)
    header, steps, _ = read_whole(folder / "out" / "journal.qzo")
    _, alone, _ = read_whole(folder / "out-alone" / "journal.qzo")
    assert (header["recipe"]["ranks"], len(steps)) == (4, 200)
    assert steps == alone
    assert len({(folder / out / "model/model.safetensors").read_bytes() for out in ("out", "out-alone")}) == 1
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(200)]


def test_the_command_line_of_two_ranks(folder):
    """Validation, the best step and JSON; the first rank alone tells."""
    for split in ("train", "valid"):
        tiny.write_jsonl(folder / f"{split}.jsonl", tiny.RECORDS)
    options = ["--data", str(folder), "--group-size", "32", "--max-steps", "6", "--batch-size", "5", "--keep", "best"]
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qzo")
    command = ["train", str(folder / "llama"), *options, "--output-dir"]
    done = started(folder, *launcher, *command, str(folder / "two"), "--parallel", "directions", "--json")
    [line] = done.stdout.splitlines()
    assert json.loads(line)["steps"] == 6
    assert done.stderr.count(f"loading {folder}") == 1
    assert main([*command, str(folder / "one")]) == 0
    assert read_whole(folder / "two/journal.qzo")[1] == read_whole(folder / "one/journal.qzo")[1]
    models = [qzo.from_pretrained(folder / name / "model", device="cpu") for name in ("one", "two")]
    assert arena_of(models[0]).data.equal(arena_of(models[1]).data)


def test_ranks_without_a_launcher_are_refused(folder, capsys):
    command = ["train", str(folder / "llama"), "--data", str(folder / "train.jsonl"), "--output-dir", str(folder / "x")]
    assert main([*command, "--parallel", "data"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "this process was not started as one" in said
    assert "torchrun --nproc-per-node N -m qzo train" in said
    assert not (folder / "x").exists()
