"""compressed-tensors, format pack-quantized: 4-bit integers with a scale per group or per output row.

    weight_packed      int32 [N, ceil(K/8)]: eight codes a word along K, lowest bits first
    weight_scale       [N, G], or [N, 1] for a whole row
    weight_zero_point  int32 [ceil(N/8), G], packed along N, if not symmetric
    weight_shape       int64 [2] = N, K
Stored codes and zero points are the signed ones plus 8: what PackedWeight holds.
"""
import json

import torch

from ..weights import PackedWeight
from . import files, safetensors_file
from .rounding import stored_scales

METHOD = "compressed-tensors"
INDEX = "model.safetensors.index.json"
_PARTS = ("_packed", "_scale", "_shape", "_zero_point", "_g_idx")


def check_config(quantization, where):
    """The weights section of a quantization_config that can be read; ValueError naming what cannot."""
    groups = quantization.get("config_groups") or {}
    if len(groups) != 1:
        raise ValueError(f"{where}: {len(groups)} config_groups ({', '.join(groups)}); exactly one can be "
                         "read")
    group = next(iter(groups.values()))
    layout = group.get("format") or quantization.get("format")
    weights = group.get("weights") or {}
    found = {name: weights.get(name) for name in ("num_bits", "type", "strategy")}
    integers = (found["num_bits"], found["type"]) == (4, "int")
    if layout != "pack-quantized" or not integers or found["strategy"] not in ("group", "channel"):
        raise ValueError(f"{where}: compressed-tensors format {layout!r} with {found}; supported is "
                         "'pack-quantized' with num_bits 4, type int, strategy group or channel")
    for name in ("input_activations", "output_activations"):
        if group.get(name):
            raise ValueError(f"{where}: {name} are quantized too; only weights can be")
    for name in ("kv_cache_scheme", "transform_config"):
        if quantization.get(name):
            raise ValueError(f"{where}: quantization_config has a {name}, which is not supported")
    if (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError(f"{where}: sparse weights ({quantization['sparsity_config']['format']}) are not "
                         "supported")
    return weights


def tensor_places(folder):
    """name -> (file, place) of every tensor in the folder's safetensors files."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
        if len(names) > 1 and "model.safetensors" in names:
            names = ["model.safetensors"]
    if not names:
        raise FileNotFoundError(f"{folder} holds a config.json but no safetensors file")
    found = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing, though {INDEX} names it; fetch the "
                                    "checkpoint again")
        for tensor, place in safetensors_file.places(folder / name).items():
            found[tensor] = folder / name, place
    return found


def weights(folder, quantization, dtype):
    """Yield (Hugging Face name, PackedWeight or tensor in `dtype`, where it came from) for every tensor."""
    arguments = check_config(quantization, folder)
    found = tensor_places(folder)
    layers = [name.removesuffix("_packed") for name in found if name.endswith(".weight_packed")]
    taken = {layer + part for layer in layers for part in _PARTS}
    for layer in layers:
        where = f"{layer}_packed in {found[layer + '_packed'][0].name}"
        beside = [part for part in _PARTS if layer + part in found]
        parts = {part: safetensors_file.read(*found[layer + part]) for part in beside}
        try:
            yield layer, _packed(parts, arguments), where
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    for name, (file, place) in found.items():
        if name not in taken:
            tensor = safetensors_file.read(file, place)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor, f"{name} in {file.name}"


def _packed(parts, arguments):
    if "_g_idx" in parts:
        raise ValueError("columns are reordered (weight_g_idx, actorder group), which cannot be read; "
                         "quantize with actorder static or none")
    missing = [part for part in ("_scale", "_shape") if part not in parts]
    if not arguments.get("symmetric", True) and "_zero_point" not in parts:
        missing.append("_zero_point")
    if missing:
        raise ValueError(f"no weight{' and no weight'.join(missing)} beside it: the checkpoint is incomplete")
    n, k = parts["_shape"].tolist()
    words, scales = parts["_packed"], parts["_scale"]
    if words.dtype != torch.int32 or list(words.shape) != [n, -(-k // 8)]:
        raise ValueError(f"must be int32 {[n, -(-k // 8)]}, got {words.dtype} {list(words.shape)}")
    group = k if arguments["strategy"] == "channel" else arguments["group_size"]
    if k % group or list(scales.shape) != [n, k // group]:
        raise ValueError(f"weight_scale is {list(scales.shape)}, which is not {n} rows of {k} weights in "
                         f"groups of {group}")
    zeros = None
    if "_zero_point" in parts:
        stored = parts["_zero_point"]
        if stored.dtype != torch.int32 or list(stored.shape) != [-(-n // 8), k // group]:
            raise ValueError(f"weight_zero_point must be int32 {[-(-n // 8), k // group]}, got "
                             f"{stored.dtype} {list(stored.shape)}")
        zeros = unpack(stored.T, n)
    return PackedWeight.from_codes(unpack(words, k), scales.T, zeros)


def unpack(words, count):
    """int32 [rows, W] -> the first `count` codes of each row, uint8."""
    # flat first: a contiguous [rows, 1] may have any stride; little-endian, so the low byte comes first
    nibbles = words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)
    return torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(1)[:, :count]


def pack(codes):
    """uint8 [rows, count] -> int32 [rows, ceil(count / 8)], padded with zeros."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    return (padded[:, 0::2] | padded[:, 1::2] << 4).reshape(-1).view(torch.int32).view(len(codes), -1)


# ---------------------------------------------------------------------------------------------- writing

def save(folder, staging, find):
    """Copy all of `folder` to `staging` with the scales of the PackedWeight (or None) that `find(name)`
    gives."""
    _copy_all(folder, staging)
    for name, (file, place) in tensor_places(folder).items():
        packed = find(name.removesuffix("_scale")) if name.endswith(".weight_scale") else None
        if packed is not None:
            old = safetensors_file.read(file, place)
            new = stored_scales(packed.scales.T.cpu(), old, name)
            files.patch(staging / file.name, [(place[2], safetensors_file.to_bytes(new))])


def _copy_all(folder, staging):
    """Every file but hidden ones; other folders' staging and version control are not the checkpoint."""
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            files.copy(path, staging / inside)


def quantization_config(packed, ignore):
    """The quantization_config of layers {name: PackedWeight}; `ignore` names the Linears that stay dense.

    Raises ValueError for float zero points, and for group sizes that differ.
    """
    for name, weight in packed.items():
        if weight.zeros is not None and weight.zeros.is_floating_point():
            raise ValueError(f"{name} has a float minimum (GGUF Q4_1), which compressed-tensors' integer "
                             "zero points cannot hold; save it in its own format (qzo.save_pretrained), or "
                             "start from a Q4_0 file")
    if all(weight.group_size == weight.in_features for weight in packed.values()):
        strategy, group = "channel", None
    else:
        strategy, sizes = "group", {weight.group_size for weight in packed.values()}
        if len(sizes) > 1:
            raise ValueError(f"layers have group sizes {sorted(sizes)}; one compressed-tensors config group "
                             "holds one size")
        group, = sizes
    symmetric = all(weight.zeros is None for weight in packed.values())
    arguments = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": strategy,
                 "group_size": group, "dynamic": False, "actorder": None}
    layout = {"targets": ["Linear"], "format": "pack-quantized", "weights": arguments,
              "input_activations": None, "output_activations": None}
    return {"quant_method": METHOD, "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": layout}, "ignore": ignore, "kv_cache_scheme": None,
            "sparsity_config": {}, "transform_config": {}}


def write(path, packed, dense, symmetric):
    """A new safetensors file of layers {name: PackedWeight} and tensors {name: tensor}; scales in float16.

    ValueError for codes that do not have 4 bits.
    """
    for name, weight in packed.items():
        if weight.bits != 4:
            raise ValueError(f"{name} has codes of {weight.bits} bits (GGUF Q8_0), only those of 4 can be "
                             "written; save it in its own format (qzo.save_pretrained)")
    entries = [(name, value.dtype, value.shape, lambda value=value: value) for name, value in dense.items()]
    for name, weight in packed.items():
        entries += _entries(name, weight, symmetric)
    safetensors_file.write(path, entries, {"format": "pt"})


def _entries(name, weight, symmetric):
    n, k, groups = weight.out_features, weight.in_features, weight.scales.shape[0]
    entries = [
        ("packed", torch.int32, (n, -(-k // 8)), lambda: pack(weight.unpacked())),
        ("scale", torch.float16, (n, groups), lambda: _new_scales(weight, name)),
        ("shape", torch.int64, (2,), lambda: torch.tensor([n, k])),
    ]
    if not symmetric:
        entries.append(("zero_point", torch.int32, (-(-n // 8), groups), lambda: _packed_zeros(weight)))
    return [(f"{name}.weight_{part}", *rest) for part, *rest in entries]


def _new_scales(weight, name):
    scales = weight.scales.T.cpu()
    return stored_scales(scales, torch.zeros_like(scales, dtype=torch.float16), name)


def _packed_zeros(weight):
    zeros = torch.full_like(weight.scales, 8) if weight.zeros is None else weight.zeros
    return pack(zeros.to(torch.uint8)).T


