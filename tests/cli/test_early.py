"""What can be known before a model is loaded is said before, and nothing is left behind."""

import os
import subprocess
import sys

import pytest

from qzo.cli import common, early
from qzo.cli.main import main, parse
from qzo.training.task import Task
from tests.support import tiny
from tests.support.checkpoints import TYPES, write_gguf
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with base (float), w4 (the same in 4 bits), m.gguf, data.jsonl, run (two steps on w4), a file."""
    folder = tmp_path_factory.mktemp("early")
    tiny.save_checkpoint(folder / "base")
    tiny.write_jsonl(folder / "data.jsonl", tiny.RECORDS)
    (folder / "file").write_text("x")
    write_gguf(folder / "m.gguf", TYPES.Q4_0)
    (folder / "bare").mkdir()
    (folder / "bare/config.json").write_bytes((folder / "base/config.json").read_bytes())
    line = f"quantize {folder}/base --output-dir {folder}/w4 --group-size 32"
    assert main(line.split()) == 0
    line = f"train {folder}/w4 --data {folder}/data.jsonl --output-dir {folder}/run --max-steps 2 --directions 1"
    assert main(line.split()) == 0
    return folder


REFUSED = {
    "train w4 --data data.jsonl --output-dir o --batch-size 400": "batch_size=400, but there are 24 training examples",
    "train w4 --data data.jsonl --output-dir o --group-size 0": "group_size=0: use one of 32, 64, 128, or -1",
    "train w4 --data data.jsonl --output-dir o --parallel both": "parallel='both': expected data, directions, tensor,",
    "train w4 --data data.jsonl --output-dir o --parallel 2x2": "--parallel 2x2 divides steps among ranks, and this",
    "train w4 --data data.jsonl --output-dir file/x": "--output-dir file/x: a part of this path is a file (file)",
    "train run/model --data data.jsonl --output-dir run --overwrite": "--output-dir run/model is where the model is",
    "train w4 --data data.jsonl --output-dir run --resume --max-steps 1": "max_steps=1: run/journal.qzo has 2 steps",
    "train bare --data data.jsonl --output-dir o": "bare holds a config.json and no weights",
    "replay w4 run/journal.qzo --output-dir w4 --overwrite": "--output-dir w4 is where the model is; the source is",
    "export w4 --to gptq --output-dir w4 --overwrite": "--output-dir w4 is where the model is; the source is never",
    "export w4 --to gguf --output-dir o": "needs a model that was loaded from a GGUF file",
    "export w4 --to bitsandbytes --output-dir o": "bitsandbytes holds codes of the tables nf4 and fp4 only",
    "eval w4 --data data.jsonl --group-size 7": "group_size=7: use one of",
    "quantize base --output-dir base --overwrite": "--output-dir base is where the model is",
    "quantize base --output-dir o --group-size 96": "group_size=96: use one of 32, 64, 128, or -1",
    "quantize base --output-dir o --bits 3": "bits=3: codes have 2, 4, 8 bits",
    "inspect w4 --bits 5": "bits=5: codes have 2, 4, 8 bits",
    "export m.gguf --to gguf --output-dir m.gguf --overwrite": "--output-dir m.gguf is where the model is",
    "quantize base --output-dir o --table nf4 --asymmetric": "a table's codes have 4 bits and no zero points",
}


def test_auto_resume_goes_on_where_there_is_a_journal_and_else_begins(files, tmp_path):
    """The same command both times; a folder that holds something else is refused as ever."""
    for folder, goes_on in ((files / "run", True), (tmp_path / "new", False)):
        options = parse(f"train w4 --data data.jsonl --output-dir {folder} --auto-resume".split())
        early.check(options)
        assert bool(options.resume) is goes_on
    (tmp_path / "other").write_text("x")
    with pytest.raises(FileExistsError, match="holds other already"):
        early.check(parse(f"train w4 --data data.jsonl --output-dir {tmp_path} --auto-resume".split()))


@pytest.mark.parametrize("line", REFUSED)
def test_refused_before_a_model_is_loaded(line, files, monkeypatch, capsys):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    if "bare" not in line:  # which only the loader can tell
        monkeypatch.setattr(common, "from_pretrained", load)
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    assert main(line.split()) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"qzo {line.split()[0]}: ")
    assert REFUSED[line] in said
    assert sorted(files.rglob("*")) == before


def test_a_folder_that_cannot_be_written(files, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("qzo.cli.outputs.os.access", lambda path, mode: asked.append((path, mode)))  # root may all
    assert main(["quantize", str(files / "base"), "--output-dir", str(tmp_path / "a/b")]) == 2
    assert f"--output-dir {tmp_path}/a/b: {tmp_path} cannot be written to" in capsys.readouterr().err
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_a_run_that_cannot_begin_leaves_no_folder(files, monkeypatch, capsys):
    """Found out when the model is there."""

    def settle(task):
        raise ValueError("it cannot")

    monkeypatch.chdir(files)
    monkeypatch.setattr(Task, "settle", settle)
    monkeypatch.setattr("qzo.cli.train.show_plan", lambda *_: None)
    assert main(["train", "w4", "--data", "data.jsonl", "--output-dir", "o"]) == 2
    assert "qzo train: it cannot" in capsys.readouterr().err
    assert not (files / "o").exists()


@pytest.mark.parametrize("command", ["train", "quantize"])
def test_strict_refuses_groups_that_do_not_fit(command, files, tmp_path, capsys):
    more = ["--data", str(files / "data.jsonl"), "--max-steps", "1"] if command == "train" else []
    line = [command, str(files / "base"), "--group-size", "128", "--output-dir", str(tmp_path / "o"), *more]
    assert main([*line, "--strict"]) == 2
    said = capsys.readouterr().err
    assert "group_size=128 does not divide in_features=64" in said
    assert not (tmp_path / "o").exists()
    assert main(line) == 0
    assert "warning: group_size=128 does not divide" in capsys.readouterr().err


def shell(folder, *line):
    """(exit status, standard error, whether torch was imported) of a command in a process of its own."""
    start = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom qzo.cli.main import main\n"
    code = f"status = main({list(line)!r})\nprint(status, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", start + code], cwd=folder, capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout.split("\n")[-2], done.stderr.splitlines()


def test_places_are_refused_without_torch(files):
    for line in (
        "train w4 --data data.jsonl --output-dir run",
        "export m.gguf --to gptq --output-dir w4",
        "demo --output-dir file",
        "demo --resume",
        "replay w4 run/journal.qzo --output-dir run",
    ):
        said, errors = shell(files, *line.split())
        assert said == "2 False", line
        assert len(errors) == 1
        assert errors[0].startswith(f"qzo {line.split()[0]}: ")


def test_the_model_is_named_before_torch_is_imported(files, monkeypatch, capsys):
    options = parse(["eval", str(files / "w4"), "--data", "d"])
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        early.announce(options)
        early.announce(parse(["eval", str(files / "none"), "--data", "d"]))
        early.announce(parse(["demo"]))
    early.announce(options)  # then the loader says it at once
    assert capsys.readouterr().err == f"qzo eval: {files}/w4\nqzo demo: SmolLM2-135M on BBC headlines\n"
    (files / "large").write_bytes(bytes(12_000_000))
    assert early.size_of(files / "large") == ", 0.01 GB"
    said, errors = shell(files, "eval", "w4", "--data", "none")
    assert (said, errors[0]) == ("2 True", "qzo eval: w4")
