"""Results files: read, compared, shown, drawn, and named where they are damaged."""

import json

import pytest

from qzo.bench import readme, results
from qzo.cli.main import main
from tests.support.bench_cases import CASE, rows_of


def test_compare_finds_what_got_slower(measured, tmp_path, capsys):
    rows = results.read(measured)
    slow = tmp_path / "new.jsonl"
    for row in rows:
        row["ms"] = row["ms"] and row["ms"] * (1.2 if row["provider"] == "qzo" else 1.01)
    slow.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["bench", "compare", str(measured), str(slow)]) == 1
    marked = [line for line in capsys.readouterr().out.splitlines() if "SLOWER" in line]
    assert len(marked) == 1
    assert ", qzo:" in marked[0]
    assert "1.200x" in marked[0]
    assert main(["bench", "compare", str(measured), str(measured)]) == 0


def test_table_and_plot(measured, tmp_path, capsys):
    assert main(["bench", "table", str(measured)]) == 0
    text = capsys.readouterr().out
    assert sum(line.startswith(f"| {CASE.name} |") for line in text.splitlines()) == 8
    assert "gemlite: not there: gemlite is not installed" in text
    assert main(["bench", "plot", str(measured), "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema": 1', "line 1: not JSON"),
        ('{"schema": 9}', "line 1: schema 9, this qzo reads schemas 1 and 2"),
        ("[1]", "schema none"),
        ('{"schema": 1, "case": "a"}', "line 1: the fields provider, rows"),
        ("", "holds no results"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, content, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert main(["bench", "table", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(("device", "mode", "ratio"), [("H100", None, None), ("EPYC, 1 thread", "eager", 2.0)])
def test_files_of_the_first_schema_are_read_and_gpu_ratios_left_out(tmp_path, device, mode, ratio):
    path = tmp_path / "old.jsonl"
    rows = rows_of(device, ("qzo", "eager", 2.0), ("official", "eager", 4.0), schema=1)
    path.write_text(
        "".join(json.dumps({k: v for k, v in r.items() if k not in ("mode", "roof_ms")}) + "\n" for r in rows)
    )
    read = results.read(path)
    assert [(r["mode"], r["ratio"], r["ms"]) for r in read][1] == (mode, ratio, 4.0)
    assert "official" in results.as_markdown(read)
    assert "official" in readme.ratio_table(read)


def test_a_row_is_printed_and_stands_behind_those_of_the_file(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    for number in (1, 2):
        results.append({"case": number}, path)
    results.append({"case": 3}, None)
    assert path.read_text() == '{"case": 1}\n{"case": 2}\n'
    assert capsys.readouterr().out == '{"case": 1}\n{"case": 2}\n{"case": 3}\n'
