"""HQQ's own folders: a config.json without a quantization_config, and qmodel.pt, a dictionary of modules.

    W_q    uint8 [N*G * bits/8, g], a row per group of g weights along K, in planes, the high bits first: with 4
           bits row r holds group r above group r + N*G/2; with 3 bits int32 of ten codes
    scale  [N*G, 1], float
    zero   [N*G, 1], float, in units of codes but no whole number: w = scale * (code - zero)
Other modules hold their tensors as they are. Saving changes scales only: a zero point, in codes, stays.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from ...nn.weights import PackedWeight
from . import files
from .folder import copy_all
from .folder_format import FolderFormat
from .protocol import Entry, Find, Quantization, SavedScales
from .rounding import stored_scales
from .safetensors_file import to_bytes
from .torch_file import TorchFile

METHOD = "hqq"
FILE = "qmodel.pt"
_PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
_WANTED = {"axis": 1, "channel_wise": True, "quant_scale": False, "quant_zero": False}


def check_config(quantization: Quantization | None, where: object) -> None:
    """ValueError for HQQ weights that are not in HQQ's own files."""
    if quantization:
        raise ValueError(
            f"{where}: HQQ weights in transformers' layout (with a quantization_config) cannot "
            f"be read; save them with hqq's save_quantized, which writes {FILE}"
        )


def weight_files(folder: Path) -> set[Path]:
    """The file that holds the weights."""
    return {folder / FILE}


def weights(folder: Path, quantization: Quantization | None, dtype: torch.dtype | None) -> Iterator[Entry]:
    """Yield (Hugging Face name, PackedWeight or tensor in `dtype`, where it came from) for every tensor."""
    check_config(quantization, folder)
    file = TorchFile(folder / FILE)
    for module, state in _modules(file):
        if "W_q" in state:
            where = f"{module}.W_q in {FILE}"
            try:
                yield f"{module}.weight", _packed(file, module, state), where
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            state = {name: value for name, value in state.items() if name == "bias"}
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor):
                tensor = file.read(tensor, f"{module}.{name}")
                tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
                yield f"{module}.{name}", tensor, f"{module}.{name} in {FILE}"


def float_zeros(folder: Path) -> str | None:
    """The first layer: all of them have float zero points. None where there is no layer."""
    return next((module for module, state in _modules(TorchFile(folder / FILE)) if "W_q" in state), None)


def save(folder: Path, staging: Path, find: Find) -> None:
    """Copy all of `folder` to `staging` with the scales of the PackedWeight (or None) that `find(name)`
    gives."""
    copy_all(folder, staging)
    file = TorchFile(folder / FILE)
    chunks = [(file.place(old, module)[0], to_bytes(new)) for module, new, old, _ in _changes(file, find)]
    files.patch(staging / FILE, file.patches(chunks))


def saved_scales(folder: Path, find: Find) -> Iterator[SavedScales]:
    """Yield (layer, float32 scales [G, N], None) as `save` would write them."""
    for module, new, _, packed in _changes(TorchFile(folder / FILE), find):
        yield module, new.view(packed.scales.T.shape).T.to(torch.float32), None


def _changes(file, find):
    """Yield (module, its scales in the file's dtype and shape, their tensor in the file, PackedWeight)."""
    for module, state in _modules(file):
        packed = find(f"{module}.weight") if "W_q" in state else None
        if packed is not None:
            old = file.read(state["scale"], f"{module}.scale")
            new = stored_scales(packed.scales.T.reshape(old.shape).cpu(), old, f"{module}.scale")
            yield module, new, state["scale"], packed


def _modules(file):
    """(module, its fields) of each module; older files keep those of a quantized one in a dictionary `meta`."""
    if not isinstance(file.content, dict):
        raise ValueError(f"{file.path} holds a {type(file.content).__name__}; HQQ saves a dictionary of modules")
    for module, state in file.content.items():
        if not isinstance(module, str) or not module.isprintable() or not isinstance(state, dict):
            raise ValueError(
                f"{file.path}: {module!r:.200} is {_describe(state)}; HQQ saves a dictionary of each module's tensors"
            )
        meta = state.get("meta")
        yield module, state | meta if isinstance(meta, dict) else state


def _packed(file, module, state):
    """PackedWeight of a quantized module. ValueError naming the field that cannot be read."""
    for field, wanted in _WANTED.items():
        found = state.get(field, wanted)
        if type(found) not in (bool, int) or found != wanted:
            raise ValueError(f"{field} is {_describe(found)}; only HQQ weights with {field}={wanted} can be read")
    bits, packing = _whole(state, "nbits"), state.get("packing")
    if packing != _PACKINGS.get(bits):
        raise ValueError(
            f"{bits} bits in packing {_describe(packing)}; supported are "
            f"{', '.join(f'{b} ({p})' for b, p in _PACKINGS.items())}"
        )
    shape = state.get("shape")
    if not isinstance(shape, torch.Size | tuple | list) or len(shape) != 2:
        raise ValueError(f"shape is {_describe(shape)}; it has to be [out_features, in_features]")
    n, k = (_whole({"shape": size}, "shape") for size in shape)
    size = k if state.get("group_size") is None else _whole(state, "group_size")
    if k % size:
        raise ValueError(f"group_size is {size}, which does not divide in_features={k}")
    rows = n * k // size
    scale, zero = (_column(file, module, state, field, rows) for field in ("scale", "zero"))
    codes = _unpack(_words(file, module, state, bits, rows, size), bits, rows)
    held = 4 if bits == 3 else bits  # a float zero point needs no shift to the middle of 4 bits
    return PackedWeight.from_codes(codes.view(n, k), scale.view(n, -1).T, zero.view(n, -1).T, held)


def _whole(state, field):
    value = state.get(field)
    if type(value) is not int or value < 1:
        raise ValueError(f"{field} is {_describe(value)}; it has to be a whole number above 0")
    return value


def _column(file, module, state, field, rows):
    """float32 [rows] of `scale` or `zero`."""
    tensor = state.get(field)
    floats = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    if not floats or list(tensor.shape) != [rows, 1]:
        raise ValueError(f"{field} must be a float tensor {[rows, 1]}, got {_describe(tensor)}")
    values = file.read(tensor, f"{module}.{field}").to(torch.float32).flatten()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{field} holds NaN or infinity: the checkpoint is damaged")
    return values


def _words(file, module, state, bits, rows, size):
    """W_q in the integers of its packing; view_as_float tells that the file calls the same bytes floats."""
    tensor = state["W_q"]
    dtype, per_word = (torch.int32, 10) if bits == 3 else (torch.uint8, 8 // bits)
    viewed = state.get("view_as_float") is True and isinstance(tensor, torch.Tensor)
    stored = tensor.dtype if viewed and tensor.is_floating_point() else dtype
    shape = [-(-rows // per_word), size * dtype.itemsize // stored.itemsize]
    if not isinstance(tensor, torch.Tensor) or (tensor.dtype, list(tensor.shape)) != (stored, shape):
        raise ValueError(f"must be {stored} {shape}, got {_describe(tensor)}")
    return file.read(tensor, f"{module}.W_q").view(dtype)


def _describe(value):
    """One line of a value that a file gave, however large it is."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    plain = isinstance(value, bool | int | float | str | torch.Size | None)
    return repr(value)[:60] if plain else type(value).__name__


def _unpack(words, bits, rows):
    """uint8 [rows, g] from planes that lie one after another, those of the high bits first."""
    top = 27 if bits == 3 else 8 - bits
    planes = [((words >> shift) & (1 << bits) - 1).to(torch.uint8) for shift in range(top, -1, -bits)]
    return torch.cat(planes)[:rows]


FORMAT = FolderFormat(
    METHOD, check_config, weights, save, saved_scales, weight_files=weight_files, float_zeros=float_zeros
)
