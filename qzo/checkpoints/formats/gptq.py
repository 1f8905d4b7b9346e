"""GPTQ: integers of b bits with a scale per group of inputs, as AutoGPTQ, GPTQModel and auto-round write it.

    qweight  int32 [K*b/32, N]      one stream of codes along K, lowest bits first
    qzeros   int32 [G, N*b/32]      zero points along N, each less one in version 1 (checkpoint_format "gptq")
    scales   [G, N]
    g_idx    int32 [K]              the group of each input; not there or 0, 0, ..., 1, 1, ... unless desc_act

Version 1 takes the one off in one of two ways, which differ where a zero point is 0: GPTQModel from the whole
word, so that it borrows from the neighbour; the others from each field by itself. Saving never writes qzeros.

A layer is quantized where these tensors exist. Its bits, group size, sym and desc_act are the config's, unless the
first pattern of `dynamic` that fits its name has others; the tensors' shapes have to agree. Where `sym` and the words
of qzeros contradict the version, the words are believed (stored_zeros.py); where g_idx contradicts desc_act, g_idx.
"""

import collections
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...kernels.codes import middle
from ...nn.weights import PackedWeight
from .folder_format import gathered
from .limits import check_integers, check_whole_words, group_sizes
from .order import g_idx_of, perm_of
from .patterns import Patterns
from .protocol import Make, NewTensor, Quantization, Target
from .rounding import new_scales
from .stored_zeros import NAMES, StoredZeros
from .words import pack, unpack, word_count

METHOD = "gptq"
SCALES = "scales"
CONFIG = "quantize_config.json"  # where GPTQModel repeats the quantization_config
BITS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_VERSIONS = {name: version for version, name in NAMES.items()}
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in every field of a word
_SKIPPED, _CHANGED = "-:", "+:"


def check_config(quantization: Quantization, where: object) -> dict[str, Any]:
    """{bits, group_size, sym, desc_act, dynamic, version, whole_words, unsure: of the version} of a quantization_config
    that can be read.

    ValueError naming what cannot.
    """
    said = [quantization[name] for name in ("checkpoint_format", "format") if quantization.get(name)]
    stored = "marlin" if quantization.get("is_marlin_format") else (said or ["gptq"])[0]
    stored = stored.lower() if isinstance(stored, str) else stored
    if not isinstance(stored, str) or stored not in _VERSIONS:
        raise ValueError(
            f"{where}: GPTQ weights in checkpoint_format {stored!r:.60}; supported are {' and '.join(_VERSIONS)}"
        )
    if quantization.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"{where}: GPTQ weights packed in {quantization['pack_dtype']!r:.60}; supported is int32")
    for name in ("adapter", "rotation"):
        if quantization.get(name):
            raise ValueError(f"{where}: quantization_config has an {name}, which is not supported")
    check_bits_and_group(quantization.get("bits"), quantization.get("group_size"), where, BITS)
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(value, dict) for value in dynamic.values()):
        raise ValueError(f"{where}: dynamic must be patterns and what they change, got {dynamic!r:.80}")
    patterns = Patterns({pattern: _plain(pattern) for pattern in dynamic}, f"{where}: dynamic")
    meta = quantization.get("meta")
    quantizer = str(meta.get("quantizer")) if isinstance(meta, dict) else ""
    return {
        "bits": quantization["bits"],
        "group_size": quantization.get("group_size"),
        "sym": _flag(quantization.get("sym")),
        "desc_act": bool(quantization.get("desc_act")),
        "dynamic": dynamic,
        "patterns": patterns,
        "version": _VERSIONS[stored],
        "whole_words": "gptqmodel" in quantizer,
        "unsure": any(isinstance(name, str) and name.lower() in {*_VERSIONS} - {stored} for name in said),
    }


def _flag(value: object) -> bool | None:
    """A boolean, else None: nothing is said."""
    return value if isinstance(value, bool) else None


def check_bits_and_group(bits: object, size: object, where: object, supported: Sequence[int]) -> None:
    """ValueError unless bits are supported and size is a number above 0, or -1 or None: the whole row."""
    if type(bits) is not int or bits not in supported:
        raise ValueError(f"{where}: bits is {bits!r:.40}; supported are {', '.join(map(str, supported))}")
    if size is not None and (type(size) is not int or (size < 1 and size != -1)):
        raise ValueError(f"{where}: group_size is {size!r:.40}; it has to be a whole number above 0, or -1")


def _plain(pattern: str) -> str:
    return pattern.removeprefix(_SKIPPED).removeprefix(_CHANGED)


def packer(quantization: Quantization, where: object) -> Make:
    """make(layer, {part: tensor}) of a quantization_config: the PackedWeight of a layer; ValueError as check_config."""
    settings = check_config(quantization, where)
    told: list[str] = []
    stored = StoredZeros(settings["version"], settings["unsure"])

    def make(layer: str, parts: Mapping[str, torch.Tensor]) -> PackedWeight:
        arguments = _arguments(layer, settings)
        packed = _packed(layer, parts, arguments, stored)
        if packed.perm is not None and not arguments["desc_act"] and not told:
            told.append(layer)
            warnings.warn(
                f"the config says desc_act false, and {layer}.g_idx has columns in another order: the order "
                "of g_idx is read, which servers that go by the config leave out",
                stacklevel=2,
            )
        return packed

    return make


def _arguments(layer: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a layer by its name; group_size None: the whole row."""
    first = next(settings["patterns"].fitting(layer), None)
    changes: dict = {} if first is None else settings["dynamic"][first]
    found = settings | {name: changes[name] for name in ("bits", "group_size") if name in changes}
    found |= {name: _flag(changes[name]) for name in ("sym", "desc_act") if _flag(changes.get(name)) is not None}
    check_bits_and_group(found["bits"], found["group_size"], "dynamic", BITS)
    return found | {"group_size": None if found["group_size"] == -1 else found["group_size"]}


def _packed(
    layer: str, parts: Mapping[str, torch.Tensor], arguments: Mapping[str, Any], stored: StoredZeros
) -> PackedWeight:
    bits = arguments["bits"]
    wanted = PARTS if arguments["desc_act"] else PARTS[:3]
    check_there(layer, parts, wanted)
    words, zero_words, scales = (parts[part] for part in PARTS[:3])
    g_idx = parts.get(PARTS[3])
    check_matrix(words, "")
    n = words.shape[1]
    check_matrix(zero_words, "qzeros ")
    fitting = [
        b
        for b in BITS
        if words.shape[0] * 32 % b == 0
        and zero_words.shape[1] == word_count(n, b)
        and (g_idx is None or g_idx.numel() * b == words.shape[0] * 32)
    ]
    if bits not in fitting:
        raise ValueError(
            f"int32 {list(words.shape)} with qzeros {list(zero_words.shape)} are not {bits} bits, "
            "which the config says, but "
            f"{' or '.join(map(str, fitting)) or 'none that fit together'}"
        )
    k = words.shape[0] * 32 // bits
    size = check_groups(scales, n, k, arguments["group_size"])
    if zero_words.shape[0] != k // size:
        raise ValueError(f"qzeros are {list(zero_words.shape)}, scales {list(scales.shape)}: the groups differ")
    fields = unpack(zero_words, n, bits)
    version = stored.version(layer, fields, bits, arguments["sym"])
    codes, zeros = unpack(words.T, k, bits), _zeros(zero_words, fields, bits, version, arguments["whole_words"])
    if bits == 3:  # in 4-bit codes the same weight is 4 higher
        codes, zeros, bits = codes + 4, zeros + 4, 4
    perm = None if g_idx is None else perm_of(g_idx, k, size)
    return PackedWeight.from_codes(codes if perm is None else codes[:, perm], scales, zeros, bits, perm)


def check_there(layer: str, parts: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> None:
    """ValueError naming the tensors of a layer that the file lacks."""
    missing = [f"{layer}.{part}" for part in wanted if part not in parts]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} beside it: the checkpoint is incomplete")


def check_matrix(words: torch.Tensor, name: str) -> None:
    """ValueError unless it is an int32 matrix that is not empty."""
    if words.dtype != torch.int32 or words.dim() != 2 or words.numel() == 0:
        raise ValueError(f"{name}must be an int32 matrix, got {words.dtype} {list(words.shape)}")


def check_groups(scales: torch.Tensor, n: int, k: int, size: int | None) -> int:
    """The group size of an [n, k] matrix with scales [G, n]; `size` is the config's, None the whole row."""
    size = size or k
    if k % size:
        raise ValueError(
            f"in_features {k} is no multiple of group_size {size}: a last group that is shorter cannot be read"
        )
    if not scales.is_floating_point() or list(scales.shape) != [k // size, n]:
        raise ValueError(
            f"scales must be floats {[k // size, n]} for {k} inputs in groups of {size} and {n} "
            f"outputs, got {scales.dtype} {list(scales.shape)}"
        )
    return size


def _zeros(words: torch.Tensor, fields: torch.Tensor, bits: int, version: int, whole_words: bool) -> torch.Tensor:
    """uint8 [G, N]. fields: of the words, as they are stored."""
    if version == 2:
        return fields
    if whole_words and bits in _ONES:
        return unpack(words + _ONES[bits], fields.shape[1], bits)  # int32 wraps, as it did when they were taken off
    return fields + 1 & (1 << bits) - 1


# ---------------------------------------------------------------------------------------------- writing


def quantization_config(packed: Mapping[str, PackedWeight], ignore: list[str]) -> dict[str, Any]:
    """The quantization_config of layers {name: PackedWeight}; `ignore` names the Linears that stay dense.

    What most layers have is said once, what the others have in `dynamic`. Version 1 for symmetric layers,
    else version 2: readers of version 1 differ where a zero point is 0, and GPTQModel reads no asymmetric one
    that is not its own. ValueError for what cannot be held exactly.
    """
    for name, weight in packed.items():
        check_integers(name, weight, METHOD)
        check_whole_words(name, weight, METHOD, inputs=True)
    sizes = group_sizes(packed)
    kinds = {name: (weight.bits, sizes[name]) for name, weight in packed.items()}
    bits, size = collections.Counter(kinds.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, int]] = {
        f"{_SKIPPED}^{re.escape(name)}$": {} for name in ignore if not name.endswith("lm_head")
    }
    dynamic |= {
        f"{_CHANGED}^{re.escape(name)}$": {"bits": kind[0], "group_size": kind[1]}
        for name, kind in kinds.items()
        if kind != (bits, size)
    }
    symmetric = all(weight.zeros is None for weight in packed.values())
    found = {
        "quant_method": METHOD,
        "bits": bits,
        "group_size": size,
        "sym": symmetric,
        "desc_act": any(weight.perm is not None for weight in packed.values()),
        "lm_head": any(name.endswith("lm_head") for name in packed),
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["qzo"]},
    }
    return found | {"dynamic": dynamic} if dynamic else found


def entries(name: str, weight: PackedWeight, quantization: Quantization, dtype: torch.dtype) -> list[NewTensor]:
    """The tensors of a layer for a new file, as safetensors_file.write takes them; scales in `dtype`."""
    n, k, groups, bits = weight.out_features, weight.in_features, weight.scales.shape[0], weight.bits
    less = 2 - _VERSIONS[quantization["checkpoint_format"]]
    return [
        (
            f"{name}.qweight",
            torch.int32,
            (word_count(k, bits), n),
            lambda: pack(weight.by_input(weight.unpacked()).cpu(), bits).T,
        ),
        (
            f"{name}.qzeros",
            torch.int32,
            (groups, word_count(n, bits)),
            lambda: pack(integer_zeros(weight) - less, bits),
        ),
        (f"{name}.{SCALES}", dtype, (groups, n), lambda: new_scales(weight.scales.cpu(), dtype, name)),
        (f"{name}.g_idx", torch.int32, (k,), lambda: g_idx_of(weight.perm, k, weight.group_size)),
    ]


def integer_zeros(weight: PackedWeight) -> torch.Tensor:
    """uint8 [G, N] on the CPU."""
    zeros = torch.full_like(weight.scales, middle(weight.bits)) if weight.zeros is None else weight.zeros
    return zeros.to(torch.uint8).cpu()


FORMAT = gathered(METHOD, check_config, packer, PARTS, SCALES)
TARGET = Target(METHOD, quantization_config, entries, repeated_in=CONFIG)
