"""`qzo train --offload` from end to end: the same run, stopped by a file that somebody changes, and what is refused."""

import gc
import os

import pytest

from qzo.cli.main import main
from qzo.nn.streaming.stores import FileStore
from qzo.optim.optimizer import QZO
from tests.support import tiny
from tests.support.journals import read_whole


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(a model of six blocks, data)."""
    base = tiny.save_checkpoint(tmp_path_factory.mktemp("base"), layers=6)
    data = tmp_path_factory.mktemp("data")
    tiny.write_jsonl(data / "train.jsonl", tiny.RECORDS[:8])
    return base, data


@pytest.fixture(scope="module")
def resident(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "resident"
    assert train(places, out) == 0
    return results(out)


def train(places, out, *more):
    base, data = map(str, places)
    given = ["--group-size", "32", "--device", "cpu", "--max-steps", "4", "--batch-size", "2", "--directions", "1"]
    return main(["train", base, "--data", data, "--output-dir", str(out), *given, *more])


def results(out):
    """Everything that must not depend on where codes are."""
    files = [out / "journal.qzo", *sorted((out / "model").iterdir())]
    return {file.name: file.read_bytes() for file in files}


def test_a_run_that_changes_its_mode_on_the_way_ends_in_the_bits_of_the_resident_one(
    places, resident, tmp_path, monkeypatch, capsys
):
    out, finish = tmp_path / "out", QZO._finish

    def stopped(self, *given, **more):
        if self.param_groups[0]["step"] == 2:
            raise KeyboardInterrupt
        return finish(self, *given, **more)

    monkeypatch.setattr(QZO, "_finish", stopped)
    assert train(places, out, "--offload", "cpu") == 130
    monkeypatch.setattr(QZO, "_finish", finish)
    assert len(read_whole(out / "journal.qzo")[1]) == 2
    assert train(places, out, "--offload", "disk", "--resume") == 0
    assert results(out) == resident
    gc.collect()
    assert not list(out.glob("offload*"))
    told = capsys.readouterr().err
    assert "GB on the host" in told
    assert "GB on the disk" in told


def test_a_file_that_is_cut_under_a_run_stops_it_with_the_journal_whole(
    places, resident, tmp_path, monkeypatch, capsys
):
    out, append = tmp_path / "out", FileStore.read

    def cut(self, *given):
        if self.path.parent == out and (out / "journal.qzo").exists() and len(read_whole(out / "journal.qzo")[1]) == 2:
            os.truncate(self.path, 100)
        return append(self, *given)

    monkeypatch.setattr(FileStore, "read", cut)
    assert train(places, out, "--offload", "disk") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qzo train:")]
    assert f"{out}/offload.bin was changed while the model streams from it" in line
    assert "--resume" in line
    monkeypatch.setattr(FileStore, "read", append)
    assert 2 <= len(read_whole(out / "journal.qzo")[1]) < 4
    assert train(places, out, "--offload", "disk", "--resume") == 0
    assert results(out) == resident


def test_evaluations_one_after_another_share_a_visit_and_a_frozen_prefix(places, tmp_path):
    journals = []
    for more in ([], ["--offload", "cpu"]):
        out = tmp_path / f"out{len(more)}"
        assert train(places, out, "--sequential", "--train-layers", "5", *more) == 0
        journals.append((out / "journal.qzo").read_bytes())
    assert journals[0] == journals[1]


def test_too_little_memory_is_refused_before_the_model_is_read_or_the_disk_is_taken(
    places, resident, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    monkeypatch.setattr("qzo.nn.streaming.stores.free_bytes", lambda device: 1000)
    assert train(places, out, "--offload", "cpu") == 2
    told = capsys.readouterr().err
    assert "1,000 are available" in told
    assert "--offload disk" in told
    elsewhere = tmp_path / "elsewhere"
    assert train(places, out, "--offload", "auto", "--offload-dir", str(elsewhere)) == 0
    assert results(out) == resident
    assert elsewhere.is_dir()
    assert train(places, tmp_path / "compiled", "--offload", "cpu", "--compile") == 2
    assert "--compile with --offload" in capsys.readouterr().err
