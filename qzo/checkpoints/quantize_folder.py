"""`qzo quantize`: a float checkpoint to 2, 4 or 8 bits, a layer at a time from file to file.

Round to nearest with a least-squares refit of the scales (quantize.py): no data is read. The float model never exists
in memory; where the file's tensors are not named as the model's are, it has to, and transformers loads it.
"""

from pathlib import Path

import torch

from ..kernels.table import named_table
from ..nn.choice import choose, group_for
from ..nn.experts import file_name, split_experts_
from ..nn.layers import layers
from ..nn.quantize import quantize_weight
from ..nn.weights import PackedWeight, check_bits
from .empty import build_empty, read_config
from .formats import TARGETS, files, folder, safetensors_file, told
from .load import from_pretrained, warn_left
from .save import copy_companions, export, write_into
from .source import locate


class Quantizing:
    """The entries of a new file, made when their turn comes: a layer is read and quantized for its codes, and its
    scales and zero points, a few percent of it, are kept until they are written.

    places: tensor -> where it lies, of the float folder; chosen: layer -> Chosen; shapes: layer -> PackedWeight on the
    meta device; form: module of the new format
    """

    def __init__(self, places, chosen, shapes, form, quantization, symmetric):
        self.places, self.chosen, self.shapes, self.form = places, chosen, shapes, form
        self.quantization, self.symmetric = quantization, symmetric
        self._made = {}
        self.squares = [0.0, 0.0]  # of the errors of the weights, and of the weights

    def entries(self):
        """(name, dtype, shape, make) of every tensor of every layer."""
        found = []
        for layer, shape in self.shapes.items():
            for name, dtype, size, make in self._entries(layer, shape):
                known = dtype == torch.int64  # N and K: they stand before all codes in the file, and need none
                found.append((name, dtype, size, make if known else self._later(layer, name)))
        return found

    def error(self):
        """The error of all weights over their size, once everything is written."""
        return (self.squares[0] / self.squares[1]) ** 0.5 if self.squares[1] else 0.0

    def _entries(self, layer, weight):
        return self.form.entries(layer, weight, self.quantization, torch.float16)

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
    path_or_id,
    out,
    *,
    bits=4,
    group_size=None,
    symmetric=True,
    format=None,
    table=None,
    trust_remote_code=False,
    strict=False,
):
    """Write a quantized copy of a float checkpoint, the layers that from_pretrained quantizes, to the folder `out`.

    bits, symmetric, strict : as in qzo.quantize_
    group_size : 32, 64, 128 or -1, the whole row; None: the largest of 128, 64, 32 that divides the inputs of every
        layer, those apart that none divides
    format : "compressed-tensors" (the default), "gptq" or "awq"; "bitsandbytes" with a table
    table : None, or "nf4" or "fp4", whose groups are 64 by default

    Returns {"layers", "bits", "group_size", "symmetric", "table", "format", "error"}; error: of the weights over their
    size, None where transformers had to load the model. Raises ValueError or FileNotFoundError for a checkpoint that is
    not there, is quantized already or cannot be read, a group size that does not fit and a format that is unknown or
    cannot hold these codes.
    """

    check_bits(bits)
    entries = named_table(table)
    format = format or ("compressed-tensors" if table is None else "bitsandbytes")
    if format not in TARGETS:
        raise ValueError(f"format {format!r} is not known; there are {', '.join(TARGETS)}")
    path, out = locate(path_or_id), Path(out)
    known = None if path.is_file() else read_config(path, trust_remote_code)
    if known is None or told.quantization_of(path) is not None:
        raise ValueError(
            f"{path_or_id} is quantized already; qzo export writes it in another format, and a float "
            "checkpoint can be quantized"
        )
    if out.resolve() == path:
        raise ValueError(f"{out} is where the float model is; the source is never overwritten, give another folder")
    model = build_empty(known, torch.float32, trust_remote_code=trust_remote_code)
    split_experts_(model)
    group_size = group_for(model, group_size if table is None else group_size or 64)
    result = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "table": table, "format": format}
    places = folder.tensor_places(path) if any(path.glob("*.safetensors")) else {}
    wanted = {file_name(name, known.model_type): value.shape for name, value in model.state_dict().items()}
    tied = {file_name(name, known.model_type) for name in model.all_tied_weights_keys}
    whole = wanted.keys() - places.keys() <= tied and all(
        torch.Size(places[name][1][1]) == shape for name, shape in wanted.items() if name in places
    )
    if not whole:  # by other names; or damaged, which is told there
        model = from_pretrained(
            path,
            device="cpu",
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            table=table,
            trust_remote_code=trust_remote_code,
            strict=strict,
        )
        export(model, out, format)
        return {"layers": len(layers(model)), **result, "error": None}
    chosen = {
        file_name(name, known.model_type): layer
        for name, layer in choose(model, group_size, strict=strict, table=entries).items()
    }
    zeros = None if symmetric or table is not None else torch.uint8
    shapes = {
        name: PackedWeight.on_meta(layer.out_features, layer.in_features, layer.group_size, bits, zeros, table=entries)
        for name, layer in chosen.items()
    }
    warn_left(places.keys() - wanted.keys(), model, path)
    dense_names = wanted.keys() - {f"{name}.weight" for name in chosen}
    heads = {file_name(name, known.model_type) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    form = TARGETS[format]
    quantization = form.quantization_config(shapes, sorted(heads - set(chosen)))
    made = Quantizing(places, chosen, shapes, form, quantization, symmetric)
    with files.staged(out) as staging:
        copy_companions(path, staging)
        dense = folder.dense_entries(path, dense_names.__contains__)
        write_into(staging, form, [*dense, *made.entries()], files.read_object(path / "config.json"), quantization)
    return {"layers": len(shapes), **result, "error": made.error()}
