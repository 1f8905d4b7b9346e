"""Tables that records are read from: CSV, Parquet, Arrow, folders of Hugging Face's datasets; and objects in Python.

`fixtures/datasets` was written by datasets 5.2: a DatasetDict of three splits, and the rows of its train as Parquet.
"""

import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from qzo.training import tables
from qzo.training.records import read_data, read_records
from tests.support import tiny
from tests.support.paths import FIXTURES

SAVED = FIXTURES / "datasets/saved"
CALL = {"function": {"name": "look", "arguments": {"q": "b"}}}
ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}], "id": 1},
    {
        "messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "id": 2,
    },
    {"text": "a b c", "id": 3},
]


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ------------------------------------------------------------------------------------------------ CSV


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("front", ["", "\ufeff"])
@pytest.mark.parametrize(("name", "mark"), [("d.csv", ","), ("d.csv", ";"), ("d.tsv", "\t")])
def test_a_csv_is_read_by_its_first_line(tmp_path, name, mark, front, end):
    lines = ["prompt,completion,id", '"a, ""b""", yes,1', "", '"two\nlines",no,2', '"a;b\tc", d,3']
    cells = [line.replace('"a, ', '"a@ ').replace(",", mark).replace("@", ",") for line in lines]
    found = read_records(written(tmp_path / name, front + end.join(cells) + end))
    assert found == [
        {"prompt": 'a, "b"', "completion": " yes", "id": "1"},
        {"prompt": "two\nlines", "completion": "no", "id": "2"},
        {"prompt": "a;b\tc", "completion": " d", "id": "3"},
    ]
    assert [record.place for record in found] == [f"{tmp_path / name}, line {n}" for n in (2, 4, 6)]


def test_a_csv_holds_lists_as_json(tmp_path):
    text = (
        'prompt,options,label,tools\na,"[""x"", ""y""]",1,\nb,"[""x"", ""y""]",y,\nc,"[""1"", ""0""]",0,"[{}]"\n'
        'd,"[""x"", ""y""]",01,\n'
    )
    found = read_records(written(tmp_path / "d.csv", text))
    assert [record["label"] for record in found] == [1, "y", "0", 1]
    assert found[2] == {"prompt": "c", "options": ["1", "0"], "label": "0", "tools": [{}]}
    messages = json.dumps(ROWS[0]["messages"]).replace('"', '""')
    assert read_records(written(tmp_path / "d.csv", f'messages\n"{messages}"\n')) == [{"messages": ROWS[0]["messages"]}]


def test_a_cell_may_be_longer_than_csv_allows(tmp_path):
    text = "a " * 100_000
    assert read_records(written(tmp_path / "d.csv", f"text\n{text}\n")) == [{"text": text}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "d.csv holds no examples"),
        ("prompt,completion\n", "d.csv holds no examples"),
        (
            "prompt,completion\na,b\n\na,b,c\n",
            "d.csv, line 4: it has 3 cells, the first line names 2 columns; a cell that holds the separator",
        ),
        ("prompt,completion\na\n", "d.csv, line 2: it has 1 cells, the first line names 2 columns"),
        ("prompt,text,prompt\na,b,c\n", "d.csv: the first line names a column twice: 'prompt'"),
        ('text\na\n"b\nc\n', "d.csv, line 4: not CSV (unexpected end of data)"),
        ('text\n"a"b\n', "d.csv, line 2: not CSV ("),
        (b"text\n\xff\n", "d.csv is not UTF-8 ("),
        (
            "a,b\n1,2\n",
            "d.csv, line 2: has the keys ['a', 'b']; wanted are prompt+completion, messages, text, "
            "prompt+options+label, conversations, or instruction+output; the first line of a CSV names its columns",
        ),
        (
            "prompt,options,label\na,x|y,0\n",
            "d.csv, line 2: the cell 'options' must be the JSON text of a list: it is not JSON (",
        ),
        ("prompt,options,label\na,3,0\n", "d.csv, line 2: 'options' must be a list of at least two"),
        ('prompt,options,label\na,"[""x"", ""y""]",2\n', "d.csv, line 2: label 2 is not among the options"),
    ],
)
def test_what_is_wrong_with_a_csv(tmp_path, text, said):
    with pytest.raises(ValueError) as error:
        read_records(written(tmp_path / "d.csv", text))
    assert str(error.value).startswith(f"{tmp_path}/{said}")


# ------------------------------------------------------------------------------------------------ Parquet, Arrow


def test_without_pyarrow_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for path in (written(tmp_path / "d.parquet", b"PAR1"), written(tmp_path / "d.jsonl", b"PAR1")):
        with pytest.raises(ValueError) as error:
            read_data(path)
        assert str(error.value) == (
            f"{path}: Parquet files are read by pyarrow, which is not installed: pip install pyarrow"
        )
    with pytest.raises(ValueError, match=r"00001.arrow: Arrow files are read by pyarrow"):
        read_data(SAVED / "train")


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    found = read_data(FIXTURES / "datasets/rows.parquet")["train"]
    assert found == ROWS
    assert found[2].place == f"{FIXTURES / 'datasets/rows.parquet'}, row 3"
    renamed = shutil.copy(FIXTURES / "datasets/rows.parquet", tmp_path / "rows.jsonl")
    assert read_records(renamed) == ROWS


def test_arrow_files_with_and_without_their_frame(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([{"text": "a b"}, {"text": "c d"}])
    for name, writer in (("d.arrow", pyarrow.ipc.new_file), ("d.feather", pyarrow.ipc.new_stream)):
        with writer(tmp_path / name, table.schema) as file:
            file.write_table(table, max_chunksize=1)
        assert read_records(tmp_path / name) == [{"text": "a b"}, {"text": "c d"}]


def test_a_folder_of_datasets(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.warns(UserWarning, match=r"saved: splits that are not read: unsupervised$"):
        assert read_data(SAVED) == {"train": ROWS, "valid": ROWS[:1]}
    assert read_data(SAVED / "unsupervised") == {"train": ROWS[2:]}
    hub = tmp_path / "data"
    hub.mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        shutil.copy(FIXTURES / "datasets/rows.parquet", hub / f"{name}.parquet")
    found = read_data(tmp_path)
    assert found == {"train": ROWS * 2, "valid": ROWS}
    assert found["train"][3].place == f"{hub / 'train-00001-of-00002.parquet'}, row 1"
    tiny.write_jsonl(tmp_path / "val.jsonl", [{"text": "a b"}])
    with pytest.raises(ValueError, match=r"holds both val.jsonl and validation-00000-of-00001.parquet: keep one"):
        read_data(tmp_path)


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
@pytest.mark.parametrize("data", [b"", b"PAR1" * 9, b"ARROW1\0\0" * 9, b"\xff" * 40])
def test_damaged_tables(tmp_path, name, data):
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=rf"{name} cannot be read as (Parquet|Arrow): "):
        read_records(written(tmp_path / name, data))


def test_what_rows_share_is_counted_for_each():
    """Bytes of the values at least, as Python makes an object for each row."""
    pyarrow = pytest.importorskip("pyarrow")
    long = pyarrow.array(["x" * 900])
    shared = pyarrow.DictionaryArray.from_arrays([0] * 50, long)
    lists = pyarrow.ListArray.from_arrays([0, 30, 50], shared)
    maps = pyarrow.array([[("a", 1), ("bc", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    for column, least, most in (
        (pyarrow.array(["ab"] * 50), 100, 700),
        (shared, 45_000, 46_000),
        (shared.slice(10, 5), 4_500, 4_600),
        (lists, 45_000, 46_500),
        (lists.slice(1), 18_000, 19_000),
        (pyarrow.StructArray.from_arrays([shared, shared], ["a", "b"]), 90_000, 92_000),
        (pyarrow.FixedSizeListArray.from_arrays(shared, 2), 45_000, 46_500),
        (pyarrow.DictionaryArray.from_arrays([0] * 50, [7]), 400, 400),
        (pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(["{}"] * 9)), 18, 100),
        (pyarrow.nulls(1000), 8_000, 8_000),
        (pyarrow.ListArray.from_arrays([0, 1000], pyarrow.nulls(1000)), 8_000, 8_100),
        (maps, 2 * 8 + 3, 100),
    ):
        assert least <= tables._unpacked(Path("d"), column) <= most, column.type


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_a_long_value_of_a_column_of_categories_is_refused(tmp_path, monkeypatch, name):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5000, pyarrow.int32()), ["x" * 50_000])
    table, path = pyarrow.table({"text": shared}), tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    assert path.stat().st_size < 1 << 17
    monkeypatch.setattr(tables, "free_bytes", lambda device: tables.SPARE + 50_000_000)
    with pytest.raises(ValueError, match=rf"{name}: its next rows unpack to (0.05|0.25) GB, and 0.32 GB of memory"):
        list(tables.rows(path, path.suffix))


@pytest.mark.parametrize("kind", ["run_end_encoded<", "list_view<", "string_view", "dictionary<values=list"])
def test_columns_whose_rows_share_in_other_ways_are_named(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    numbers = pyarrow.array([1, 2])
    column = {
        "run_end_encoded<": lambda: pyarrow.RunEndEncodedArray.from_arrays([1, 2], numbers),
        "list_view<": lambda: pyarrow.ListViewArray.from_arrays([0, 0], [2, 2], numbers),
        "string_view": lambda: pyarrow.array(["a", "b"], pyarrow.string_view()),
        "dictionary<values=list": lambda: pyarrow.DictionaryArray.from_arrays([0, 0], pyarrow.array([[1, 2]])),
    }[kind]()
    table, path = pyarrow.table({"text": column}), tmp_path / "d.arrow"
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    with pytest.raises(ValueError, match=rf"d.arrow: a column is of the type {kind}.*, which is not read; write str"):
        list(tables.rows(path, path.suffix))


PLAIN = {"compression": "zstd", "use_dictionary": False}


@pytest.mark.parametrize(
    ("name", "how", "before"),
    [("d.parquet", PLAIN, 2), ("d.parquet", {}, 3), ("d.arrow", {"compression": "zstd"}, 3), ("d.arrow", {}, 3)],
)
def test_what_unpacks_to_more_than_the_free_memory_is_refused(tmp_path, monkeypatch, name, how, before):
    """By the size that the footer gives of a row group, before it is unpacked; where that does not tell, as one value
    comes often, or in a compressed stream, when a batch has been. before: thousands of rows."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(tables, "AT_ONCE", 1000)
    table, path = pyarrow.table({"text": ["ab " * 300] * 6000}), tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(table, path, row_group_size=2000, **how)
    else:
        options = pyarrow.ipc.IpcWriteOptions(**how)
        with pyarrow.ipc.new_stream(path, table.schema, options=options) as file:
            file.write_table(table, max_chunksize=1000)
    assert len(list(tables.rows(path, path.suffix))) == 6000
    if how or name.endswith("parquet"):
        assert path.stat().st_size < 1 << 16
    left, seen = [tables.SPARE + 3_500_000], []
    monkeypatch.setattr(tables, "free_bytes", lambda device: left[0])

    def read():
        for number, record in tables.rows(path, path.suffix):
            left[0] -= len(record["text"])
            seen.append(number)

    with pytest.raises(
        ValueError, match=r": its next rows unpack to 0.00 GB, and 0.27 GB of memory are free, of which"
    ):
        read()
    assert len(seen) == before * 1000


ELSEWHERE = ["../x.arrow", "/etc/passwd", "..", "a/b", "a\nb"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"_data_files": [3]}', '{"splits": 3}', "[" * 5000]
    + [json.dumps({"_data_files": [{"filename": name}], "splits": ["train", name]}) for name in ELSEWHERE],
)
def test_damaged_folders_of_datasets(tmp_path, text):
    state = written(tmp_path / "state.json", text)
    with pytest.raises(ValueError, match=r"state.json does not name the files of a dataset"):
        read_data(tmp_path)
    state.rename(tmp_path / "dataset_dict.json")
    with pytest.raises(ValueError, match=r"dataset_dict.json does not name the splits of a dataset"):
        read_data(tmp_path)


def test_offsets_of_an_arrow_file_are_checked_before_they_are_followed(tmp_path):
    """pyarrow takes them as they are, and reads whatever memory they lead to."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([{"text": "first"}, {"text": "other"}])
    with pyarrow.ipc.new_stream(tmp_path / "d.arrow", table.schema) as file:
        file.write_table(table)
    whole = (tmp_path / "d.arrow").read_bytes()
    offsets = struct.pack("<3i", 0, 5, 10)
    assert whole.count(offsets) == 1
    for wrong in ((0, 5, 1 << 30), (0, -5, 10), (9, 5, 10)):
        written(tmp_path / "d.arrow", whole.replace(offsets, struct.pack("<3i", *wrong)))
        with pytest.raises(ValueError, match=r"d.arrow cannot be read as Arrow: "):
            read_records(tmp_path / "d.arrow")


def test_a_date_that_python_does_not_have(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    days = pyarrow.array([1 << 30], pyarrow.int32()).view(pyarrow.date32())
    with pyarrow.ipc.new_stream(tmp_path / "d.arrow", pyarrow.schema([("text", days.type)])) as file:
        file.write_table(pyarrow.table({"text": days}))
    with pytest.raises(ValueError, match=r"d.arrow cannot be read as Arrow: "):
        read_records(tmp_path / "d.arrow")


def test_folders_of_datasets_that_lack_a_file(tmp_path):
    written(tmp_path / "state.json", '{"_data_files": [{"filename": "data-0.arrow"}]}')
    with pytest.raises(FileNotFoundError, match=r"state.json names files that are not there: .*data-0.arrow"):
        read_data(tmp_path)
    (tmp_path / "state.json").unlink()
    written(tmp_path / "dataset_dict.json", '{"splits": ["train_sft"]}')
    with pytest.raises(ValueError, match=r" has no split 'train', but 'train_sft': give the one that trains alone$"):
        read_data(tmp_path)


# ------------------------------------------------------------------------------------------------ objects


def test_objects_are_read_as_files_are(tmp_path):
    nulls = [{"messages": None, "text": None, **row} for row in ROWS]
    found = read_data(nulls)
    assert found == {"train": ROWS} == read_data(iter(nulls)) == read_data(tiny.write_jsonl(tmp_path / "d", ROWS))
    assert found["train"][1].place == "train, record 2"
    splits: dict[str, Any] = {"train": nulls, "validation": nulls[:1], "extra": 3}
    with pytest.warns(UserWarning, match="the data: splits that are not read: extra"):
        both = read_data(splits)
    assert both == {"train": ROWS, "valid": ROWS[:1]}
    assert both["valid"][0].place == "validation, record 1"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "the split 'train' holds no examples"),
        ({"train": ROWS, "test": []}, "the split 'test' holds no examples"),
        ({"train": {"text": "a"}}, "the split 'train' must be an iterable of records (dicts), got dict"),
        ({"train": "a.jsonl"}, "the split 'train' must be an iterable of records (dicts), got str"),
        ({}, "the data has no split 'train', but none: give the one that trains alone"),
        (3, "the split 'train' must be an iterable of records (dicts), got int"),
        (["a"], "train, record 1: expected a JSON object, got str"),
        ([*ROWS, {"text": 3}], "train, record 4: 'text' must be a string, got int"),
        (
            {"prompt": "a", "completion": "b"},
            "the data has no split 'train', but 'prompt', 'completion': give the one that trains alone",
        ),
        ({"train": ROWS, "val": ROWS, "dev": ROWS}, "the data holds both 'val' and 'dev': keep one of them"),
    ],
)
def test_what_is_wrong_with_objects(source, said):
    with pytest.raises(ValueError) as error:
        read_data(source)
    assert str(error.value) == said
