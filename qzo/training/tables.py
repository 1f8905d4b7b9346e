"""Rows of tables as records, a column a key: CSV and TSV, Parquet, Arrow, and the folders that `save_to_disk` of
Hugging Face's datasets writes (Arrow files, and a JSON file that names them).

    a CSV or TSV    its first line names the columns; they are separated by what that line has most of: comma,
                    semicolon or tab. Cells are text; in the columns of LISTS they are the JSON text of a list
    Parquet, Arrow  read by pyarrow, which is not installed with qzo; a null is a key that is not there
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..system.as_json import parsed
from ..system.memory import free_bytes

LISTS = ("messages", "conversations", "options", "tools", "history")
DELIMITED = (".csv", ".tsv")
COLUMNAR = {".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Arrow"}
READ = (*DELIMITED, *COLUMNAR)
AT_ONCE = 1024  # rows of Parquet that are unpacked together
SPARE = 1 << 28  # bytes of memory that a table leaves free
DATASET, SPLIT_NAMES = "state.json", "dataset_dict.json"  # in a folder of one split, of several

Numbered = Iterator[tuple[int, dict[str, Any]]]


def rows(path: Path, kind: str) -> Numbered:
    """(number, record) of each row of a table: the line that it begins on, or its place among the rows, from 1.

    kind: one of READ. ValueError for a file that is not what its kind says, for rows that do not fit the first line,
    and where pyarrow is wanted and missing.
    """
    return _delimited(path) if kind in DELIMITED else _columnar(path, kind)


def dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` has written, in order. ValueError for another."""
    try:
        names = [entry["filename"] for entry in parsed((folder / DATASET).read_bytes())["_data_files"]]
        named = [folder / _plain(name) for name in names]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / DATASET} does not name the files of a dataset ({error!r:.200})") from None
    missing = [str(file) for file in named if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder / DATASET} names files that are not there: {', '.join(missing)}")
    return named


def dataset_splits(folder: Path) -> list[str]:
    """The splits of a folder that `DatasetDict.save_to_disk` has written: folders in it. ValueError for another."""
    try:
        return [_plain(name) for name in parsed((folder / SPLIT_NAMES).read_bytes())["splits"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / SPLIT_NAMES} does not name the splits of a dataset ({error!r:.200})") from None


def _plain(name: Any) -> str:
    """The name of a file or folder in this one. ValueError for a path that leads elsewhere."""
    if not isinstance(name, str) or Path(name).name != name or name == ".." or not name.isprintable():
        raise ValueError(f"{name!r:.100} is no name in this folder")
    return name


def without_nulls(value: Any) -> Any:
    """A value without the keys of its objects that hold None: tables have a column for every key, or field for every
    one of a message. A message's content may be null beside calls, and is kept."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None or key == "content"}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _delimited(path: Path) -> Numbered:
    limit = csv.field_size_limit(sys.maxsize)  # texts are longer than the 128 KB that a cell may have
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            names = [name.strip() for name in next(reader, [])]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{path}: the first line names a column twice: {', '.join(map(repr, twice))}")
            begins = reader.line_num + 1
            for cells in reader:
                if cells:  # none in an empty line
                    yield begins, _record(f"{path}, line {begins}", names, cells)
                begins = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _record(place: str, names: list[str], cells: list[str]) -> dict[str, Any]:
    """A line of a CSV as a record."""
    if len(cells) != len(names):
        raise ValueError(
            f"{place}: it has {len(cells)} cells, the first line names {len(names)} columns; a cell that holds the "
            "separator, a quote or a line break stands in double quotes"
        )
    record: dict[str, Any] = dict(zip(names, cells, strict=True))
    for key in record.keys() & LISTS:
        if not record[key].strip():  # left out
            del record[key]
            continue
        try:
            record[key] = parsed(record[key])
        except ValueError as error:
            raise ValueError(
                f"{place}: the cell {key!r} must be the JSON text of a list: it is not JSON ({error})"
            ) from None
    label, options = record.get("label"), record.get("options")
    if isinstance(options, list) and label not in options and str(label).isdecimal():
        record["label"] = int(str(label))
    return record


def _columnar(path: Path, kind: str) -> Numbered:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: {COLUMNAR[kind]} files are read by pyarrow, which is not installed: pip install pyarrow"
        ) from None
    number = 0
    try:
        for batch in _batches(pyarrow, path, kind):
            batch.validate(full=True)  # lengths and offsets that a file says: pyarrow itself follows them anywhere
            # again: a footer does not tell how often a value comes, and may lie
            _check_fits(path, sum(_unpacked(path, column) for column in batch.columns))
            for record in batch.to_pylist():
                number += 1
                yield number, without_nulls(record)
    except (pyarrow.ArrowException, OSError, OverflowError) as error:  # the last of dates that Python does not have
        text = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as {COLUMNAR[kind]}: {text:.400}") from None


def _check_fits(path: Path, size: int) -> None:
    """ValueError for rows of so many bytes that come next out of a file, when fewer are free."""
    free = free_bytes("cpu")
    if free is not None and size > free - SPARE:
        raise ValueError(
            f"{path}: its next rows unpack to {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB of memory are free, of "
            f"which {SPARE / 1e9:.2f} stay so; give fewer rows, or smaller row groups"
        )


def _unpacked(path: Path, column: Any) -> int:
    """Bytes of a pyarrow.Array as Python objects, at the least: what several rows share is made for each of them.
    ValueError for a type whose rows may share more than that tells."""
    from pyarrow import BaseExtensionType, compute, types

    kind = column.type
    if isinstance(kind, BaseExtensionType):
        return _unpacked(path, column.storage)
    if types.is_null(kind) or (types.is_dictionary(kind) and types.is_primitive(kind.value_type)):
        return 8 * len(column)
    if types.is_dictionary(kind) and (types.is_string(kind.value_type) or types.is_large_string(kind.value_type)):
        longest = compute.max(compute.binary_length(column.dictionary)).as_py() or 0
        return len(column) * (8 + longest)
    if types.is_struct(kind):
        return sum(_unpacked(path, column.field(i)) for i in range(kind.num_fields))
    if types.is_map(kind):
        return _unpacked(path, column.keys) + _unpacked(path, column.items)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return 8 * len(column) + _unpacked(path, column.flatten())
    if types.is_nested(kind) or types.is_dictionary(kind) or types.is_run_end_encoded(kind) or "view" in str(kind):
        raise ValueError(
            f"{path}: a column is of the type {kind!s:.80}, which is not read; write strings, numbers, lists"
        )
    return column.nbytes


def _batches(pyarrow: Any, path: Path, kind: str) -> Iterator[Any]:
    if kind == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                _check_fits(path, file.metadata.row_group(group).total_byte_size)
                yield from file.iter_batches(AT_ONCE, [group])
        return
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":  # a file; else a stream, as datasets writes them
            opened = pyarrow.ipc.open_file(source)
            yield from map(opened.get_batch, range(opened.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
