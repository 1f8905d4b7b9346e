"""`qzo quantize`: what it asks for, and what it says; the folder that it writes is tests/checkpoints/."""

import json

import pytest

from qzo.cli import quantize
from qzo.cli.main import main

FOUND = {"layers": 14, "bits": 4, "group_size": 64, "table": None, "format": "gptq", "error": 0.10351}


@pytest.fixture
def asked(monkeypatch):
    """What folders were quantized with, and the answer, which may be changed."""
    calls, answer = [], dict(FOUND)
    monkeypatch.setattr(quantize, "quantize_folder", lambda *a, **k: calls.append((a, k)) or answer)
    return calls, answer


def test_options_are_passed_on(asked, tmp_path, capsys):
    out = str(tmp_path / "out")
    line = "--bits 8 --group-size 32 --asymmetric --format awq --table nf4 --trust-remote-code --json"
    assert main(["quantize", "model", "--output-dir", out, *line.split()]) == 0
    assert main(["quantize", "model", "--output-dir", out]) == 0
    (given, options), (_, plain) = asked[0]
    assert given == ("model", out)
    assert options == dict(
        bits=8, group_size=32, symmetric=False, method="awq", table="nf4", trust_remote_code=True, strict=False
    )
    assert plain == dict(
        bits=4, group_size=None, symmetric=True, method=None, table=None, trust_remote_code=False, strict=False
    )
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[0]) == FOUND | {"output_dir": out}
    assert shown.err == "quantizing model\n" * 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "14 layers of 4 bits in groups of 64 are in OUT as gptq; the weights are off by 0.104 of their size"),
        ({"error": None, "group_size": -1}, "14 layers of 4 bits in groups of a whole row are in OUT as gptq"),
        ({"table": "nf4", "error": None}, "14 layers of nf4 in groups of 64 are in OUT as gptq"),
    ],
)
def test_it_says_what_was_written(asked, tmp_path, capsys, change, said):
    asked[1].update(change)
    assert main(["quantize", "model", "--output-dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == said.replace("OUT", str(tmp_path / "out")) + "\n"


def test_help_points_to_calibrated_quantizers(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    shown = capsys.readouterr().out
    for text in ("example: qzo quantize", "GPTQModel", "auto-round --model", "GPTQModifier"):
        assert text in shown
