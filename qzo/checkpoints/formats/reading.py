"""What transformers, or a folder's own code, is asked to read: its errors as one ValueError that names the folder."""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ...system import disk
from ...system.memory import is_out_of_memory


class reading(contextlib.AbstractContextManager[None]):
    """Inside, what transformers, or a folder's own code, raises for what it cannot read is one ValueError.

    A full disk, missing memory and a file that is gone or closed to the user stay what they are.
    """

    def __init__(self, folder: Path | str, what: str) -> None:
        self.folder, self.what = folder, what

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, FileNotFoundError | PermissionError):
            return
        if disk.full(error) or is_out_of_memory(error):
            return
        text = " ".join(str(error).split())
        if "trust_remote_code=True" in text:
            raise ValueError(
                f"{self.folder} brings code of its own, which is run only with trust_remote_code=True (on "
                "the command line: --trust-remote-code); read it first"
            ) from None
        named = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{self.folder}: {self.what}: {named}{text:.400}") from error


def read_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The transformers config of a folder."""
    with reading(folder, "its config.json cannot be read"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def make_config(path: Path, arguments: dict[str, Any]) -> PretrainedConfig:
    """The transformers config of these arguments, model_type among them, which a GGUF file's metadata gave."""
    with reading(path, "its metadata make no model"):
        return AutoConfig.for_model(**arguments)
