"""`qzo journal`: what it says of a journal, to people and machines, and with which status; without torch."""

import json
import subprocess
import sys

import pytest

from qzo.cli.main import main
from tests.support.journals import GOLDEN
from tests.support.paths import ROOT

ABSOLUTE, WHOLE = GOLDEN  # three steps of one direction, an infinity in it; four steps of two directions


@pytest.fixture
def damaged(tmp_path):
    """The whole one with a flipped bit in its last step."""
    data = bytearray(WHOLE.read_bytes())
    data[-40] ^= 1
    (tmp_path / "damaged.qzo").write_bytes(data)
    return tmp_path / "damaged.qzo"


def ran(capsys, *words):
    """(status, standard output, standard error) of qzo journal."""
    status = main(["journal", *map(str, words)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_show(capsys):
    status, out, err = ran(capsys, "show", WHOLE)
    assert (status, err) == (0, "")
    first, update, base, recipe, versions, loss = out.splitlines()
    assert first == f"{WHOLE}: 4 steps of 2 directions, 1 skipped, 691 bytes"
    assert update.startswith("update: law ih4/1, relative True, sharing group, floor 5.96")
    assert update.endswith("eps 0.01, clip 5.0, directions 2, seed -3")
    assert base.endswith(", 2 layers, 256 scales train")
    assert recipe == "recipe: batch_size 4, data sha256:0"
    assert "torch" in versions
    assert loss == "loss: 1.4688 at the first step, 2.7500 at the last"


def test_show_every_step(capsys):
    _, out, _ = ran(capsys, "show", WHOLE, "--steps")
    records = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(records) == 8
    assert [line.endswith("skipped") for line in records] == [False, False, True, True, *[False] * 4]
    assert records[0].startswith("step 0 direction 0 seed ")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_show_as_json(capsys, path):
    """JSON that any parser takes: the clip that is none, and losses that are not finite, are null."""
    status, out, _ = ran(capsys, "show", path, "--json", "--steps")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert status == 0
    assert found["steps"] * found["header"]["directions"] == len(found["records"])
    assert found["whole"]
    assert not found["tail_bytes"]
    assert (found["header"]["clip"] is None) == (path == ABSOLUTE)
    assert any(record["loss_plus"] is None or record["loss_minus"] is None for record in found["records"])


def test_verify(capsys, damaged, tmp_path):
    assert ran(capsys, "verify", WHOLE) == (0, f"{WHOLE} is whole: 4 steps of 2 directions, 1 skipped, 691 bytes\n", "")
    tail = tmp_path / "tail"
    tail.write_bytes(WHOLE.read_bytes()[:-1])
    status, out, _ = ran(capsys, "verify", tail)
    assert (status, "3 steps" in out, "63 of them a tail that a resume drops" in out) == (0, True, True)
    status, out, err = ran(capsys, "verify", damaged)
    assert (status, out) == (2, "")
    assert err.startswith(
        f"qzo journal: {damaged} is damaged: the record at offset 627 (step 3, direction 0) has a wrong"
    )
    status, out, _ = ran(capsys, "verify", damaged, "--json")
    found = json.loads(out)
    assert (status, found["whole"], found["steps"], "offset 627" in found["damage"]) == (2, False, 3, True)
    assert "DAMAGED: " in ran(capsys, "show", damaged)[1]


def test_diff(capsys, tmp_path):
    assert ran(capsys, "diff", WHOLE, WHOLE) == (0, "the same 4 steps\n", "")
    part = tmp_path / "part"
    assert ran(capsys, "cut", WHOLE, "--until", 3, "--output", part) == (0, f"{part}: 3 steps\n", "")
    assert ran(capsys, "diff", part, WHOLE)[:2] == (1, "3 and 4 steps, the first 3 of them alike\n")
    status, out, _ = ran(capsys, "diff", ABSOLUTE, WHOLE)
    assert status == 1
    assert f"eps: 0.01 in {ABSOLUTE}" not in out
    assert f"clip: inf in {ABSOLUTE}, 5.0 in {WHOLE}" in out.splitlines()
    found = json.loads(ran(capsys, "diff", ABSOLUTE, WHOLE, "--json")[1])
    assert (found["same"], found["steps"], found["alike"], found["header"]["clip"]) == (False, [3, 4], 0, [None, 5.0])


def test_cut_and_concat(capsys, tmp_path):
    names = [tmp_path / name for name in ("a", "b", "c")]
    assert ran(capsys, "cut", WHOLE, "--until", 1, "--output", names[0])[0] == 0
    status, out, _ = ran(capsys, "cut", WHOLE, "--from", 1, "--output", names[1], "--json")
    assert (status, json.loads(out)) == (0, {"steps": 3, "output": str(names[1])})
    assert "of 2 directions from step 1 on" in ran(capsys, "show", names[1])[1]
    assert ran(capsys, "concat", *names[:2], "--output", names[2]) == (0, f"{names[2]}: 4 steps\n", "")
    assert names[2].read_bytes() == WHOLE.read_bytes()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("show none", "qzo journal: there is no journal none; a run's journal is OUT/journal.qzo\n"),
        ("verify README.md", "qzo journal: README.md is not a qzo journal: it starts with b'# qzo"),
        ("cut WHOLE --until 9 --output o", "has the steps from 0 up to 4, not those from 0 up to 9\n"),
        ("cut WHOLE --output README.md", "README.md exists already, and a journal is never overwritten"),
        ("concat ABSOLUTE WHOLE --output o", "pieces of one journal agree\n"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, monkeypatch, line, said):
    monkeypatch.chdir(ROOT)
    words = line.replace("WHOLE", str(WHOLE)).replace("ABSOLUTE", str(ABSOLUTE)).split()
    status, out, err = ran(capsys, *words)
    assert (status, out, err.count("\n"), said in err) == (2, "", 1, True), err
    assert not (ROOT / "o").exists()


@pytest.mark.parametrize("action", ["show", "verify", "diff", "cut", "concat"])
def test_every_action_has_help_with_an_example(capsys, action):
    with pytest.raises(SystemExit) as leave:
        main(["journal", action, "--help"])
    assert leave.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: qzo journal {action}" in text
    assert "--json" in text


def test_it_needs_no_torch():
    code = f"import sys\nfrom qzo.cli.main import main\nassert main(['journal', 'show', {str(WHOLE)!r}]) == 0\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
