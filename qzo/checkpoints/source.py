"""Where a model is, and where it came from: a folder, a GGUF file, or a Hub id that is fetched."""

import dataclasses
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..system import disk
from .formats import hqq

_DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", hqq.FILE]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from: what `save_pretrained` copies.

    kind: a quant_method that formats.FOLDERS knows, "gguf", or "float" (quantized on the way in, with `options`)
    path: the GGUF file or the folder
    sizes: (file name, bytes) of the files that the result is copied from
    dtype: of dense tensors in a file written anew
    names: (owner of tensors in the files, the same in the model) where transformers names them differently
    """

    kind: str
    path: Path
    sizes: tuple
    dtype: torch.dtype
    options: tuple = ()
    names: tuple = ()

    def check(self):
        """FileNotFoundError or ValueError when the files are not those that were loaded."""
        for name, size in self.sizes:
            file = self.path if self.kind == "gguf" else self.path / name
            if not file.exists():
                raise FileNotFoundError(
                    f"{file}, which this model was loaded from, is gone; saving copies it, put it back"
                )
            if file.stat().st_size != size:
                raise ValueError(
                    f"{file} had {size} bytes when this model was loaded and has "
                    f"{file.stat().st_size} now; saving copies it, put the old file back"
                )


def locate(path_or_id):
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
    raise ValueError(f"{path} holds no checkpoint: neither config.json with weights nor a .gguf file")


def _download(name):
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
