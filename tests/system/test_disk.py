"""A full disk: the path and what is true of the command are told. /dev/full stands for it where a file is written."""

import errno
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
from safetensors import SafetensorError

import qzo
from qzo.checkpoints.formats import files
from qzo.cli.main import main
from qzo.system import disk
from qzo.system.disk import line_of
from tests.support import tiny
from tests.support.journals import read_whole

DEVICE = ["--group-size", "32", "--device", "cpu"]


@pytest.fixture
def base(tmp_path):
    return tiny.save_checkpoint(tmp_path / "base")


@pytest.fixture
def full_weights(monkeypatch):
    """Every new folder's model.safetensors is on a full disk."""
    made, make = [], files.tempfile.mkdtemp

    def staging(**options):
        folder = Path(make(**options))
        (folder / "model.safetensors").symlink_to("/dev/full")
        made.append(folder)
        return folder

    monkeypatch.setattr(files.tempfile, "mkdtemp", staging)
    return made


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def train(base, out, *more):
    data = tiny.write_jsonl(base.parent / "t.jsonl", tiny.RECORDS)
    return [
        "train",
        "--model",
        str(base),
        "--data",
        str(data),
        "--output-dir",
        str(out),
        "--max-steps",
        "3",
        "--batch-size",
        "2",
        *DEVICE,
        *more,
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "x"), errno.EDQUOT),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("Disk quota exceeded (os error 122)"), errno.EDQUOT),
        (OSError(errno.EIO, "x"), None),
        (ValueError("28"), None),
        (OSError("x"), None),
    ],
)
def test_who_says_that_a_disk_is_full(error, code):
    assert disk.full(error) == code


@pytest.mark.parametrize(
    ("error", "path"),
    [
        (OSError(errno.ENOSPC, "x"), "/out"),
        (OSError(errno.ENOSPC, "x", "/out/.qzo-1/a"), "/out"),
        (OSError(errno.EDQUOT, "x", "/source/a", None, "/out/a"), "/out"),
        (OSError(errno.ENOSPC, "x", "/cache/a"), "/cache/a"),
        (OSError(errno.EIO, "x"), "/out"),
        (OSError(errno.EIO, "x", "/a"), "/a"),
        (SafetensorError("(os error 28)"), "/out"),
    ],
)
def test_which_path_it_is(error, path):
    with pytest.raises(OSError, match=path) as caught, disk.naming("/out"):
        raise error
    assert caught.value.filename == path
    assert caught.value.errno == (disk.full(error) or errno.EIO)


def test_other_errors_stay():
    with pytest.raises(ValueError, match="mine"), disk.naming("/out"):
        raise ValueError("mine")
    with pytest.raises(OSError, match=r"^mine$"), disk.naming("/out"):
        raise OSError("mine")


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_a_folder_that_cannot_be_written(base, tmp_path, full_weights, capsys, command):
    out = tmp_path / "new/q"
    options = ["--to", "gptq", *DEVICE] if command == "export" else ["--group-size", "32"]
    assert main([command, str(base), "--output-dir", str(out), *options]) == 1
    assert last_line(capsys) == (
        f"qzo {command}: no space left on the disk ({out}); nothing was changed there: free "
        "space, or name an --output-dir elsewhere, and run it again"
    )
    assert len(full_weights) == 1
    assert not (tmp_path / "new").exists()


def test_a_tool_that_writes_in_rust(base, tmp_path):
    """Its own exception becomes an OSError of the folder."""
    with pytest.raises(OSError, match="No space left on device") as caught, files.staged(tmp_path / "out"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert caught.value.filename == str(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def fail_sync(monkeypatch, number, code):
    """Let the sync of this number fail: the journal's header, its folder, the empty metrics, their folder, steps."""
    sync, calls = os.fsync, []

    def fail(handle):
        calls.append(handle)
        if len(calls) == number:
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("begun", [False, True])
def test_training_before_its_first_step(base, tmp_path, capsys, monkeypatch, begun):
    out = tmp_path / "o"
    fail_sync(monkeypatch, 3 if begun else 1, errno.ENOSPC)
    assert main(train(base, out)) == 1
    line = last_line(capsys)
    assert line.startswith(f"qzo train: no space left on the disk ({out}")
    assert "no step is saved yet: free space" in line
    assert ("--resume" in line) == (out / "journal.qzo").exists() == begun
    monkeypatch.undo()
    assert main(train(base, out, *["--resume"] * begun)) == 0  # what the line says is true


def test_training_after_its_steps(base, tmp_path, full_weights, capsys, monkeypatch):
    out = tmp_path / "o"
    assert main(train(base, out)) == 1
    assert last_line(capsys) == (
        f"qzo train: no space left on the disk ({out / 'model'}); 3 steps are saved: free "
        f"space, then the same command with --output-dir {out} --resume"
    )
    assert main(["replay", str(base), str(out / "journal.qzo"), "--output-dir", str(tmp_path / "r"), *DEVICE]) == 1
    assert "--resume" not in last_line(capsys)
    monkeypatch.undo()
    assert main(train(base, out, "--resume")) == 0
    assert qzo.from_pretrained(out / "model", device="cpu")


def test_a_step_that_the_journal_cannot_hold(base, tmp_path, capsys, monkeypatch):
    """What the disk did not take is cut off, though it could be read: it may be lost with the next power failure."""
    fail_sync(monkeypatch, 6, errno.EDQUOT)
    assert main(train(base, tmp_path / "o", "--journal-fsync", "0")) == 1
    line = last_line(capsys)
    assert line.startswith(f"qzo train: disk quota exceeded ({tmp_path / 'o'}); ")
    saved = len(read_whole(tmp_path / "o/journal.qzo")[1])
    assert saved == 1
    assert f"; {saved} step" in line
    assert "--resume" in line


def test_a_configuration_file_names_the_folder(base, tmp_path, capsys, full_weights):
    data = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.RECORDS)
    config = tmp_path / "c.json"
    config.write_text(
        json.dumps(
            {
                "model": str(base),
                "data": str(data),
                "output_dir": str(tmp_path / "o"),
                "max_steps": 1,
                "batch_size": 2,
                "group_size": 32,
                "device": "cpu",
            }
        )
    )
    assert main(["train", "--config", str(config)]) == 1
    assert f"1 step is saved: free space, then the same command with --output-dir {tmp_path / 'o'}" in last_line(capsys)


def test_a_download_that_does_not_fit(tmp_path, capsys, monkeypatch):
    """It is no missing name, and not the output's disk."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qzo.checkpoints.source.snapshot_download", full)
    assert main(["quantize", "some/model", "--output-dir", str(tmp_path / "q")]) == 1
    line = last_line(capsys)
    assert line.startswith(f"qzo quantize: no space left on the disk ({huggingface_hub.constants.HF_HUB_CACHE}); ")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.EROFS, "its file system is read-only; give another path"),
        (errno.EACCES, "permission denied; give another path, or change its owner"),
    ],
)
@pytest.mark.parametrize("command", ["train", "replay", "export", "quantize"])
def test_a_folder_that_is_closed(base, tmp_path, capsys, monkeypatch, command, code, reason):
    """Read-only: the path, and status 2. Nothing else is written."""
    journal, closed = tmp_path / "o/journal.qzo", tmp_path / "closed"
    if command == "replay":
        assert main(train(base, tmp_path / "o")) == 0
    commands = {
        "train": train(base, closed / "new"),
        "replay": ["replay", str(base), str(journal), *DEVICE],
        "export": ["export", str(base), "--to", "gptq", *DEVICE],
        "quantize": ["quantize", str(base)],
    }
    make = Path.mkdir

    def refuse(path, *given, **options):
        if path.is_relative_to(closed):
            raise OSError(code, os.strerror(code), str(path))
        make(path, *given, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    out = [] if command == "train" else ["--output-dir", str(closed / "new")]
    assert main([*commands[command], *out]) == 2
    assert last_line(capsys) == f"qzo {command}: {closed / 'new'}: {reason}"
    assert not closed.exists()


def test_a_path_that_is_no_folder(base, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out, reason in {
        "file": "is a file; name a folder",
        "file/o": "a part of this path is a file",
        "loop": "it exists and is not a folder",
        "x" * 300: "a name in this path is too long",
    }.items():
        assert main(train(base, tmp_path / out)) == 2
        line = last_line(capsys)
        assert str(tmp_path / out) in line
        assert reason in line
    assert main(["replay", str(base), str(tmp_path), "--output-dir", str(tmp_path / "r")]) == 2
    assert last_line(capsys) == f"qzo replay: {tmp_path} is a folder; a run's journal is OUT/journal.qzo"
    assert (tmp_path / "file").read_text() == "x"


def test_what_is_said_of_an_error_is_one_line_without_codes_of_a_terminal(tmp_path):
    assert line_of(ValueError("a\n  b\tc")) == "a b c"
    assert line_of(ValueError("\x1b[2Jgone \ud800 \x07 é")) == r"\x1b[2Jgone \ud800 \x07 é"
    assert line_of(FileNotFoundError(errno.ENOENT, "", str(tmp_path / "x"))).endswith("; give another path")
