"""compressed-tensors, format pack-quantized: integers of b bits with a scale per group or per output row.

    weight_packed      int32 [N, ceil(K*b/32)]: one stream of codes along K, lowest bits first
    weight_scale       [N, G], or [N, 1] for a whole row
    weight_zero_point  int32 [ceil(N*b/32), G], packed along N, if not symmetric
    weight_shape       int64 [2] = N, K
    weight_g_idx       int32 [K], the group of each column, in old files only (actorder "group")
Format int-quantized, which llm-compressor writes where inputs are quantized too (W4A8), has int8 `weight` [N, K] and
`weight_zero_point` [N, G] instead, the signed numbers themselves.
Stored codes and zero points are the signed ones plus 2^(b-1): what PackedWeight holds, 3 bits as 4.

What a server quantizes while it runs is no business of the weights: kv_cache_scheme with its k_scale and v_scale, and
the scales of inputs, are left alone in training and stay in a saved folder byte for byte (`is_for_servers`). A folder
whose inputs are quantized too is read on request only (told.weight_only).

A layer is quantized where these tensors exist, whatever `ignore` says; bits, strategy and group size are those
of the config group whose target names it exactly, else by a pattern ("re:..."), else by its class ("Linear").
A layer that the config calls symmetric may have zero points if they say the same; a g_idx is read whatever it says.
"""

import dataclasses
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...kernels.codes import middle
from ...nn.weights import PackedWeight
from .folder import read_weights
from .folder_format import gathered
from .limits import check_integers, check_order, group_sizes
from .order import perm_of
from .patterns import Patterns
from .protocol import Entry, Make, NewTensor, Quantization, Target
from .rounding import new_scales
from .words import pack, unpack, word_count

METHOD = "compressed-tensors"
SCALES = "weight_scale"
_BITS = (2, 3, 4, 8)
_PATTERN = "re:"
_CACHE = re.compile(r"\.[kvq]_(scale|zero_point|global_scale)$")
_ACTIVATIONS = re.compile(r"\.(input|output)_(scale|zero_point|global_scale)$")
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_LAYOUTS = {"pack-quantized": PARTS, "int-quantized": ("weight_scale", "weight", "weight_zero_point", "weight_g_idx")}


def check_config(quantization: Quantization, where: object) -> dict[str, dict[str, Any]]:
    """target -> {bits, group_size, symmetric, ordered} of a quantization_config. ValueError for what cannot be read."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"{where}: the quantization_config has no config_groups; the checkpoint is incomplete")
    found = {}
    for name, group in groups.items():
        group = group if isinstance(group, dict) else {}
        weights = _check_group(group, group.get("format") or quantization.get("format"), f"{where}: {name}")
        for target in group["targets"]:
            found[target] = weights  # the last of two groups counts, as in the library
    if quantization.get("transform_config"):
        raise ValueError(
            f"{where}: quantization_config has a transform_config (rotated weights), which is not supported; quantize "
            "the model again without transforms"
        )
    sparsity = quantization.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
        raise ValueError(f"{where}: sparse weights (sparsity_config) are not supported; save them dense")
    return found


def _check_group(group: Mapping[str, Any], layout: object, where: object) -> dict[str, Any]:
    """{bits, group_size (None: the whole row), symmetric, ordered: by a weight_g_idx} of a config group."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ValueError(f"{where}: it has no weights section; only quantized weights can be read")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if type(size) is int and size > 0 else "channel")
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    held = type(bits) is int and bits in _BITS
    if layout not in tuple(_LAYOUTS) or not held or kind != "int" or strategy not in ("group", "channel"):
        found = {"num_bits": bits, "type": kind, "strategy": strategy}
        raise ValueError(
            f"{where}: compressed-tensors format {layout!r:.60} with {found!r:.200}; supported "
            f"are {' and '.join(map(repr, _LAYOUTS))} with num_bits {', '.join(map(str, _BITS))}, type int, strategy "
            "group or channel"
        )
    if strategy == "group" and (type(size) is not int or size < 1):
        raise ValueError(f"{where}: group_size is {size!r:.40}; strategy group needs a whole number above 0")
    for name in ("input_activations", "output_activations"):
        if group.get(name):
            raise ValueError(
                f"{where}: {name} are quantized too ({_described(group[name])}): a server rounds what goes "
                f"{'into' if name.startswith('input') else 'out of'} each layer, which qzo does not compute; "
                "qzo.from_pretrained(..., weight_only=True), on the command line --weight-only, trains the weights as "
                "if it were not rounded"
            )
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(
            f"{where}: targets must be a list of names, patterns ('re:...') and classes, got {targets!r:.80}"
        )
    _patterns(targets, where)
    return {
        "bits": bits,
        "group_size": None if strategy == "channel" else size,
        "symmetric": weights.get("symmetric", True),
        "ordered": strategy == "group" and weights.get("actorder") in (True, "group"),
        "layout": layout,
    }


def _patterns(targets: Iterable[str], where: object) -> Patterns:
    """Those of the targets that are patterns, in the library's order."""
    return Patterns(
        {target: target.removeprefix(_PATTERN) for target in sorted(targets) if target.startswith(_PATTERN)},
        f"{where}: target",
    )


def _described(arguments: object) -> str:
    """Words for the arguments of quantized activations."""
    if not isinstance(arguments, dict):
        return f"{arguments!r:.80}"
    told = {name: arguments[name] for name in ("num_bits", "type", "strategy", "dynamic") if name in arguments}
    return ", ".join(f"{name} {value!r:.20}" for name, value in told.items()) or "nothing more is said of it"


def is_for_servers(name: str, cache: bool = True) -> bool:
    """Whether a tensor is read by servers only, which quantize what goes into a layer or, if there is a scheme for that
    (`cache`), the attention's cache."""
    return bool(_ACTIVATIONS.search(name) or (cache and _CACHE.search(name)))


def _arguments(layer: str, by_target: Mapping[str, dict[str, Any]], patterns: Patterns) -> dict[str, Any]:
    """The arguments of a layer by its name, in the library's order of precedence."""
    for target in itertools.chain([layer], patterns.fitting(layer), ["Linear"]):
        if target in by_target:
            return by_target[target]
    raise ValueError(
        f"no target of the config_groups fits {layer} (they are {', '.join(by_target)[:200]}), "
        "so its bits and group size are unknown"
    )


def weights(folder: Path, quantization: Quantization, dtype: torch.dtype | None) -> Iterator[Entry]:
    """Yield (Hugging Face name, PackedWeight or tensor in `dtype`, where it came from) for every tensor."""
    scheme = quantization.get("kv_cache_scheme")
    if scheme:
        warnings.warn(
            f"{folder}: kv_cache_scheme ({_described(scheme)}): servers round the attention's cache, with the k_scale "
            "and v_scale of these files; training computes it without rounding, what is saved in this format keeps "
            "them as they are, and another format leaves them out",
            stacklevel=2,
        )
    layouts = {arguments["layout"] for arguments in check_config(quantization, folder).values()}
    if len(layouts) > 1:
        raise ValueError(
            f"{folder}: config_groups of {' and '.join(sorted(layouts))}; one format for all is read: save it as one"
        )
    parts = _LAYOUTS[layouts.pop()] if layouts else PARTS  # groups without a target: no layer's arguments are known
    for entry in read_weights(folder, dtype, parts, _packer(quantization, folder)):
        if not is_for_servers(entry[0], bool(scheme)):
            yield entry


def packer(quantization: Quantization, where: object) -> Make:
    """make(layer, {part: tensor}) of a quantization_config: the PackedWeight of a layer; ValueError as check_config,
    and for a layout whose layers have no tensor of PARTS[0]."""
    if any(arguments["layout"] != "pack-quantized" for arguments in check_config(quantization, where).values()):
        raise ValueError(f"{where}: compressed-tensors format 'int-quantized' is read by qzo.from_pretrained only")
    return _packer(quantization, where)


def _packer(quantization: Quantization, where: object) -> Make:
    told: list[str] = []
    by_target = check_config(quantization, where)
    patterns = _patterns(by_target, where)

    def make(layer: str, parts: Mapping[str, torch.Tensor]) -> PackedWeight:
        arguments = _arguments(layer, by_target, patterns)
        packed = _packed(parts, arguments)
        if packed.perm is not None and not arguments["ordered"] and not told:
            told.append(layer)
            warnings.warn(
                f"the config names no actorder 'group', and {layer}.weight_g_idx has columns in another "
                "order: that order is read, which servers that go by the config leave out",
                stacklevel=2,
            )
        return packed

    return make


def _packed(parts: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> PackedWeight:
    layout = arguments["layout"]
    needed = ("weight_scale", "weight_shape") if layout == "pack-quantized" else ("weight",)
    missing = [part for part in needed if part not in parts]
    if not arguments["symmetric"] and "weight_zero_point" not in parts:
        missing.append("weight_zero_point")
    if arguments["ordered"] and "weight_g_idx" not in parts:
        missing.append("weight_g_idx")
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} beside it: the checkpoint is incomplete")
    bits, scales = arguments["bits"], parts["weight_scale"]
    codes = (_from_words if layout == "pack-quantized" else _from_integers)(parts, bits)
    n, k = codes.shape
    group = arguments["group_size"] or k
    if not scales.is_floating_point():
        raise ValueError(f"weight_scale is {scales.dtype}; scales are floats")
    if k % group or list(scales.shape) != [n, k // group]:
        raise ValueError(
            f"weight_scale is {list(scales.shape)}, which is not {n} rows of {k} weights in groups of {group}"
        )
    zeros = None
    if "weight_zero_point" in parts:
        zeros = _zeros(parts["weight_zero_point"], n, k // group, bits, layout)
        if arguments["symmetric"] and bool((zeros != middle(bits)).any()):
            raise ValueError(
                "the config says symmetric, and weight_zero_point beside it has others than "
                f"{middle(bits)}; if they are what is meant, set symmetric to false in the "
                "quantization_config"
            )
    perm, g_idx = None, parts.get("weight_g_idx")
    if g_idx is not None and not bool((g_idx == -1).all()):  # -1 everywhere: no order at all
        perm = perm_of(g_idx, k, group, "weight_g_idx")
    codes = codes if perm is None else codes[:, perm]
    if bits == 3:  # in 4-bit codes the same weight is 4 higher
        codes, zeros, bits = codes + 4, None if zeros is None else zeros + 4, 4
    return PackedWeight.from_codes(codes, scales.T, zeros, bits, perm)


def _from_words(parts: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """uint8 [N, K] of format pack-quantized."""
    shape, words = parts["weight_shape"], parts["weight_packed"]
    if shape.is_floating_point() or shape.numel() != 2 or int(shape.min()) < 1:
        raise ValueError(f"weight_shape must be two whole numbers above 0, got {shape.flatten()[:4].tolist()}")
    n, k = shape.flatten().tolist()
    _check(words, "", [n, word_count(k, bits)])
    return unpack(words, k, bits)


def _from_integers(parts: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """uint8 [N, K] of format int-quantized."""
    weight = parts["weight"]
    if weight.dtype != torch.int8 or weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be an int8 matrix, got {weight.dtype} {list(weight.shape)}")
    return _unsigned(weight, "weight", bits)


def _zeros(stored: torch.Tensor, n: int, groups: int, bits: int, layout: str) -> torch.Tensor:
    """uint8 [G, N]."""
    if layout == "pack-quantized":
        _check(stored, "weight_zero_point ", [word_count(n, bits), groups])
        return unpack(stored.T, n, bits)
    if stored.dtype != torch.int8 or list(stored.shape) != [n, groups]:
        raise ValueError(f"weight_zero_point must be int8 {[n, groups]}, got {stored.dtype} {list(stored.shape)}")
    return _unsigned(stored, "weight_zero_point", bits).T


def _unsigned(signed: torch.Tensor, name: str, bits: int) -> torch.Tensor:
    codes = signed.to(torch.int16) + middle(bits)
    if int(codes.min()) < 0 or int(codes.max()) >> bits:
        raise ValueError(f"{name} goes from {int(signed.min())} to {int(signed.max())}, which {bits} bits do not hold")
    return codes.to(torch.uint8)


def _check(tensor: torch.Tensor, name: str, shape: Sequence[int]) -> None:
    if tensor.dtype != torch.int32 or list(tensor.shape) != shape:
        raise ValueError(f"{name}must be int32 {shape}, got {tensor.dtype} {list(tensor.shape)}")


# ---------------------------------------------------------------------------------------------- writing


def quantization_config(packed: Mapping[str, PackedWeight], ignore: list[str]) -> dict[str, Any]:
    """The quantization_config of layers {name: PackedWeight}; `ignore` names the Linears that stay dense.

    One config group for all Linears, or one for each number of bits and group size, which then names its
    layers. All have zero points or none has: servers fuse layers, and what they fuse has to be of one kind.
    ValueError for float zero points and for columns in another order.
    """
    alike: dict[tuple[int, int], list[str]] = {}
    sizes = group_sizes(packed)
    for name, weight in packed.items():
        check_order(name, weight, METHOD)
        check_integers(name, weight, METHOD)
        alike.setdefault((weight.bits, sizes[name]), []).append(name)
    symmetric = all(weight.zeros is None for weight in packed.values())
    groups = {
        f"group_{i}": _config_group(["Linear"] if len(alike) == 1 else names, bits, size, symmetric)
        for i, ((bits, size), names) in enumerate(alike.items())
    }
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _config_group(targets: list[str], bits: int, size: int, symmetric: bool) -> dict[str, Any]:
    arguments = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if size == -1 else "group",
        "group_size": None if size == -1 else size,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "targets": targets,
        "format": "pack-quantized",
        "weights": arguments,
        "input_activations": None,
        "output_activations": None,
    }


def entries(name: str, weight: PackedWeight, quantization: Quantization, dtype: torch.dtype) -> list[NewTensor]:
    """The tensors of a layer for a new file, as safetensors_file.write takes them; scales in `dtype`."""
    n, k, groups, bits = weight.out_features, weight.in_features, weight.scales.shape[0], weight.bits
    made: list[NewTensor] = [
        (f"{name}.weight_packed", torch.int32, (n, word_count(k, bits)), lambda: pack(weight.unpacked().cpu(), bits)),
        (f"{name}.weight_scale", dtype, (n, groups), lambda: new_scales(weight.scales.T.cpu(), dtype, name)),
        (f"{name}.weight_shape", torch.int64, (2,), lambda: torch.tensor([n, k])),
    ]
    if not quantization["config_groups"]["group_0"]["weights"]["symmetric"]:
        made.append(
            (f"{name}.weight_zero_point", torch.int32, (word_count(n, bits), groups), lambda: _packed_zeros(weight))
        )
    return made


def _packed_zeros(weight: PackedWeight) -> torch.Tensor:
    zeros = torch.full_like(weight.scales, middle(weight.bits)) if weight.zeros is None else weight.zeros
    return pack(zeros.to(torch.uint8).cpu(), weight.bits).T


FORMAT = dataclasses.replace(
    gathered(METHOD, check_config, packer, PARTS, SCALES, transposed=True), weights=weights, for_servers=is_for_servers
)
TARGET = Target(METHOD, quantization_config, entries)
