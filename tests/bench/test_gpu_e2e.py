"""gpu_check's end-to-end part on a CPU: what users run, at small sizes, each folder in a process of its own."""

import concurrent.futures
import contextlib
import io
import re
import warnings

import pytest
import torch

from qzo.bench import (
    gpu_check,
    gpu_e2e,
)
from qzo.cli.main import main


def in_this_process(arguments, seconds):
    """What gpu_e2e.qzo_command does, without starting Python."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        try:
            status = main(arguments)
        except SystemExit as stop:
            return stop.code, said.getvalue()
    return status, said.getvalue()


@pytest.fixture
def e2e(monkeypatch, tmp_path):
    """A Check, small runs, one folder."""
    monkeypatch.setattr(gpu_e2e, "qzo_command", in_this_process)
    monkeypatch.setattr(gpu_e2e, "STEPS", 12)
    monkeypatch.setattr(gpu_e2e.os, "cpu_count", lambda: 1)  # one at a time: main prints into one stream
    check = gpu_check.Check(tmp_path / "out.jsonl", 600, device="cpu")
    check.share_ends = check.ends
    return check


def test_the_command_line_from_end_to_end(e2e, tmp_path):
    gpu_e2e.command_line(e2e, gpu_e2e.FOLDERS / gpu_e2e.MODEL, tmp_path)
    notes = {row["case"]: row["note"] for row in e2e.rows}
    eager = notes.pop("train --no-cuda-graph, batches of many shapes")
    assert eager == "same journal, same model" or "unrecognized arguments: --no-cuda-graph" in eager
    killed = notes.pop("train, killed and resumed")
    assert re.fullmatch(r"killed after (\d|10|11) of 12 steps; same journal, same model", killed)
    assert notes == {
        "train": "12 steps",
        "train again": "same journal, same model",
        "replay": "same model",
        "train --large-rows blas": "12 steps",
        "export": "logits differ by 0.0e+00",
    }


def test_runs_that_differ_are_found(e2e, tmp_path):
    """Another seed, another model: the comparison is of what was computed."""
    model = gpu_e2e.FOLDERS / gpu_e2e.MODEL
    (tmp_path / "data.jsonl").write_text('{"prompt": "line line", "completion": "answer 1"}\n' * 8)
    for name, more in (("first", []), ("other", ["--seed", "1"])):
        assert in_this_process(gpu_e2e.train_arguments(model, tmp_path, name, "cpu") + more, 0)[0] == 0
    with pytest.raises(gpu_e2e.Untrue, match="differ from step 0 on"):
        gpu_e2e._same_steps(tmp_path / "first", tmp_path / "other")
    with pytest.raises(gpu_e2e.Untrue, match="the models differ"):
        gpu_e2e._same_model(tmp_path / "first" / "model", tmp_path / "other" / "model")
    for ended in ((2, "qzo: unrecognized arguments: --new; see"), (1, "out of luck")):
        run: concurrent.futures.Future[tuple[int, str]] = concurrent.futures.Future()
        run.set_result(ended)
        gpu_e2e.attempt(e2e, "broken", gpu_e2e._trained, run, tmp_path)
    assert [row["note"] for row in e2e.rows] == [
        "failed: Untrue: this qzo does not know an option: qzo: unrecognized arguments: --new; see",
        "failed: Untrue: exit status 1: out of luck",
    ]


def test_a_folder_is_loaded_compared_saved_and_trained(e2e, monkeypatch):
    folder = gpu_e2e.FOLDERS / "gguf-q4_1"
    gpu_e2e.attempt(e2e, "folder", gpu_e2e.trained_and_saved, folder, "cpu")
    monkeypatch.setattr(gpu_e2e, "logits", lambda model, ids: torch.zeros(()))
    gpu_e2e.attempt(e2e, "wrong", gpu_e2e.trained_and_saved, folder, "cpu")
    monkeypatch.undo()
    monkeypatch.setattr(gpu_e2e.filecmp, "cmp", lambda *arguments, shallow: False)
    gpu_e2e.attempt(e2e, "changed", gpu_e2e.trained_and_saved, folder, "cpu")
    good, wrong, changed = (row["note"] for row in e2e.rows)
    assert re.fullmatch(r"logits off by \S+e-0\d; lr 0 gives the same files; loss 16.201 -> 15.854", good)
    assert wrong == "failed: Untrue: logits in torch.float32 are off by 1.00e+00"
    assert changed == "failed: Untrue: lr 0 changed model.gguf"


def test_every_folder_has_a_process_of_its_own(e2e, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_e2e, "in_own_process", lambda kind, folder, device, seconds: asked.append(kind) or "fine")
    monkeypatch.setattr(gpu_e2e, "command_line", lambda *arguments: None)
    gpu_e2e.e2e(e2e)
    assert asked == ["folder"] * 14 + ["blas", "compiled", "trainer"]
    assert [row["note"] for row in e2e.rows] == ["fine"] * 17
    monkeypatch.undo()
    nowhere = gpu_e2e.FOLDERS / "nowhere"
    assert gpu_e2e.in_own_process("folder", nowhere, "cpu", 60).startswith("failed: FileNotFoundError: ")
    monkeypatch.setattr(gpu_e2e.sys, "executable", "false")
    gpu_e2e.attempt(e2e, "a crash", gpu_e2e.in_own_process, "folder", nowhere, "cpu", 60)
    assert e2e.rows[-1]["note"] == "failed: Untrue: exit status 1:"


def test_many_rows_and_a_compiled_model(e2e):
    model = gpu_e2e.FOLDERS / gpu_e2e.MODEL
    assert re.fullmatch(r"losses of \d+ rows differ by 0.0e\+00", gpu_e2e.through_blas(model, "cpu", 64))
    assert gpu_e2e.compiled(model, "cpu", backend="eager") == "logits differ by 0.0e+00"
