"""bitsandbytes, 4 bit: codes that stand for the entries of a table, with an absmax per block of the flattened weight.

    weight                                    uint8 [N K / 2, 1], rows one after another, the high nibble first
    weight.absmax                             float32 [N K / blocksize]
    weight.quant_map                          float32 [16], the table (nf4's or fp4's)
    weight.quant_state.bitsandbytes__nf4      uint8: JSON {quant_type, blocksize, dtype, shape}; or ..__fp4
Double quantization: absmax is uint8, and nested_quant_map[absmax] * nested_absmax[block // nested_blocksize] +
nested_offset is meant. A step of such an absmax moves a scale by about 2 %, so trained scales do not fit there: a
folder whose scales moved is written with float32 absmax, and its config says so.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...kernels.table import NAMED
from ...kernels.tiles import GROUPS
from ...nn.weights import PackedWeight
from . import files, safetensors_file
from .folder import copy_all, index_of, read_weights, tensor_places
from .folder_format import FolderFormat
from .protocol import Entry, Find, NewTensor, Place, Quantization, SavedScales, Target
from .rounding import stored_scales

_Places = Mapping[str, tuple[Path, Place]]  # of tensors: folder.tensor_places

METHOD = "bitsandbytes"
SCALES = "weight.absmax"
_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in NAMED)
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes refuses others
_PARTS = (SCALES, "weight", "weight.quant_map", *_STATES, *_NESTED)


def check_config(quantization: Quantization, where: object) -> None:
    """ValueError naming what of a quantization_config cannot be read."""
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        raise ValueError(
            f"{where}: bitsandbytes in 8 bit (LLM.int8) quantizes activations too; supported is "
            "load_in_4bit, nf4 or fp4"
        )
    if not (quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")):
        raise ValueError(
            f"{where}: a bitsandbytes quantization_config without load_in_4bit; supported is load_in_4bit, nf4 or fp4"
        )


def weights(folder: Path, quantization: Quantization, dtype: torch.dtype | None) -> Iterator[Entry]:
    """Yield (Hugging Face name, PackedWeight or tensor in `dtype`, where it came from) for every tensor."""
    check_config(quantization, folder)
    return read_weights(folder, dtype, _PARTS, lambda layer, parts: _packed(layer, parts, dtype))


def _packed(layer: str, parts: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> PackedWeight | torch.Tensor:
    """A PackedWeight; where blocks are no groups of a row that the kernels take, the weight in `dtype`."""
    state = _state(parts)
    n, k = state["shape"]
    size, absmax, table = state["blocksize"], _absmax(parts, state), _table(parts, state)
    stored = parts["weight"].reshape(-1).contiguous().view(torch.uint8)
    if stored.numel() * 2 != n * k + n * k % 2 or absmax.numel() != -(-n * k // size):
        raise ValueError(
            f"{stored.numel()} bytes of codes and {absmax.numel()} of absmax do not fit {n} x {k} weights "
            f"in blocks of {size}"
        )
    codes = torch.stack([stored >> 4, stored & 15], 1).flatten()[: n * k].view(n, k)
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("absmax holds NaN or infinity: the checkpoint is damaged")
    if k % size or (size not in GROUPS and size != k):
        warnings.warn(
            f"{layer}: blocks of {size} weights are not groups of {GROUPS} or whole rows of {k}; the layer "
            "stays dense and frozen",
            stacklevel=2,
        )
        scales = absmax.repeat_interleave(size)[: n * k].view(n, k)
        return (torch.tensor(table)[codes.to(torch.int64)] * scales).to(dtype)
    return PackedWeight.from_codes(codes, absmax.view(n, k // size).T, table=table)


def _state(parts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The layer's JSON. ValueError where there is none, or it lacks a number."""
    missing = [part for part in ("weight", "weight.quant_map") if part not in parts]
    found = next((parts[part] for part in _STATES if part in parts), None)
    if missing or found is None:
        missing += [] if found is not None else [" or ".join(_STATES)]
        raise ValueError(f"no {' and no '.join(missing)} beside it: the checkpoint is incomplete")
    try:
        state = json.loads(bytes(found.flatten().tolist()))
        n, k = state["shape"]
        numbers = (n, k, state["blocksize"], state.get("nested_blocksize", 1))
        if not all(isinstance(value, int) and 0 < value < 1 << 40 for value in numbers):
            raise TypeError(numbers)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its quant_state is damaged ({' '.join(str(error).split())[:80]}); fetch it again") from None
    return state


def _absmax(parts: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> torch.Tensor:
    """float32 [blocks]: as it is stored, or double-quantized."""
    absmax = parts[SCALES].flatten()
    if absmax.is_floating_point():
        return absmax.to(torch.float32)
    missing = [part for part in _NESTED if part not in parts]
    if absmax.dtype != torch.uint8 or missing:
        raise ValueError(
            f"absmax is {absmax.dtype}"
            + (
                f" and no {' and no '.join(missing)} is beside it"
                if missing
                else "; float32, or uint8 with nested_absmax is wanted"
            )
        )
    nested = parts["weight.nested_absmax"].flatten().to(torch.float32)
    size, offset = state.get("nested_blocksize", 256), state.get("nested_offset")
    if offset is None or type(offset) not in (float, int):
        raise ValueError(f"nested_offset is {offset!r:.40} in its quant_state; expected a number, fetch it again")
    entries = parts["weight.nested_quant_map"].flatten().to(torch.float32)
    if entries.numel() != 256 or nested.numel() != -(-absmax.numel() // size):
        raise ValueError(
            f"nested_quant_map of {entries.numel()} and nested_absmax of {nested.numel()} entries do not "
            f"fit {absmax.numel()} blocks in blocks of {size}"
        )
    return entries[absmax.to(torch.int64)] * nested.repeat_interleave(size)[: absmax.numel()] + offset


def _table(parts: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> tuple[float, ...]:
    """Sixteen floats. ValueError where they are not those of the kind that the file names: its own tool reads some
    by the name and some by the table."""
    table = parts["weight.quant_map"].flatten().to(torch.float32)
    names = {part.rpartition("__")[2] for part in _STATES if part in parts} | {state.get("quant_type")} - {None}
    for name in sorted(map(str, names)):
        known = torch.tensor(NAMED.get(name, ()))  # bfloat16 rounds an entry by up to 2^-9 of it
        if known.shape == table.shape and bool(((known - table).abs() > 1e-3 + 4e-3 * known.abs()).any()):
            raise ValueError(
                f"its quant_map is not the table of {name}, which its quant_state names: one of them is "
                "of another checkpoint, fetch it again"
            )
    return tuple(table.tolist())


# ---------------------------------------------------------------------------------------------- writing


def _changes(folder: Path, find: Find) -> Iterator[tuple[str, torch.Tensor, Path, Place, bool]]:
    """Yield (layer, new float32 absmax [blocks], file, place, whether double-quantized and moved) of trained layers."""
    found = tensor_places(folder)
    for name, (file, place) in found.items():
        layer, _, _ = name.partition(f".{SCALES}")
        packed = find(f"{layer}.weight") if name.endswith(f".{SCALES}") else None
        if packed is None:
            continue
        scales = packed.scales.T.cpu().reshape(-1)
        if place[0] != "U8":
            old = safetensors_file.read(file, place).flatten()
            yield layer, stored_scales(scales, old, name), file, place, False
        else:
            yield layer, scales, file, place, not torch.equal(_read_absmax(found, layer), scales)


def _read_absmax(found: _Places, layer: str) -> torch.Tensor:
    """float32 [blocks] of a layer among `tensor_places`."""
    parts = {part: safetensors_file.read(*found[f"{layer}.{part}"]) for part in _PARTS if f"{layer}.{part}" in found}
    return _absmax(parts, _state(parts))


def save(folder: Path, staging: Path, find: Find) -> None:
    """Copy all of `folder` to `staging` with the scales of the PackedWeight (or None) that `find(name)` gives.

    Double-quantized: unchanged if no scale moved; else written with float32 absmax, config.json saying so.
    """
    copy_all(folder, staging)
    changes = list(_changes(folder, find))
    if any(moved for *_, moved in changes):
        return _write_plain(folder, staging, {layer: absmax for layer, absmax, *_ in changes})
    for _, absmax, file, place, _ in changes:
        if place[0] != "U8":
            files.patch(staging / file.name, [(place[2], safetensors_file.to_bytes(absmax))])


def saved_scales(folder: Path, find: Find) -> Iterator[SavedScales]:
    """Yield (layer, float32 scales [G, N], None) as `save` would write them."""
    for layer, absmax, *_ in _changes(folder, find):
        packed = find(f"{layer}.weight")
        assert packed is not None, layer
        yield layer, absmax.to(torch.float32).view(packed.out_features, -1).T, None


def _write_plain(folder: Path, staging: Path, absmax: Mapping[str, torch.Tensor]) -> None:
    """The files of a double-quantized folder with float32 absmax [blocks] of {layer}; all else is the source's."""
    found = tensor_places(folder)
    layers = {name.removesuffix(f".{SCALES}") for name in found if name.endswith(f".{SCALES}")}
    dropped = {f"{layer}.{part}" for layer in layers for part in _NESTED}
    for file in {file for file, _ in found.values()}:
        entries = []
        for name, (where, place) in found.items():
            if where == file and name not in dropped:
                entries.append(_plain_entry(name, where, place, found, absmax))
        safetensors_file.write(staging / file.name, entries, safetensors_file.metadata(file))
    if index_of(folder).exists():
        index = files.read_object(index_of(folder))
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in dropped}
        (staging / index_of(folder).name).write_text(json.dumps(index, indent=2) + "\n")
    config = files.read_object(folder / "config.json")
    config["quantization_config"] |= {"bnb_4bit_use_double_quant": False}
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _plain_entry(name: str, file: Path, place: Place, found: _Places, absmax: Mapping[str, torch.Tensor]) -> NewTensor:
    layer, _, part = name.partition(".weight.")
    if part == "absmax":
        return (
            name,
            torch.float32,
            (torch.Size(place[1]).numel(),),
            lambda: absmax[layer] if layer in absmax else _read_absmax(found, layer),
        )
    if part.startswith("quant_state"):
        state = json.loads(bytes(safetensors_file.read(file, place).flatten().tolist()))
        kept = {key: value for key, value in state.items() if not key.startswith("nested_")}
        return (name, *_as_bytes(kept))
    return name, safetensors_file.DTYPES[place[0]], place[1], lambda: safetensors_file.read(file, place)


def _as_bytes(state: Mapping[str, Any]) -> tuple[torch.dtype, torch.Size, Callable[[], torch.Tensor]]:
    data = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return data.dtype, data.shape, lambda: data


def quantization_config(packed: Mapping[str, PackedWeight], ignore: list[str]) -> dict[str, Any]:
    """The quantization_config of layers {name: PackedWeight} that all have the table nf4 or all fp4."""
    known: dict[tuple[float, ...] | None, str] = {table: kind for kind, table in NAMED.items()}
    kinds = {known.get(weight.table) for weight in packed.values()}
    if len(kinds) > 1 or None in kinds or not all(_block(weight) for weight in packed.values()):
        sizes = sorted({weight.group_size for weight in packed.values()})
        raise ValueError(
            "bitsandbytes holds layers that all have the table nf4 or all fp4, in groups that "
            f"blocks of {_BLOCKS[0]} to {_BLOCKS[-1]} weights fill; these have "
            f"{' and '.join(sorted(kind or 'other codes' for kind in kinds))} in groups of "
            f"{', '.join(map(str, sizes))}"
        )
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kinds.pop(),
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ignore,
    }


def _block(weight: PackedWeight) -> int:
    """The size of the blocks that a layer's groups are written in; 0 where none fills them.

    A whole row of a size that the tool lacks is written as several blocks of one absmax, which is exact.
    """
    size = weight.group_size
    return size if size in _BLOCKS else max((group for group in GROUPS if size % group == 0), default=0)


def entries(name: str, weight: PackedWeight, quantization: Quantization, dtype: torch.dtype) -> list[NewTensor]:
    """The tensors of a layer for a new file, as safetensors_file.write takes them; absmax in float32."""
    n, k, block = weight.out_features, weight.in_features, _block(weight)
    kind = quantization["bnb_4bit_quant_type"]
    state = {"quant_type": kind, "blocksize": block, "dtype": str(dtype).removeprefix("torch."), "shape": [n, k]}
    return [
        (f"{name}.weight", torch.uint8, (n * k // 2, 1), lambda: _nibbles(weight)),
        (
            f"{name}.{SCALES}",
            torch.float32,
            (n * k // block,),
            lambda: weight.scales.T.cpu().reshape(-1).repeat_interleave(weight.group_size // block),
        ),
        (f"{name}.weight.quant_map", torch.float32, (16,), lambda: torch.tensor(weight.table)),
        (f"{name}.weight.quant_state.bitsandbytes__{kind}", *_as_bytes(state)),
    ]


def _nibbles(weight: PackedWeight) -> torch.Tensor:
    codes = weight.unpacked().cpu().flatten()
    return (codes[0::2] << 4 | codes[1::2]).unsqueeze(1)


FORMAT = FolderFormat(METHOD, check_config, weights, save, saved_scales, SCALES)
TARGET = Target(METHOD, quantization_config, entries)
