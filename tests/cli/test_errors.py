"""What a command raises, as one line and an exit status; only a fault of our own keeps its traceback."""

import argparse
import errno
import os
import signal

import pytest
import torch

from qzo.cli.errors import full_disk, reporting
from qzo.cli.main import main
from qzo.optim.journal import Journal, JournalError, Record
from qzo.system.ranks import RankLost, RanksDiverged
from qzo.system.stopping import Interrupted, Stopped

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 10.31 GiB "
    "is free. Including non-PyTorch memory, this process has 129.49 GiB memory in use."
)


def told(capsys, error, command="train", line=(), **options):
    """(exit status, what is said) of a command that raises this."""

    def execute(_):
        raise error

    status = reporting(execute, argparse.Namespace(command=command, line=[command, *line], **options))
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.count("\n") == 1
    return status, shown.err.rstrip()


def journal(folder, steps):
    """A run's folder with a journal of so many steps."""
    folder.mkdir(exist_ok=True)
    made = Journal.create(folder / "journal.qzo", {"directions": 1, "arena": {}, "digest": ""})
    for step in range(steps):
        made.append([Record(step, 0, 1, 0.1, 1.0, 0.5, False)])
    made.close()
    return folder


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_that_ends_has_the_status_that_it_returns(capsys, returned, status):
    assert reporting(lambda options: returned, argparse.Namespace(command="eval")) == status
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "kind",
    [
        ValueError,
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
        JournalError,
    ],
)
def test_bad_input_is_status_2(capsys, kind):
    assert told(capsys, kind("what was given,\n   what is wanted")) == (2, "qzo train: what was given, what is wanted")


def test_a_failed_run_is_status_1(capsys):
    error = FloatingPointError("3 steps in a row had a NaN\nor infinite loss")
    assert told(capsys, error) == (1, "qzo train: 3 steps in a row had a NaN or infinite loss")
    assert told(capsys, OSError(errno.EIO, "Input/output error", "/x"), "eval", output_dir=None) == (
        1,
        "qzo eval: [Errno 5] Input/output error: '/x'",
    )


@pytest.mark.parametrize("kind", [RanksDiverged, RankLost])
def test_what_ranks_stop_for_is_one_line_and_status_1(capsys, kind):
    assert told(capsys, kind("after step 4 the scales\nof rank 1")) == (
        1,
        "qzo train: after step 4 the scales of rank 1",
    )


def test_a_path_that_cannot_be_used_is_status_2(capsys):
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/x")
    assert told(capsys, error) == (2, "qzo train: /x: its file system is read-only; give another path")


@pytest.mark.parametrize(
    ("command", "line", "resuming"),
    [
        ("train", ["m", "--data", "my data"], "qzo train m --data 'my data' --resume"),
        ("train", ["m", "--resume", "--seed", "1"], "qzo train m --resume --seed 1"),
        ("demo", [], "qzo demo --output-dir o --resume"),
        ("demo", ["--output-dir=o"], "qzo demo --output-dir=o --resume"),
    ],
)
def test_a_run_that_is_stopped_says_how_to_go_on(capsys, command, line, resuming):
    said = f"qzo: stopped after 7 steps, all of them saved; go on with: {resuming}"
    assert told(capsys, Interrupted(7), command, line, output_dir="o") == (130, said)


@pytest.mark.parametrize(
    ("stop", "status"),
    [(KeyboardInterrupt(), 130), (Stopped(signal.SIGTERM), 143), (Stopped(signal.SIGUSR1), 0)],
    ids=["SIGINT", "SIGTERM", "SIGUSR1"],
)
def test_signals_have_the_status_that_shells_give_them(capsys, tmp_path, stop, status):
    assert told(capsys, stop) == (status, "qzo: stopped outside the training steps")
    out = str(journal(tmp_path / "o", 2))
    assert told(capsys, stop, line=["m"], output_dir=out) == (
        status,
        f"qzo: stopped outside the training steps; {out}/journal.qzo is whole, go on with: qzo train m --resume",
    )
    assert told(capsys, Interrupted(7, status), line=["m"])[0] == status


# ---------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize(
    ("command", "out", "told"),
    [
        ("eval", None, "no space left on the disk (/x): free space, and run it again"),
        (
            "export",
            "/o",
            "no space left on the disk (/x); nothing was changed there: free space, or name an --output-dir",
        ),
        (
            "train",
            None,
            "no space left on the disk (/x); no step is saved yet: free space, or name another --output-dir",
        ),
    ],
)
def test_what_to_do_after_a_command(command, out, told):
    assert full_disk(OSError(errno.ENOSPC, "x", "/x"), command, out).startswith(told)


@pytest.mark.parametrize(
    ("steps", "told"), [(0, "no step is saved yet"), (1, "1 step is saved"), (5, "5 steps are saved")]
)
def test_what_to_do_after_steps(tmp_path, steps, told):
    out = journal(tmp_path / "o", steps)
    assert full_disk(OSError(errno.EDQUOT, "x"), "train", out) == (
        f"disk quota exceeded ({out}); {told}: free space, then the same command with --output-dir {out} --resume"
    )


@pytest.mark.parametrize("content", [b"", b"QZO", b"something else that is no journal"])
def test_a_journal_that_no_run_would_go_on_with_has_no_steps(tmp_path, content):
    (tmp_path / "journal.qzo").write_bytes(content)
    said = full_disk(OSError(errno.ENOSPC, "x"), "demo", tmp_path)
    assert "no step is saved yet: free space, or name another --output-dir, and start again" in said
    assert "--resume" not in said


def test_status_of_a_full_disk_is_1(capsys):
    status, said = told(capsys, OSError(errno.ENOSPC, "x"), output_dir="/o")
    assert status == 1
    assert said.startswith("qzo train: no space left on the disk (/o); no step is saved yet")


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "command",
    [["train", "--model", "m", "--data", "README.md", "--output-dir", "o"], ["memory", "--config", "smollm2"]],
)
def test_out_of_memory_is_one_line_and_status_1(command, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr("qzo.cli.train.read_data", full)
    monkeypatch.setattr("qzo.cli.memory.make_report", full)
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qzo {command[0]}: out of memory: 21.47 GB more were asked for, 11.07 GB free; ")
    assert "--sequential" in said
    assert said.count("\n") == 1


def test_a_fault_stays_a_fault(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a fault")

    monkeypatch.setattr("qzo.cli.memory.make_report", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["memory", "--config", "smollm2"])
