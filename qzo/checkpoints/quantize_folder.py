"""`qzo quantize`: a float checkpoint to 2, 4 or 8 bits, a layer at a time from file to file.

Round to nearest with a least-squares refit of the scales (quantize.py): no data is read. The float model never exists
in memory; where the file's tensors are not named as the model's are, it has to, and transformers loads it.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..kernels.table import named_table
from ..kernels.tiles import GROUPS
from ..nn.choice import Chosen, choose, group_for
from ..nn.experts import file_name, split_experts_
from ..nn.layers import layers
from ..nn.quantize import check_form, quantize_weight
from ..nn.weights import PackedWeight, check_group_size
from .empty import build_empty
from .formats import TARGETS, files, folder, safetensors_file
from .formats.protocol import Checkpoint, NewTensor, Place, Quantization, Target
from .load import from_pretrained, warn_left
from .new_folder import write_into
from .save import export
from .source import open_checkpoint

T = TypeVar("T")


class Quantizing:
    """The entries of a new file, made when their turn comes: a layer is read and quantized for its codes, and its
    scales and zero points, a few percent of it, are kept until they are written.

    places: tensor -> where it lies, of the float folder; chosen: layer -> Chosen; shapes: layer -> PackedWeight on the
    meta device; target: the new format
    """

    def __init__(
        self,
        places: Mapping[str, tuple[Path, Place]],
        chosen: Mapping[str, Chosen],
        shapes: Mapping[str, PackedWeight],
        target: Target,
        quantization: Quantization,
        symmetric: bool,
    ) -> None:
        self.places, self.chosen, self.shapes, self.target = places, chosen, shapes, target
        self.quantization, self.symmetric = quantization, symmetric
        self._made: dict[str, Callable[[], torch.Tensor]] = {}
        self.squares = [0.0, 0.0]  # of the errors of the weights, and of the weights

    def entries(self) -> list[NewTensor]:
        """(name, dtype, shape, make) of every tensor of every layer."""
        found: list[NewTensor] = []
        for layer, shape in self.shapes.items():
            for name, dtype, size, make in self._entries(layer, shape):
                known = dtype == torch.int64  # N and K: they stand before all codes in the file, and need none
                found.append((name, dtype, size, make if known else self._later(layer, name)))
        return found

    def error(self) -> float:
        """The error of all weights over their size, once everything is written."""
        return (self.squares[0] / self.squares[1]) ** 0.5 if self.squares[1] else 0.0

    def _entries(self, layer, weight):
        return self.target.entries(layer, weight, self.quantization, torch.float16)

    def _later(self, layer, name):
        return lambda: self._give(layer, name)

    def _give(self, layer, name):
        if name not in self._made:
            shape = self.shapes[layer]
            weight = self.chosen[layer].matrix(safetensors_file.read(*self.places[f"{layer}.weight"]))
            try:
                packed = quantize_weight(weight, shape.group_size, self.symmetric, shape.bits, shape.table)
            except ValueError as error:
                raise ValueError(f"{layer}: {error}") from None
            for rows, wanted in zip(packed.dequantize().split(1024), weight.split(1024), strict=True):
                self.squares[0] += float((rows - wanted.float()).square().sum())
                self.squares[1] += float(wanted.float().square().sum())
            self._made |= {
                name: make() for name, dtype, _, make in self._entries(layer, packed) if dtype != torch.int64
            }
        return self._made.pop(name)


def quantize_folder(
    path_or_id: str | Path,
    out: str | Path,
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    method: str | None = None,
    table: str | None = None,
    trust_remote_code: bool = False,
    strict: bool = False,
) -> dict[str, Any]:
    """Write a quantized copy of a float checkpoint, the layers that from_pretrained quantizes, to the folder `out`.

    bits, symmetric, strict : as in qzo.quantize_
    group_size : 32, 64, 128 or -1, the whole row; None: the largest of 128, 64, 32 that divides the inputs of every
        layer, those apart that none divides
    method : of the new checkpoint, "compressed-tensors" (the default), "gptq" or "awq"; "bitsandbytes" with a table
    table : None, or "nf4" or "fp4", whose groups are 64 by default

    Returns {"layers", "bits", "group_size", "symmetric", "table", "format", "error"}; error: of the weights over their
    size, None where transformers had to load the model. Raises ValueError or FileNotFoundError for a checkpoint that is
    not there, is quantized already or cannot be read, a group size that does not fit and a format that is unknown or
    cannot hold these codes.
    """
    check_form(bits, symmetric, named_table(table))
    if group_size is not None:
        check_group_size(group_size, math.lcm(*GROUPS))
    method = method or ("compressed-tensors" if table is None else "bitsandbytes")
    if method not in TARGETS:
        raise ValueError(f"format {method!r} is not known; there are {', '.join(TARGETS)}")
    checkpoint, out = open_checkpoint(path_or_id, trust_remote_code), Path(out)
    if checkpoint.quantized:
        raise ValueError(
            f"{path_or_id} is quantized already; qzo export writes it in another format, and a float "
            "checkpoint can be quantized"
        )
    if out.resolve() == checkpoint.path:
        raise ValueError(f"{out} is where the float model is; the source is never overwritten, give another folder")
    model = build_empty(checkpoint.config, torch.float32, trust_remote_code=trust_remote_code)
    split_experts_(model)
    group_size = group_for(model, group_size if table is None else group_size or 64)
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "table": table}
    places = _places(checkpoint, model)
    if places is None:
        loaded = from_pretrained(
            checkpoint.path, device="cpu", trust_remote_code=trust_remote_code, strict=strict, **options
        )
        export(loaded, out, method)
        return {"layers": len(layers(loaded)), **options, "format": method, "error": None}
    chosen = choose(model, group_size, strict=strict, table=named_table(table))
    error = _write_streamed(checkpoint, model, chosen, places, out, TARGETS[method], options)
    return {"layers": len(chosen), **options, "format": method, "error": error}


def _file_names(model: Any, named: Mapping[str, T]) -> dict[str, T]:
    """What is named as the model has it, by its names in files."""
    return {file_name(name, model.config.model_type): value for name, value in named.items()}


def _places(checkpoint: Checkpoint, model: Any) -> dict[str, tuple[Path, Place]] | None:
    """tensor -> where it lies; None where the files have other names, which transformers knows, or no safetensors; or
    are damaged, which is told when the model is loaded."""
    if not any(checkpoint.path.glob("*.safetensors")):
        return None
    places, wanted = folder.tensor_places(checkpoint.path), _file_names(model, model.state_dict())
    there = all(torch.Size(places[name][1][1]) == value.shape for name, value in wanted.items() if name in places)
    absent = wanted.keys() - places.keys() - _file_names(model, model.all_tied_weights_keys).keys()
    return places if there and not absent else None


def _write_streamed(
    checkpoint: Checkpoint,
    model: Any,
    found: dict[str, Chosen],
    places: dict[str, tuple[Path, Place]],
    out: Path,
    target: Target,
    options: dict[str, Any],
) -> float:
    """Quantize a float folder from file to file; returns the error of its layers."""
    chosen, bits, table = _file_names(model, found), options["bits"], named_table(options["table"])
    zeros = None if options["symmetric"] or table is not None else torch.uint8
    shapes = {
        name: PackedWeight.on_meta((layer.out_features, layer.in_features), layer.group_size, bits, zeros, table=table)
        for name, layer in chosen.items()
    }
    wanted = _file_names(model, model.state_dict()).keys()
    warn_left(places.keys() - wanted, model, checkpoint.path)
    dense_names = wanted - {f"{name}.weight" for name in chosen}
    stay = {name for name, m in _file_names(model, dict(model.named_modules())).items() if isinstance(m, nn.Linear)}
    quantization = target.quantization_config(shapes, sorted(stay - set(chosen)))
    made = Quantizing(places, chosen, shapes, target, quantization, options["symmetric"])
    with files.staged(out) as staging:
        checkpoint.format.take_along(checkpoint.path, staging)
        dense = folder.dense_entries(checkpoint.path, dense_names.__contains__)
        config = files.read_object(checkpoint.path / "config.json")
        write_into(staging, target, [*dense, *made.entries()], config, quantization)
    return made.error()
