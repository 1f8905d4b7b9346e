"""Where a model is, what is there, and where it came from: a folder, a GGUF file, or a Hub id that is fetched."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..system import disk
from .formats import COPIED, FORMATS, format_of, hqq, told
from .formats.protocol import Checkpoint, Copied, Format
from .names import Names

_DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", hqq.FILE]
_ATTRIBUTE = "_qzo_source"  # of a model; copied along with it


def open_checkpoint(path_or_id: str | Path, trust_remote_code: bool = False, weight_only: bool = False) -> Checkpoint:
    """The checkpoint of a folder, GGUF file or Hub id, quantized or not; no weight of it is read.

    trust_remote_code, weight_only : as in qzo.from_pretrained

    Raises FileNotFoundError for a path that is not there, ValueError for what cannot be read; the message names the
    format, file or key.
    """
    path = locate(path_or_id)
    quantization = None if path.is_file() else told.quantization_of(path)
    read = _as_weights(path, quantization) if weight_only and quantization else quantization
    checkpoint = format_of(path, quantization).open(path, read, trust_remote_code)
    told.forget(checkpoint.config)
    return dataclasses.replace(checkpoint, quantization=quantization)


def _as_weights(folder: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    """A quantization_config without what it says of inputs; a warning tells what is left out."""
    read, left = told.weight_only(quantization)
    if left:
        warnings.warn(
            f"{folder}: {left} of its quantization_config are left out, as weight_only asks: what goes into each layer "
            "is rounded where the model is served, not here; measure the tuned model there",
            stacklevel=4,
        )
    return read


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from: what saving it copies.

    method: of its format, one of formats.FORMATS; a name, since copies of a model and pickles of it hold it
    path: the GGUF file or the folder
    files: (path, bytes) of the files that the result is copied from
    dtype: of dense tensors in a file written anew
    names: (owner of tensors in the files, the same in the model) where transformers names them differently
    """

    method: str
    path: Path
    files: tuple[tuple[Path, int], ...]
    dtype: torch.dtype
    names: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, names: Names | None = None) -> "Source":
        """Of a checkpoint that was loaded; names: of its tensors in the model."""
        changed = tuple(names.changed.items()) if names is not None else ()
        return cls(checkpoint.format.method, checkpoint.path, checkpoint.files, checkpoint.dtype, changed)

    @property
    def format(self) -> Format:
        """Its format."""
        return FORMATS[self.method]

    @property
    def copied(self) -> Copied | None:
        """Its format if a copy of it can hold what was trained, else None: it is saved as a new folder."""
        return COPIED.get(self.method)

    def check(self) -> None:
        """FileNotFoundError or ValueError when the files are not those that were loaded."""
        for file, size in self.files:
            if not file.exists():
                raise FileNotFoundError(
                    f"{file}, which this model was loaded from, is gone; saving copies it, put it back"
                )
            if file.stat().st_size != size:
                raise ValueError(
                    f"{file} had {size} bytes when this model was loaded and has "
                    f"{file.stat().st_size} now; saving copies it, put the old file back"
                )


def source_of(model: Any) -> Source | None:
    """Where a model came from; None for one that was not loaded from files."""
    return getattr(model, _ATTRIBUTE, None)


def set_source(model: Any, source: Source) -> None:
    """Remember where a model came from: `source_of` tells it."""
    setattr(model, _ATTRIBUTE, source)


def locate(path_or_id: str | Path) -> Path:
    """The GGUF file or checkpoint folder meant; a link keeps its own name: those of a Hub cache lead to hashes."""
    path = Path(path_or_id).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file but no .gguf; give a .gguf file or a checkpoint folder")
        return path.parent.resolve() / path.name
    if not path.exists():
        return _download(str(path_or_id)).resolve()
    weights = any(any(path.glob(name)) for name in ("*.safetensors", "pytorch_model*.bin", hqq.FILE))
    if weights and (path / "config.json").exists():
        return path.resolve()
    found = sorted(p.name for p in path.glob("*.gguf"))
    if len(found) == 1:
        return path.resolve() / found[0]
    if found:
        raise ValueError(
            f"{path} holds {len(found)} GGUF files "
            f"({', '.join(found[:4])}{', ...' if found[4:] else ''}); give the path of one of "
            "them"
        )
    if (path / "config.json").exists():
        raise ValueError(
            f"{path} holds a config.json and no weights: fetch its *.safetensors (or pytorch_model*.bin) files too"
        )
    raise ValueError(f"{path} holds no checkpoint: neither config.json with weights nor a .gguf file")


def _download(name: str) -> Path:
    absent = f"no such file or folder: {name}; give a checkpoint folder, a .gguf file, or a Hub id"
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith((".gguf", "/")):
        raise FileNotFoundError(absent)
    try:
        with disk.naming(constants.HF_HUB_CACHE):
            folder = snapshot_download(name, allow_patterns=_DOWNLOADED)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if disk.full(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{absent} ({name} could not be fetched: {reason})") from None
    return Path(folder)
