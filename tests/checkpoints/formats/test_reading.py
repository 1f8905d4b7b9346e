"""What transformers raises, as one ValueError that names the folder; what is not about the folder stays what it is."""

import errno
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from qzo.checkpoints.formats.reading import make_config, read_config, reading


def raised(error):
    """What comes out of `reading` where `error` is raised inside."""
    with pytest.raises(BaseException) as caught, reading("a/folder", "it cannot be read"):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bad\n  value"), "a/folder: it cannot be read: bad value"),
        (OSError("no such repository"), "a/folder: it cannot be read: no such repository"),
        (KeyError("x"), "a/folder: it cannot be read: KeyError: 'x'"),
        (AssertionError(), "a/folder: it cannot be read: AssertionError: "),
        (RuntimeError("y" * 500), "a/folder: it cannot be read: RuntimeError: " + "y" * 400),
    ],
)
def test_it_is_one_line_that_names_the_folder(error, message):
    found = raised(error)
    assert type(found) is ValueError
    assert str(found) == message
    assert found.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        PermissionError("closed"),
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_the_folders_fault_stays_what_it_is(error):
    assert raised(error) is error


def test_code_of_its_own_is_asked_for():
    """transformers' text is about its own argument, and prints the whole path twice."""
    found = raised(ValueError("... please pass the argument `trust_remote_code=True` to allow custom code"))
    assert str(found) == (
        "a/folder brings code of its own, which is run only with trust_remote_code=True (on the command line: "
        "--trust-remote-code); read it first"
    )
    assert found.__cause__ is None


def test_configs(tmp_path):
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path)
    assert read_config(tmp_path).hidden_size == 64
    assert make_config(tmp_path, {"model_type": "llama", "hidden_size": 96}).hidden_size == 96
    (tmp_path / "config.json").write_text('{"model_type": "llamb"}')
    with pytest.raises(ValueError, match=rf"^{tmp_path}: its config\.json cannot be read: .*llamb"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"^x\.gguf: its metadata make no model: .*llamb"):
        make_config(Path("x.gguf"), {"model_type": "llamb"})
