"""`qzo export`: the command."""

import json

import pytest

import qzo
from qzo.cli.main import main
from tests.checkpoints.test_export import AWQ, DESC, IDS, SYM, load


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(AWQ), "--to", "gptq", "--output-dir", str(out), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": "gptq", "steps": 0, "output_dir": str(out)}
    qzo.export(load(AWQ), tmp_path / "same", "gptq")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "same").iterdir()
    }


def test_the_command_replays_a_journal_first(tmp_path, capsys):
    model = load(AWQ)
    optimizer = qzo.QZO(model, lr=1e-2, directions=2, journal=tmp_path / "journal.qzo")
    for _ in range(3):
        optimizer.step(lambda: qzo.losses(model, {"input_ids": IDS, "labels": IDS}, 4))
    optimizer.close()
    qzo.export(model, tmp_path / "tuned", "compressed-tensors")
    assert (
        main(
            [
                "export",
                str(AWQ),
                "--to",
                "compressed-tensors",
                "--output-dir",
                str(tmp_path / "out"),
                "--journal",
                str(tmp_path / "journal.qzo"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert "the model after 3 steps is in" in capsys.readouterr().out
    tuned, plain = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("tuned", "out"))
    assert tuned == plain
    assert (
        main(
            [
                "export",
                str(SYM),
                "--to",
                "awq",
                "--output-dir",
                str(tmp_path / "other"),
                "--journal",
                str(tmp_path / "journal.qzo"),
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_commands_errors_are_one_line(tmp_path, capsys):
    for source, form, message in (
        (DESC, "awq", "act-order"),
        (tmp_path / "none", "exl2", "'exl2' is not supported"),
        (tmp_path / "none", "awq", "no such file or folder"),
    ):
        assert main(["export", str(source), "--to", form, "--output-dir", str(tmp_path / "out")]) == 2
        *said, line = capsys.readouterr().err.strip().splitlines()
        assert said == ([f"loading {source}"] if source == DESC else [])
        assert message in line
    with pytest.raises(SystemExit) as leave:
        main(["export", "--help"])
    assert leave.value.code == 0
    assert "example: qzo export" in " ".join(capsys.readouterr().out.split())
