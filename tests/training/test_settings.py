"""Settings out of range are refused by their own name, before anything is loaded."""

import math
from typing import Any

import pytest

from qzo.cli.main import main
from qzo.optim.optimizer import QZO
from qzo.training.settings import MOST_DIRECTIONS, PAPER, Settings
from tests.support import small_layers, tiny

WRONG = [
    ({"max_steps": 0}, "max_steps=0: expected an int >= 1"),
    ({"max_steps": 1.5}, "max_steps=1.5: expected an int >= 1"),
    ({"batch_size": -1}, "batch_size=-1: expected an int >= 1"),
    ({"batch_size": True}, "batch_size=True: expected an int >= 1"),
    ({"max_length": "9"}, "max_length='9': expected an int >= 1"),
    ({"directions": 0}, "directions=0: expected an int from 1 to 65535"),
    ({"directions": 1 << 16}, "directions=65536: expected an int from 1 to 65535"),
    ({"directions": None}, "directions=None: expected an int from 1 to 65535"),
    ({"seed": 1 << 64}, "seed=18446744073709551616: expected an int of 64 bits, from -2**63 to 2**64 - 1"),
    ({"seed": -(1 << 63) - 1}, "seed=-9223372036854775809: expected an int of 64 bits"),
    ({"seed": 0.5}, "seed=0.5: expected an int of 64 bits"),
    ({"train_layers": 0}, "train_layers=0: expected an int >= 1 (or none: the whole model)"),
    ({"eps": 5}, "eps=5.0: expected a number > 0 and <= 1, a part of each scale"),
    ({"eps": 0}, "eps=0.0: expected a number > 0 and <= 1, a part of each scale"),
    ({"eps": math.nan}, "eps=nan: expected a number > 0 and <= 1"),
    ({"eps": 0, "relative": False}, "eps=0.0: expected a finite number > 0"),
    ({"eps": math.inf, "relative": False}, "eps=inf: expected a finite number > 0"),
    ({"eps": "small"}, "eps='small': expected a number"),
    ({"clip": 0}, "clip=0.0: expected a number > 0 (inf: no clipping)"),
    ({"clip": math.nan}, "clip=nan: expected a number > 0"),
    ({"learning_rate": -1e-3}, "learning_rate=-0.001: expected a finite number >= 0"),
    ({"learning_rate": math.inf}, "learning_rate=inf: expected a finite number >= 0"),
    ({"learning_rate": "fast"}, "learning_rate='fast': expected a number"),
    ({"floor": -1}, "floor=-1.0: expected a finite number >= 0"),
    ({"decay": math.nan}, "decay=nan: expected a finite number >= 0"),
    ({"max_cut": 1.5}, "max_cut=1.5: expected a share from 0 to 1"),
    ({"journal_fsync": -1}, "journal_fsync=-1.0: expected seconds >= 0 (0: each step is synced)"),
    ({"journal_fsync": math.nan}, "journal_fsync=nan: expected seconds >= 0"),
    ({"text_eos": "yes"}, "text_eos='yes': expected true or false"),
    ({"relative": 1}, "relative=1: expected true or false"),
    ({"noise": "pink"}, "noise='pink' is not a noise law"),
    ({"sharing": "column"}, "sharing='column': "),
    ({"sharing": "row", "relative": False}, "sharing='row' scales a whole output row"),
    ({"large_rows": "all"}, "large_rows='all': "),
    ({"packing": "on"}, "packing='on': known are off, auto"),
    ({"staleness": -1}, "staleness=-1: expected steps, an int >= 0 (0: no step runs ahead)"),
    ({"staleness": 3, "max_steps": 3}, "staleness=3 with max_steps=3: every step would be evaluated on the scales"),
    ({"staleness": 1, "cuda_graph": True}, "staleness=1 with cuda_graph: "),
    ({"staleness": 1, "parallel": "tensor"}, "staleness=1 with parallel='tensor': "),
]


@pytest.mark.parametrize(("given", "said"), WRONG, ids=[said.partition(":")[0] for _, said in WRONG])
def test_a_value_out_of_range_is_named(given, said):
    with pytest.raises(ValueError) as error:
        Settings(**given)
    assert str(error.value).startswith(said)


def test_the_ends_of_the_ranges_are_in():
    for given in (
        {"eps": 1},
        {"eps": "1e-2"},
        {"eps": 5, "relative": False},
        {"clip": math.inf},
        {"learning_rate": 0},
        {"seed": (1 << 64) - 1},
        {"seed": -(1 << 63)},
        {"max_cut": 0},
        {"journal_fsync": 0},
        {"journal_fsync": math.inf},
        {"max_cut": 1},
        {"floor": 0},
    ):
        settings = Settings(**given)
        [name, *_], [value, *_] = given, given.values()
        assert getattr(settings, name) == (value if name == "seed" else float(value))
    assert Settings().learning_rate is None, "the data decide"
    assert Settings(**PAPER).learning_rate == 1e-7


def test_the_most_directions_are_those_of_the_optimizer():
    assert Settings(directions=MOST_DIRECTIONS).directions == MOST_DIRECTIONS
    QZO(small_layers.block(), 0.1, directions=MOST_DIRECTIONS)
    with pytest.raises(ValueError, match="directions=65536"):
        QZO(small_layers.block(), 0.1, directions=MOST_DIRECTIONS + 1)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--eps", "5", "eps=5.0: expected a number > 0 and <= 1"),
        ("--directions", "70000", "directions=70000: expected an int from 1 to 65535"),
        ("--seed", str(1 << 64), "seed="),
        ("--clip", "0", "clip=0.0"),
        ("--learning-rate", "nan", "learning_rate=nan"),
        ("--max-cut", "2", "max_cut=2.0"),
    ],
)
def test_the_command_line_refuses_before_it_reads_anything(tmp_path, capsys, option, value, said):
    data = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.RECORDS)
    line = ["train", "--model", "no/such/model", "--data", str(data), "--output-dir", str(tmp_path / "out")]
    assert main([*line, option, value]) == 2
    assert capsys.readouterr().err.startswith(f"qzo train: {said}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["noise", "eps", "learning_rate", "relative", "sharing", "large_rows", "parallel", "seed"]
)
@pytest.mark.parametrize("value", [10**400, ["x" * 50] * 50, {"a": {"b": "c" * 2000}}])
def test_absurd_values_are_refused_in_a_short_line(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        Settings(**{name: value})
    assert len(str(caught.value)) < 300
