"""AQLM (arXiv 2401.06118): codes that stand for vectors of eight weights, sums of codebook entries.

    codes         int8 (up to 8 bits) or int16 [N, K/8, C], two's complement: an index is the code modulo 2^bits
    codebooks     float16 or float32 [C, 2^bits, 1, 8]
    scales        float16 or float32 [N, 1, 1, 1]

with config.json's quantization_config {nbits_per_codebook, num_codebooks, in_group_size 8, out_group_size 1}. Scales
train; codebooks too where asked for (qzo.train_codebooks_), and are written back then.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from ...kernels.vectors import LENGTH, MOST_BITS
from ...nn.weights import PackedWeight
from . import files, safetensors_file
from .folder import copy_all, read_weights, tensor_places
from .folder_format import FolderFormat
from .protocol import Entry, Find, Quantization, SavedScales
from .rounding import stored_scales

METHOD = "aqlm"
_PARTS = ("codes", "codebooks", "scales")
_FIELDS = {"in_group_size": LENGTH, "out_group_size": 1}


def check_config(quantization: Quantization, where: object) -> None:
    """ValueError naming what of a quantization_config cannot be read."""
    for field, wanted in _FIELDS.items():
        if type(quantization.get(field)) is not int or quantization[field] != wanted:
            raise ValueError(
                f"{where}: {field} is {quantization.get(field)!r:.40}; AQLM vectors of {LENGTH} inputs of "
                f"one output can be read ({field}: {wanted})"
            )
    for field, most in {"nbits_per_codebook": MOST_BITS, "num_codebooks": 64}.items():
        value = quantization.get(field)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{where}: {field} is {value!r:.40}; expected a whole number from 1 to {most}")


def weights(folder: Path, quantization: Quantization, dtype: torch.dtype | None) -> Iterator[Entry]:
    """Yield (Hugging Face name, PackedWeight or tensor in `dtype`, where it came from) for every tensor."""
    check_config(quantization, folder)
    return read_weights(folder, dtype, _PARTS, lambda layer, parts: _packed(parts, quantization))


def _packed(parts, quantization):
    """The PackedWeight of a layer's tensors, its codebooks in their own type. ValueError for what does not fit."""
    missing = [part for part in _PARTS if part not in parts]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} beside it: the checkpoint is incomplete")
    codes, codebooks, scales = (parts[part] for part in _PARTS)
    books, bits = quantization["num_codebooks"], quantization["nbits_per_codebook"]
    wanted = torch.int8 if bits <= 8 else torch.int16
    if codes.dtype != wanted or codes.dim() != 3 or codes.shape[2] != books or not codes.numel():
        raise ValueError(
            f"codes of {books} codebooks of {bits} bits must be {wanted} [N, K/{LENGTH}, {books}], got "
            f"{codes.dtype} {list(codes.shape)}"
        )
    if not codebooks.is_floating_point() or list(codebooks.shape) != [books, 1 << bits, 1, LENGTH]:
        raise ValueError(
            f"codebooks must be floats {[books, 1 << bits, 1, LENGTH]}, got {codebooks.dtype} {list(codebooks.shape)}"
        )
    if not scales.is_floating_point() or list(scales.shape) != [len(codes), 1, 1, 1]:
        raise ValueError(f"scales must be floats {[len(codes), 1, 1, 1]}, got {scales.dtype} {list(scales.shape)}")
    codes = codes.to(torch.int32)
    indices = torch.where(codes < 0, codes + (1 << bits), codes)
    return PackedWeight.from_vectors(indices, scales.flatten(), codebooks[:, :, 0].contiguous())


# ---------------------------------------------------------------------------------------------- writing


def _changes(folder, find):
    """Yield (name of scales or codebooks, what they are now in the file's dtype and shape, file, place)."""
    for name, (file, place) in tensor_places(folder).items():
        layer, _, part = name.rpartition(".")
        packed = find(f"{layer}.weight") if part in ("codebooks", "scales") else None
        if packed is None:
            continue
        old = safetensors_file.read(file, place)
        new = packed.scales if part == "scales" else packed.codebooks
        yield name, stored_scales(new.cpu().to(torch.float32).reshape(old.shape), old, name), file, place


def save(folder: Path, staging: Path, find: Find) -> None:
    """Copy all of `folder` to `staging` with the scales, and trained codebooks, of the PackedWeight (or None) that
    `find(name)` gives."""
    copy_all(folder, staging)
    for _, new, file, place in _changes(folder, find):
        files.patch(staging / file.name, [(place[2], safetensors_file.to_bytes(new))])


def saved_scales(folder: Path, find: Find) -> Iterator[SavedScales]:
    """Yield (layer, float32 scales [G, N], None) and (layer.codebooks, float32, None) as `save` would write them."""
    for name, new, _, _ in _changes(folder, find):
        values = new.to(torch.float32)
        if name.endswith(".codebooks"):
            yield name, values, None
        else:
            yield name.removesuffix(".scales"), values.view(1, -1), None


FORMAT = FolderFormat(METHOD, check_config, weights, save, saved_scales)
