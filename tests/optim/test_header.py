"""Fields of a journal's header that no run writes are named, whatever the checksums say."""

import json
from typing import Any

import pytest

from qzo.bench.fuzz.mutations import checked
from qzo.cli.main import main
from qzo.optim.header import wrong_field
from qzo.optim.journal import MAGIC, PREAMBLE, VERSION, JournalError, encoded, read
from qzo.optim.replay import replay
from tests.support.journals import GOLDEN, golden_model, read_whole

HEADER = read_whole(GOLDEN[0])[0]
WRONG: list[tuple[str, Any]] = [
    ("directions", 1.5),
    ("directions", 0),
    ("directions", True),
    ("first_step", -1),
    ("seed", "5"),
    ("seed", 1 << 70),
    ("relative", 1),
    ("noise", ["ih4"]),
    ("sharing", None),
    ("law", {}),
    ("eps", float("nan")),
    ("clip", -1.0),
    ("floor", 1e308),
    ("arena", []),
    ("arena", {"0": [0, 3]}),
    ("arena", {"0": [0, 3, -1]}),
    ("digest", 5),
    ("recipe", "x"),
    ("versions", None),
]


def test_what_runs_have_written_is_right():
    for path in GOLDEN:
        assert wrong_field(read_whole(path)[0]) is None
    assert wrong_field({}) is None


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_field_of_another_kind_is_refused_by_its_name(tmp_path, capsys, name, value):
    path = tmp_path / "x.qzo"
    path.write_bytes(encoded(HEADER | {name: value}))
    with pytest.raises(JournalError, match=f"the {name} of its header is"):
        read(path)
    for command in (["journal", "show"], ["journal", "verify"]):
        assert main([*command, str(path)]) == 2
        assert f"the {name} of its header is" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "text", [b"[" * 5000, b"[]", b"{}", b"\xff", json.dumps(HEADER | {"x": [[]] * 2}).encode()[:-1]]
)
def test_a_header_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "x.qzo").write_bytes(checked(PREAMBLE.pack(MAGIC, VERSION, len(text))) + checked(text))
    with pytest.raises(JournalError, match="is not a qzo journal: its header"):
        read(tmp_path / "x.qzo")


@pytest.mark.parametrize("name", ["noise", "law", "sharing", "relative", "floor", "arena", "digest"])
def test_replay_names_a_field_that_is_missing(tmp_path, name):
    path = tmp_path / "x.qzo"
    path.write_bytes(encoded({key: value for key, value in HEADER.items() if key != name}))
    with pytest.raises(JournalError, match=f"its header has no {name}"):
        replay(golden_model(), path)
