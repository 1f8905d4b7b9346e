"""Float checkpoints: a folder that transformers reads, whose Linears are quantized on the way in.

There is no copy of one with new scales, so it is no protocol.Copied: it is saved as a new folder in a Target's format.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from . import files, gptq, safetensors_file, told
from .folder import copy_companions, read_dense
from .protocol import Checkpoint, Quantization
from .reading import read_config

METHOD = "float"
_QUANTIZED = (".qweight", ".weight_packed", ".W_q", ".weight.absmax", ".weight.quant_map", ".SCB")


class FloatFormat:
    """A protocol.Format of folders without a quantization_config."""

    method, quantized, scales = METHOD, False, None

    def open(self, path: Path, quantization: Quantization | None, trust_remote_code: bool) -> Checkpoint:
        """As protocol.Format; `read` needs safetensors files."""
        config = read_config(path, trust_remote_code)
        _refuse_codes(path)
        return Checkpoint(
            format=self,
            path=path,
            config=config,
            quantization=None,
            trust_remote_code=trust_remote_code,
            files=((path / "config.json", (path / "config.json").stat().st_size),),
            dtype=config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32,
            read=lambda dtype: read_dense(path, dtype),
        )

    def for_servers(self, name: str) -> bool:
        """As protocol.Format: none is."""
        return False

    def take_along(self, path: Path, staging: Path) -> None:
        """As protocol.Format."""
        copy_companions(path, staging)

    def new_config(self, path: Path, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
        """As protocol.Format."""
        return files.read_object(path / "config.json") | {"dtype": str(dtype).removeprefix("torch.")}


def _refuse_codes(folder: Path) -> None:
    """ValueError for quantized tensors: transformers would put random weights in the place of these."""
    stored = {name for file in folder.glob("*.safetensors") for name in safetensors_file.places(file)}
    for name in sorted(stored):
        vectors = name.endswith(".codebooks") and f"{name.removesuffix('books')}s" in stored  # AQLM's
        if name.endswith(_QUANTIZED) or vectors:
            raise ValueError(
                f"{folder} holds the quantized tensor {name}, and its config.json has no "
                "quantization_config that tells how to read it; add the one that this model is published "
                f"with, there or as {gptq.CONFIG} (GPTQ) or {told.AWQ_CONFIG} (AWQ)"
            )


FORMAT = FloatFormat()
