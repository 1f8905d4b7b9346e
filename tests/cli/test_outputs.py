"""Nothing of the user's is overwritten: every command that writes refuses before it loads anything."""

import json
import os

import pytest

from qzo.cli.main import main
from qzo.optim.journal import Journal
from tests.support import tiny

WRITING = {  # command: what stands in the way, arguments with OUT for the place; the model is not there: nothing loads
    "train": ("run.json", "train no-model --data no-data --output-dir OUT"),
    "demo": ("notes.txt", "demo --output-dir OUT"),
    "replay": ("config.json", "replay no-model no-journal --output-dir OUT"),
    "export": ("model.safetensors", "export no-model --to gptq --output-dir OUT"),
    "quantize": ("README.md", "quantize no-model --output-dir OUT"),
}
FILES = {
    "export to a file": "export no-model --to gguf --output-dir OUT.gguf",
    "memory --plot": "memory --config smollm2 --plot OUT.png",
    "bench --out": "bench run --out OUT.jsonl",
    "bench plot": "bench plot rows.jsonl --out OUT.png",
}


@pytest.mark.parametrize("command", WRITING)
def test_a_folder_that_holds_something(command, tmp_path, capsys):
    name, line = WRITING[command]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text("mine")
    assert main(line.replace("OUT", str(mine)).split()) == 2
    said = capsys.readouterr().err
    assert said == (
        f"qzo {command}: --output-dir {mine} holds {name} already, and existing files are not overwritten; name "
        "another folder, or add --overwrite to replace files of the same names\n"
    )
    assert [path.name for path in mine.iterdir()] == [name]
    assert (mine / name).read_text() == "mine"


@pytest.mark.parametrize("command", WRITING)
def test_a_file_where_a_folder_is_wanted(command, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert main(WRITING[command][1].replace("OUT", str(tmp_path / "mine")).split()) == 2
    assert "mine is a file; name a folder" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_there(case, tmp_path, capsys):
    line = FILES[case].replace("OUT", str(tmp_path / "mine"))
    [target] = [word for word in line.split() if word.startswith(str(tmp_path))]
    (tmp_path / target).write_text("mine")
    assert main(line.split()) == 2
    assert "exists already; name another file, or add --overwrite" in capsys.readouterr().err
    assert (tmp_path / target).read_text() == "mine"


def test_a_file_in_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["memory", "--config", "smollm2", "--plot", str(tmp_path / "none" / "a.png")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("base"))


def arguments(base, tmp_path, *more):
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.RECORDS)
    given = ["--data", data, "--output-dir", tmp_path / "out", "--max-steps", 2, "--group-size", 32, *more]
    return ["train", str(base), *map(str, given)]


def test_a_run_begins_once_and_goes_on_when_asked(base, tmp_path, capsys):
    assert main(arguments(base, tmp_path, "--resume")) == 2
    assert "journal.qzo to go on with; leave --resume out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(arguments(base, tmp_path)) == 0
    journal = (tmp_path / "out/journal.qzo").read_bytes()
    for more in ((), ("--overwrite",)):
        assert main(arguments(base, tmp_path, *more)) == 2
        assert "holds a journal of 2 steps already; continue it with --resume" in capsys.readouterr().err
    assert (tmp_path / "out/journal.qzo").read_bytes() == journal
    assert main(arguments(base, tmp_path, "--resume")) == 0
    assert (tmp_path / "out/journal.qzo").read_bytes() == journal


def test_overwrite_replaces_files_of_the_same_names_and_no_other(base, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("old")
    (out / "notes.txt").write_text("mine")
    assert main(arguments(base, tmp_path, "--overwrite")) == 0
    run = json.loads((out / "run.json").read_text())
    assert run["steps"] == 2
    assert set(run["versions"]) == {"qzo", "torch", "transformers", "python"}
    assert (out / "notes.txt").read_text() == "mine"


def test_a_model_that_got_worse_is_said(base, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    tiny.write_jsonl(folder / "train.jsonl", tiny.RECORDS)
    tiny.write_jsonl(folder / "valid.jsonl", [record | {"label": 1 - record["label"]} for record in tiny.RECORDS])
    given = ["--data", folder, "--output-dir", tmp_path / "out", "--max-steps", 30, "--group-size", 32]
    assert main(["train", str(base), *map(str, given)]) == 0
    assert "warning: the run has made the model worse on valid: loss" in capsys.readouterr().err


def test_a_run_that_another_process_goes_on_with(tmp_path, capsys):
    journal = Journal.create(tmp_path / "journal.qzo", {"directions": 1})
    for command in (["train", "no-model", "--data", "no-data"], ["demo"]):
        assert main([*command, "--output-dir", str(tmp_path), "--resume"]) == 2
        said = capsys.readouterr().err
        assert f"qzo {command[0]}: {tmp_path}/journal.qzo is in use by process {os.getpid()}, this one: " in said
        assert said.count("\n") == 1
    journal.close()
