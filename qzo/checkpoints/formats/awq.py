"""AWQ: 4-bit integers with a scale per group of inputs, as AutoAWQ and GPTQModel write it, in the GEMM layout unless
the config names another (awq_gemv.py).

    qweight  int32 [K, N/8]    eight codes a word along N: columns 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first
    qzeros   int32 [G, N/8]    zero points, packed alike; all 8 where zero_point is false
    scales   [G, N]
The quantizer folds activation scales into norms and into the Linears before: a dense tensor of the file is not
that of the model it was made from.
"""

import dataclasses

import torch

from ...nn.weights import PackedWeight
from . import awq_gemv, safetensors_file
from .folder import save_scales, scale_changes, tensor_places
from .folder_format import gathered
from .gptq import check_bits_and_group, check_groups, check_matrix, check_there, integer_zeros
from .limits import check_integers, check_order, check_whole_words, group_sizes
from .protocol import Target
from .rounding import new_scales
from .words import pack, unpack

METHOD = "awq"
SCALES = "scales"
PARTS = ("qweight", "qzeros", "scales", "scaled_zeros")  # the last of gemv_fast only, instead of qzeros
_NAMES = (("bits", "w_bit"), ("group_size", "q_group_size"))  # transformers' and AutoAWQ's
_VERSIONS = ("gemm", *awq_gemv.VERSIONS)
_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # where column j of a word's eight lies
_COLUMN = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that lies there


def check_config(quantization, where):
    """(group size, None for the whole row; whether there are zero points; version) of a quantization_config that can be
    read.

    One that names no version means GEMM, as AutoAWQ and transformers have it; the tensors' shapes would tell another.
    ValueError naming what cannot.
    """
    layout = next(filter(None, map(quantization.get, ("version", "checkpoint_format", "format"))), "gemm")
    if not isinstance(layout, str) or layout.lower() not in _VERSIONS:
        raise ValueError(
            f"{where}: AWQ weights in version {layout!r:.60}; supported are {', '.join(map(repr, _VERSIONS))}: "
            "quantize the model again with AutoAWQ as one of these (its quant_config's version)"
        )
    bits, size = (_one_of(quantization, names, where) for names in _NAMES)
    check_bits_and_group(bits, size, where, (4,))
    return None if size == -1 else size, quantization.get("zero_point") is not False, layout.lower()


def _one_of(quantization, names, where):
    """What a quantization_config says under one of these names. ValueError where it says two things."""
    found = {name: quantization[name] for name in names if quantization.get(name) is not None}
    if any(value != next(iter(found.values())) for value in found.values()):
        said = " and ".join(f"{name} {value!r:.40}" for name, value in found.items())
        raise ValueError(
            f"{where}: the quantization_config says {said}, which are two names of one setting; remove the wrong one"
        )
    return next(iter(found.values()), None)


def packer(quantization, where):
    """make(layer, {part: tensor}) of a quantization_config: the PackedWeight of a layer; ValueError as check_config."""
    size, zero_point, version = check_config(quantization, where)

    def make(layer, parts):
        if version == "gemm":
            weight = _packed(layer, parts, size)
        else:
            codes, scales, zeros = awq_gemv.read(layer, parts, version, size)
            weight = PackedWeight.from_codes(codes, scales, zeros)
        if weight.zeros is not None and not zero_point:
            raise ValueError(
                "the config says zero_point false, for which all zero points are 8, and these go from "
                f"{int(weight.zeros.min())} to {int(weight.zeros.max())}; if they are what is meant, set "
                "zero_point to true in the quantization_config"
            )
        return weight

    return make


def changed_scales(folder, find):
    """Yield (layer, its scales as the file holds them, file, place); find(name) gives a PackedWeight or None. Of a
    layer in gemv_fast's layout also its scaled_zeros."""
    places = tensor_places(folder)
    layers = [name.removesuffix(".qweight") for name in places if name.endswith(".qweight")]
    other = {f"{layer}.weight": layer for layer in layers if not _is_gemm(places, layer)}
    yield from scale_changes(folder, lambda name: None if name in other else find(name), SCALES)
    for weight, layer in other.items():
        packed = find(weight)
        if packed is None:
            continue
        names = {part: f"{layer}.{part}" for part in ("scales", "scaled_zeros") if f"{layer}.{part}" in places}
        stored = {part: safetensors_file.read(*places[name]) for part, name in names.items()}
        for part, new in awq_gemv.new_parts(packed, stored, names["scales"]).items():
            yield layer, new, *places[names[part]]


def _is_gemm(places, layer):
    """Whether a layer lies in the GEMM layout, by its shapes: there scales have a row for each group, else for each
    output, as the codes have, or the codes are 16-bit words."""
    (_, (kind, shape, *_)), (_, (_, scales, *_)) = (places[f"{layer}.{part}"] for part in ("qweight", SCALES))
    return kind == "I32" and scales[0] != shape[0]


def save(folder, staging, find):
    """Copy all of `folder` to `staging` with the scales of the PackedWeight (or None) that `find(name)` gives."""
    save_scales(folder, staging, changed_scales(folder, find))


def saved_scales(folder, find):
    """Yield (layer, float32 scales [G, N], None) as `save` would write them."""
    places = tensor_places(folder)
    for layer, new, file, place in changed_scales(folder, find):
        if places[f"{layer}.{SCALES}"] != (file, place):
            continue  # scaled_zeros
        groups = len(find(f"{layer}.weight").scales)
        by_output = not _is_gemm(places, layer) and f"{layer}.scaled_zeros" not in places
        yield layer, (new[:, :groups].T if by_output else new[:groups]).to(torch.float32), None


def _packed(layer, parts, size):
    check_there(layer, parts, PARTS[:3])
    words, zero_words, scales = (parts[part] for part in PARTS[:3])
    check_matrix(words, "")
    check_matrix(zero_words, "qzeros ")
    k, n = words.shape[0], 8 * words.shape[1]
    size = check_groups(scales, n, k, size)
    if list(zero_words.shape) != [k // size, n // 8]:
        raise ValueError(f"qzeros must be int32 {[k // size, n // 8]}, got {list(zero_words.shape)}")
    return PackedWeight.from_codes(_columns(words).T, scales, _columns(zero_words))


def _columns(words):
    """int32 [R, N/8] -> uint8 [R, N] in the order of the columns."""
    nibbles = unpack(words, 8 * words.shape[1]).unflatten(1, (-1, 8))
    return nibbles[..., list(_NIBBLE)].flatten(1)


# ---------------------------------------------------------------------------------------------- writing


def quantization_config(packed, ignore):
    """The quantization_config of layers {name: PackedWeight}; `ignore` names the Linears that stay dense.

    zero_point is true for symmetric layers as well: servers then read the zero points, all 8. ValueError for
    what cannot be held exactly.
    """
    sizes = group_sizes(packed)
    for name, weight in packed.items():
        check_integers(name, weight, METHOD)
        if weight.bits != 4:
            raise ValueError(f"{name} has {weight.bits} bits, and awq holds 4; save it as gptq or compressed-tensors")
        if name.endswith("lm_head"):
            raise ValueError(f"{name} is quantized, and awq keeps it dense; save it as gptq or compressed-tensors")
        check_order(name, weight, METHOD)
        check_whole_words(name, weight, METHOD, inputs=False)
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the layers have group sizes {sorted(set(sizes.values()))} (-1: the whole row), and "
            "awq holds one for all; save it as gptq or compressed-tensors"
        )
    return {
        "quant_method": METHOD,
        "bits": 4,
        "group_size": next(iter(sizes.values())),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ignore,
    }


def entries(name, weight, quantization, dtype):
    """The tensors of a layer for a new file, as safetensors_file.write takes them; scales in `dtype`."""
    n, k, groups = weight.out_features, weight.in_features, weight.scales.shape[0]
    made = [
        ("qweight", torch.int32, (k, n // 8), lambda: _words(weight.unpacked().cpu().T)),
        ("qzeros", torch.int32, (groups, n // 8), lambda: _words(integer_zeros(weight))),
        (SCALES, dtype, (groups, n), lambda: new_scales(weight.scales.cpu(), dtype, name)),
    ]
    return [(f"{name}.{part}", *rest) for part, *rest in made]


def _words(columns):
    """Inverse of _columns."""
    return pack(columns.unflatten(1, (-1, 8))[..., list(_COLUMN)].flatten(1))


FORMAT = dataclasses.replace(
    gathered(METHOD, check_config, packer, PARTS, SCALES),
    changed_scales=changed_scales,
    save=save,
    saved_scales=saved_scales,
)
TARGET = Target(METHOD, quantization_config, entries)
