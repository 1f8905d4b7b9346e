"""The tokenizer that a checkpoint brings along, or a reason why there is none."""

import shutil

import pytest
from transformers import PreTrainedTokenizerFast

from qzo.checkpoints.tokenizer import load_tokenizer, tokenizer_digest
from tests.support import tiny
from tests.support.checkpoints import write_gguf
from tests.support.paths import FIXTURES

CT = FIXTURES / "ct-w4a16-sym-g64-bias-tied"


def test_tokenizer_of_a_folder_and_of_a_gguf_without(tmp_path):
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b").save_pretrained(tmp_path / "folder")
    shutil.copytree(CT, tmp_path / "folder", dirs_exist_ok=True)
    assert load_tokenizer(tmp_path / "folder").eos_token_id == 1
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m\.gguf holds no tokenizer"):
        load_tokenizer(tmp_path / "m.gguf")


def test_a_folder_and_none(tmp_path):
    assert load_tokenizer(tiny.save_checkpoint(tmp_path / "in"))("red warm")["input_ids"] == [3, 18]
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_tokenizer(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[1]"),
        ("tokenizer.json", '{"version": "1.0", '),
        ("tokenizer.json", '{"model": {"type": "x"}}'),
        ("tokenizer.json", None),
    ],
)
def test_a_tokenizer_that_cannot_be_read(tmp_path, name, content):
    folder = tiny.save_checkpoint(tmp_path / "in")
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^{folder}: its tokenizer cannot be read: ") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_digest_differs_where_tokens_do(tmp_path):
    base = tiny.save_checkpoint(tmp_path / "in")
    plain = tokenizer_digest(load_tokenizer(base))
    assert plain.startswith("sha256:")
    assert tokenizer_digest(load_tokenizer(base)) == plain
    words = (base / "tokenizer.json").read_text()
    other = load_tokenizer(base)
    other.chat_template = "{{ messages }}"
    found = [tokenizer_digest(other)]
    for old, new in (('"one": 20', '"one": 21'), ('"Whitespace"', '"WhitespaceSplit"')):
        assert words.count(old) == 1
        (base / "tokenizer.json").write_text(words.replace(old, new))
        found.append(tokenizer_digest(load_tokenizer(base)))
    (base / "tokenizer.json").write_text(words)
    config = (base / "tokenizer_config.json").read_text()
    (base / "tokenizer_config.json").write_text(config.replace('"eos_token": "<eos>"', '"eos_token": "<pad>"'))
    found.append(tokenizer_digest(load_tokenizer(base)))
    assert len({plain, *found}) == 5
