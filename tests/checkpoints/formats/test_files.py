"""Files that are whole or not there: a folder that is staged, JSON that is read, bytes that are patched."""

import errno
import os
import stat

import pytest

from qzo.checkpoints.formats import files


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_staged_files_appear_when_all_are_written_and_the_config_last(tmp_path, monkeypatch):
    out, moved, replace = tmp_path / "deep/out", [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(new.name), replace(old, new))[1])
    with files.staged(out) as staging:
        for name in ("config.json", "a", "sub/z"):
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(name)
        assert contents(out) == {f"{staging.name}/{name}": name for name in ("config.json", "a", "sub/z")}
    assert moved == ["a", "z", "config.json"]
    assert contents(out) == {name: name for name in ("config.json", "a", "sub/z")}
    assert not staging.exists()


def test_a_folder_that_has_a_config_is_of_one_model(tmp_path, monkeypatch):
    """Files of a model that is there are replaced one by one: who looks between two of them finds no config.json."""
    names, replace, seen = ("a", "b", "config.json"), os.replace, []
    for name in names:
        (tmp_path / name).write_text("old")

    def look_and_replace(old, new):
        replace(old, new)
        seen.append({name: (tmp_path / name).read_text() for name in names if (tmp_path / name).exists()})

    monkeypatch.setattr(os, "replace", look_and_replace)
    with files.staged(tmp_path) as staging:
        for name in names:
            (staging / name).write_text("new")
    assert seen == [{"a": "new", "b": "old"}, {"a": "new", "b": "new"}, dict.fromkeys(names, "new")]


def test_files_of_other_names_stay(tmp_path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "a").write_text("old")
    with files.staged(tmp_path) as staging:
        (staging / "a").write_text("new")
    assert contents(tmp_path) == {"notes": "mine", "a": "new"}


@pytest.mark.parametrize("made_before", [False, True])
def test_an_error_leaves_the_folder_as_it_was(tmp_path, made_before):
    out = tmp_path / "deep/out"
    if made_before:
        out.mkdir(parents=True)
        (out / "a").write_text("old")

    def write_half():
        with files.staged(out) as staging:
            (staging / "a").write_text("half")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_half()
    assert out.exists() == (tmp_path / "deep").exists() == made_before
    assert contents(tmp_path) == ({"deep/out/a": "old"} if made_before else {})


def test_a_full_disk_names_the_folder(tmp_path):
    with pytest.raises(OSError, match="No space left on device") as caught, files.staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path / "out") in str(caught.value)


def test_a_file_is_no_folder_to_write_into(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file; give a folder to write"), files.staged(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_a_copy_of_a_read_only_file_can_be_written(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "a").chmod(0o400)
    files.copy(tmp_path / "a", tmp_path / "sub/b")
    assert (tmp_path / "sub/b").read_text() == "x"
    assert (tmp_path / "sub/b").stat().st_mode & stat.S_IWUSR


def test_chunks_are_patched_in_place(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    files.patch(tmp_path / "a", [(7, b"xy"), (0, b"z")])
    assert (tmp_path / "a").read_bytes() == b"z123456xy9"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "config.json holds a JSON list, not an object; fetch it again"),
        (b"3", "holds a JSON int, not an object"),
        (b"{", "config.json is not JSON: Expecting property name"),
        (b"\xff\xfe", "config.json is not JSON: "),
        (b"[" * 100_000, "config.json is not JSON: it is nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        files.read_object(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_an_object_is_read(tmp_path):
    (tmp_path / "a").write_text('{"x": [1]}')
    assert files.read_object(tmp_path / "a") == {"x": [1]}
