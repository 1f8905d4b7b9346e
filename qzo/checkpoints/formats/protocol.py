"""What a format of checkpoints has to be able to do, and what is known of a checkpoint once it is open.

A format is an object with the members of `Format`. What else it can do is told by what else it has: `Copied` for one
whose files can be written again with new scales, `Gathered` for one whose layers transformers gathers tensor by tensor.
`Target` is another thing: how a layer of any format is written to a new folder. formats/__init__.py lists all of them.
Paths are those of source.locate: a folder, or the file of a format whose checkpoint is one file.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig

from ...nn.weights import PackedWeight

Quantization = Mapping[str, Any]  # a quantization_config; empty for HQQ's own folders
Place = tuple[str, tuple[int, ...], int, int]  # of a tensor in its file: safetensors_file.places
Entry = tuple[str, PackedWeight | torch.Tensor, str]  # Hugging Face name, what it is, where it came from
Find = Callable[[str], PackedWeight | None]  # the layer whose weight has this name in the files; None: not in codes
SavedScales = tuple[str, torch.Tensor, torch.Tensor | None]  # layer, scales [G, N], zeros, None: the same; in float32
Change = tuple[str, torch.Tensor, Path, Place]  # layer, its scales as the file holds them, file, where in it
NewTensor = tuple[str, torch.dtype, Iterable[int], Callable[[], torch.Tensor]]  # as safetensors_file.write takes them
Make = Callable[[str, Mapping[str, torch.Tensor]], PackedWeight]  # (layer, {part: tensor}) -> the layer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open: all is known but the values of its tensors.

    path: the folder, or the file
    config: transformers', without its quantization_config
    quantization: the quantization_config; None where there is none
    files: (path, bytes) of the files that a saved copy is made from
    dtype: of dense tensors in a file written anew
    read: read(dtype) yields every tensor as an Entry, dense ones in `dtype`, with None as they are stored (float16
        where a file's blocks are no dtype); one is held at a time
    stored_types: stored_types() gives {Hugging Face name: (type, bytes)} where the entries' dtypes do not tell them
    float_zeros: float_zeros() gives the name of a layer whose zero points are no integers, None where there is none
    """

    format: "Format"
    path: Path
    config: PretrainedConfig
    quantization: Quantization | None
    trust_remote_code: bool
    files: tuple[tuple[Path, int], ...]
    dtype: torch.dtype
    read: Callable[[torch.dtype | None], Iterator[Entry]]
    stored_types: Callable[[], Mapping[str, tuple[str, int]]] = dict
    float_zeros: Callable[[], str | None] = lambda: None

    @property
    def quantized(self) -> bool:
        """Whether its layers are in codes; those of a float one are quantized on the way in."""
        return self.format.quantized


class Format(Protocol):
    """What every format has.

    method: its name: the quant_method, "gguf" or "float"
    quantized: whether its layers are in codes; those that are not are quantized on the way in
    scales: the name of a layer's scales in files whose dense tensors a new folder takes over as they are; None where
        it takes them from the model
    """

    @property
    def method(self) -> str: ...

    @property
    def quantized(self) -> bool: ...

    @property
    def scales(self) -> str | None: ...

    def open(self, path: Path, quantization: Quantization | None, trust_remote_code: bool, /) -> Checkpoint:
        """ValueError naming what of it cannot be read."""
        ...

    def for_servers(self, name: str, /) -> bool:
        """Whether a tensor of its files is read by servers only: a copy keeps it, a model and a new folder lack it."""
        ...

    def take_along(self, path: Path, staging: Path, /) -> None:
        """Write to `staging` what a new folder has beside weights and config.json: the tokenizer, licences."""
        ...

    def new_config(self, path: Path, config: PretrainedConfig, dtype: torch.dtype, /) -> dict[str, Any]:
        """The config.json of a new folder; config, dtype: of the model and its dense tensors."""
        ...


class Copied(Format, Protocol):
    """One that is saved as a copy of its source: the bytes of scales change, and no others.

    Both raise ValueError for a scale that the file's dtype cannot hold, before anything is written.
    """

    def save(self, path: Path, target: Path, find: Find, /) -> None:
        """Write a copy of `path` to `target`, with the scales of the layers that `find` gives."""
        ...

    def saved_scales(self, path: Path, find: Find, /) -> Iterator[SavedScales]:
        """Yield what `save` would write; (layer.codebooks, float32, None) for codebooks that train."""
        ...


class Gathered(Copied, Protocol):
    """One that transformers' own from_pretrained and save_pretrained can be taught.

    parts: the names of a layer's tensors; the first is always there
    """

    @property
    def parts(self) -> tuple[str, ...]: ...

    def packer(self, quantization: Quantization, where: object, /) -> Make:
        """What makes a layer of its tensors; ValueError for a quantization_config that cannot be read."""
        ...

    def changed_scales(self, folder: Path, find: Find, /) -> Iterator[Change]:
        """Yield the scales of each layer as `save` would write them."""
        ...


@dataclasses.dataclass(frozen=True)
class Target:
    """A format that new folders are written in.

    quantization_config: of layers {name: PackedWeight} and the names of the Linears that stay dense; ValueError for
        what it cannot hold exactly
    entries: the tensors of a layer in its file, of (name, PackedWeight, quantization_config, dtype of scales)
    repeated_in: the file that has the quantization_config a second time, if one has
    """

    method: str
    quantization_config: Callable[[Mapping[str, PackedWeight], list[str]], dict[str, Any]]
    entries: Callable[[str, PackedWeight, Quantization, torch.dtype], list[NewTensor]]
    repeated_in: str | None = None
