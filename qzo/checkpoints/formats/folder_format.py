"""Formats that are a folder of weights and a config.json with a quantization_config: what all of them share."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from . import files
from .folder import copy_companions, read_weights, save_scales, scale_changes, weight_files
from .protocol import Change, Checkpoint, Entry, Find, Make, Quantization, SavedScales
from .reading import read_config

LEAST_LAYER_BYTES = 512  # less than a layer of any model takes, in 2 bits too


@dataclasses.dataclass(frozen=True)
class FolderFormat:
    """A protocol.Copied, made of functions; method, scales, save and saved_scales are told there.

    check_config: of a quantization_config and the place to name; ValueError for what cannot be read
    weights: yields the entries of (folder, quantization_config, dtype or None)
    weight_files: the files of a folder that hold the weights
    for_servers: as protocol.Format; none are by default
    float_zeros: of a folder, as Checkpoint.float_zeros; none are by default
    """

    method: str
    check_config: Callable[[Quantization, object], object]
    weights: Callable[[Path, Quantization, torch.dtype | None], Iterator[Entry]]
    save: Callable[[Path, Path, Find], None]
    saved_scales: Callable[[Path, Find], Iterator[SavedScales]]
    scales: str | None = None
    weight_files: Callable[[Path], set[Path]] = weight_files
    for_servers: Callable[[str], bool] = lambda name: False
    float_zeros: Callable[[Path], str | None] = lambda folder: None
    quantized = True

    def open(self, path: Path, quantization: Quantization | None, trust_remote_code: bool) -> Checkpoint:
        """As protocol.Format."""
        assert quantization is not None, path
        config = read_config(path, trust_remote_code)
        self.check_config(quantization, path)
        used = sorted({*self.weight_files(path), path / "config.json"})
        held = tuple((file, file.stat().st_size) for file in used)
        check_depth(config, path, sum(size for _, size in held))
        return Checkpoint(
            format=self,
            path=path,
            config=config,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
            files=held,
            dtype=config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16,
            read=functools.partial(self.weights, path, quantization),
            float_zeros=functools.partial(self.float_zeros, path),
        )

    def take_along(self, path: Path, staging: Path) -> None:
        """As protocol.Format."""
        copy_companions(path, staging)

    def new_config(self, path: Path, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
        """As protocol.Format: dense tensors are the file's own, and so is what it says of them."""
        return files.read_object(path / "config.json")


@dataclasses.dataclass(frozen=True)
class GatheredFormat(FolderFormat):
    """A protocol.Gathered; `gathered` makes one."""

    parts: tuple[str, ...] = ()
    packer: Callable[[Quantization, object], Make] = dataclasses.field(kw_only=True)
    changed_scales: Callable[[Path, Find], Iterator[Change]] = dataclasses.field(kw_only=True)


def gathered(
    method: str,
    check_config: Callable[[Quantization, object], object],
    packer: Callable[[Quantization, object], Make],
    parts: tuple[str, ...],
    scales: str,
    transposed: bool = False,
) -> GatheredFormat:
    """The format of folders whose layers are a few tensors each, in safetensors files.

    check_config, packer, parts: as in FolderFormat and protocol.Gathered
    scales: the name of a layer's scales, [G, N] or, transposed, [N, G]
    """

    def changed_scales(folder: Path, find: Find) -> Iterator[Change]:
        return scale_changes(folder, find, scales, transposed)

    def weights(folder: Path, quantization: Quantization, dtype: torch.dtype | None) -> Iterator[Entry]:
        return read_weights(folder, dtype, parts, packer(quantization, folder))

    def save(folder: Path, staging: Path, find: Find) -> None:
        save_scales(folder, staging, changed_scales(folder, find))

    def saved_scales(folder: Path, find: Find) -> Iterator[SavedScales]:
        for layer, new, _, _ in changed_scales(folder, find):
            yield layer, (new.T if transposed else new).to(torch.float32), None

    return GatheredFormat(
        method,
        check_config,
        weights,
        save,
        saved_scales,
        scales,
        parts=parts,
        packer=packer,
        changed_scales=changed_scales,
    )


def check_depth(config: PretrainedConfig, folder: Path, held: int) -> None:
    """ValueError for a config of more layers than the files can hold: even empty ones take memory."""
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(depth, int) or depth * LEAST_LAYER_BYTES > held:
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers is {depth!r:.40}, the files have {held} bytes "
            "in all; one of them is damaged"
        )
