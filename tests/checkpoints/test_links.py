"""Sources that are links, as in a Hub cache: the result has the names that were given, and the source stays."""

import os
import shutil
from collections.abc import Callable

import pytest
from safetensors.torch import load_file, save_file

import qzo
from qzo.cli.main import main
from tests.support.checkpoints import quantized, scale_randomly, write_gguf
from tests.support.front_door import GPTQ

SHA = "9f" * 32


def cached_file(folder, name):
    """A GGUF in blobs, under its hash, and a link with its name in snapshots."""
    (folder / "blobs").mkdir()
    (folder / "snapshots").mkdir()
    write_gguf(folder / "blobs" / SHA)
    (folder / "snapshots" / name).symlink_to(f"../blobs/{SHA}")
    return folder / "snapshots" / name


def cached_folder(folder, source):
    """A copy of `source` in two shards, each file a link to a blob."""
    (folder / "blobs").mkdir()
    snapshot = folder / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    tensors = load_file(source / "model.safetensors")
    shards, names = [dict(list(tensors.items())[i::2]) for i in range(2)], {}
    for i, shard in enumerate(shards, 1):
        names[f"model-0000{i}-of-00002.safetensors"] = shard
    for name, shard in names.items():
        save_file(shard, folder / "blobs" / f"{SHA}{name[10]}", metadata={"format": "pt"})
        (snapshot / name).symlink_to(f"../../blobs/{SHA}{name[10]}")
    index = {tensor: name for name, shard in names.items() for tensor in shard}
    (folder / "blobs" / "index").write_text(f'{{"metadata": {{}}, "weight_map": {index}}}'.replace("'", '"'))
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/index")
    shutil.copy(source / "config.json", folder / "blobs" / "config")
    (snapshot / "config.json").symlink_to("../../blobs/config")
    return snapshot


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_gguf_keeps_the_name_that_was_given(by_folder, tmp_path, monkeypatch):
    link = cached_file(tmp_path, "model-q4.gguf")
    monkeypatch.chdir(tmp_path)
    model = qzo.from_pretrained("snapshots" if by_folder else "snapshots/model-q4.gguf", device="cpu")
    scale_randomly(model)
    monkeypatch.chdir("/")  # the source is found from elsewhere, too
    qzo.save_pretrained(model, tmp_path / "out")
    qzo.export(model, tmp_path / "exported", "gguf")
    for out in (tmp_path / "out", tmp_path / "exported"):
        assert names_of(out) == ["model-q4.gguf"]
        assert not (out / "model-q4.gguf").is_symlink()
        back = qzo.from_pretrained(out, device="cpu")
        for name, layer in quantized(model).items():
            assert quantized(back)[name].read_scales().shape == layer.read_scales().shape
    assert link.is_symlink()
    assert (tmp_path / "out" / "model-q4.gguf").read_bytes() != link.read_bytes()
    assert names_of(tmp_path / "blobs") == [SHA]


def test_training_and_replay_keep_it_too(tmp_path):
    link = cached_file(tmp_path, "model-q4.gguf")
    target = tmp_path / "named" / "m.gguf"  # with a tokenizer, which training needs
    target.parent.mkdir()
    write_gguf(
        tmp_path / "blobs" / SHA,
        tokenizer={
            "tokenizer_model": "gpt2",
            "tokenizer_pre": "gpt-2",
            "token_list": [*"abcd", "ab"],
            "token_merges": ["a b"],
        },
    )
    target.symlink_to(link)  # a link to a link
    (tmp_path / "t.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\n' * 2)
    assert (
        main(
            [
                "train",
                "--model",
                str(target),
                "--data",
                str(tmp_path / "t.jsonl"),
                "--output-dir",
                str(tmp_path / "out"),
                "--max-steps",
                "1",
                "--batch-size",
                "1",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert names_of(tmp_path / "out" / "model") == ["m.gguf"]
    assert (
        main(["replay", str(link), str(tmp_path / "out" / "journal.qzo"), "--output-dir", str(tmp_path / "again")]) == 0
    )
    assert names_of(tmp_path / "again") == ["model-q4.gguf"]
    tuned = (tmp_path / "out" / "model" / "m.gguf").read_bytes()
    assert tuned == (tmp_path / "again" / "model-q4.gguf").read_bytes()


@pytest.mark.parametrize("out", ["snapshots", "real", "other", "folder"])
def test_a_source_is_not_overwritten_through_a_link(out, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "real" / "m.gguf")
    (tmp_path / "snapshots" / "m.gguf").symlink_to("../real/m.gguf")
    (tmp_path / "other" / "m.gguf").symlink_to("../snapshots/m.gguf")
    (tmp_path / "folder").symlink_to("real")
    model, before = (
        qzo.from_pretrained(tmp_path / "snapshots" / "m.gguf", device="cpu"),
        os.stat(tmp_path / "real" / "m.gguf"),
    )
    scale_randomly(model)
    for save in (
        lambda: qzo.save_pretrained(model, tmp_path / out),
        lambda: qzo.export(model, tmp_path / out / "m.gguf", "gguf"),
    ):
        with pytest.raises(ValueError, match=f"{out} is where this model was loaded from; the source is never"):
            save()
    assert os.stat(tmp_path / "real" / "m.gguf") == before
    assert names_of(tmp_path / out) == ["m.gguf"]


def test_shards_of_a_cache_keep_their_names_and_are_copies(tmp_path):
    snapshot = cached_folder(tmp_path, GPTQ)
    before = {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    model = qzo.from_pretrained(snapshot, device="cpu")
    scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "out")
    assert names_of(tmp_path / "out") == names_of(snapshot)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert any((tmp_path / "out" / path.name).read_bytes() != path.read_bytes() for path in snapshot.glob("*-of-*"))
    qzo.export(model, tmp_path / "awq", "compressed-tensors")
    assert not any(path.is_symlink() for path in (tmp_path / "awq").iterdir())
    assert {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()} == before
    (tmp_path / "link").symlink_to(snapshot)
    for save in (qzo.save_pretrained, lambda model, out: qzo.export(model, out, "compressed-tensors")):
        with pytest.raises(ValueError, match="link is where this model was loaded from"):
            save(model, tmp_path / "link")


def test_a_link_that_is_led_elsewhere_is_noticed(tmp_path):
    link = cached_file(tmp_path, "m.gguf")
    model = qzo.from_pretrained(link, device="cpu")
    write_gguf(tmp_path / "blobs" / "other", layers=1)
    link.unlink()
    link.symlink_to("../blobs/other")
    with pytest.raises(ValueError, match=r"m.gguf had .* bytes when this model was loaded"):
        qzo.save_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize("where", ["notes.txt", "inner/notes.txt"])
def test_a_link_out_of_the_folder_is_not_copied_into_the_result(where, tmp_path):
    """A checkpoint that somebody else has packed may name any file of the user's."""
    secret = tmp_path / "secret"
    secret.write_text("a key")
    shutil.copytree(GPTQ, tmp_path / "base")
    link = tmp_path / "base" / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret)
    model = qzo.from_pretrained(tmp_path / "base", device="cpu")
    saves: list[Callable[[], object]] = [lambda: qzo.save_pretrained(model, tmp_path / "out")]
    if where == "notes.txt":  # a new folder takes no folders along
        saves.append(lambda: qzo.export(model, tmp_path / "out", "compressed-tensors"))
    for save in saves:
        with pytest.raises(ValueError, match=rf"{where} is a link to .*secret, outside of the checkpoint"):
            save()
        assert not (tmp_path / "out").exists()
    link.unlink()
    link.symlink_to(tmp_path / "base" / "config.json")  # inside it
    qzo.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out" / where).is_symlink()
