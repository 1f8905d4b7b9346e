"""AWQ in the GEMM layout: 4-bit integers with a scale per group of inputs, as AutoAWQ and GPTQModel write them.

    qweight  int32 [K, N/8]    eight codes a word along N; columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up
    qzeros   int32 [G, N/8]    zero points, packed alike; all 8 where zero_point is false
    scales   [G, N]
The quantizer folds activation scales into norms and into the Linears before: a dense tensor of the file is not that
of the model it was made from.
"""
from ..weights import PackedWeight
from .folder import read_weights
from .folder import weight_files as weight_files
from .gptq import check_bits_and_group, check_groups, check_matrix, check_there
from .gptq import new_scales as new_scales  # scales have GPTQ's name and order
from .gptq import rounded as rounded
from .gptq import save as save
from .words import unpack

METHOD = "awq"
PARTS = ("qweight", "qzeros", "scales")
_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)         # where column j of a word's eight lies


def check_config(quantization, where):
    """The group size (None: the whole row) of a quantization_config that can be read; ValueError naming what cannot."""
    layout = quantization.get("version") or quantization.get("checkpoint_format") or quantization.get("format")
    if not isinstance(layout, str) or layout.lower() != "gemm":
        raise ValueError(f"{where}: AWQ weights in version {layout!r:.60}; supported is 'gemm'")
    size = quantization.get("group_size")
    check_bits_and_group(quantization.get("bits"), size, where, (4,))
    return None if size == -1 else size


def weights(folder, quantization, dtype):
    """Yield (Hugging Face name, PackedWeight or tensor in `dtype`, where it came from) for every tensor."""
    return read_weights(folder, dtype, PARTS, packer(quantization, folder))


def packer(quantization, where):
    """make(layer, {part: tensor}) of a quantization_config: the PackedWeight of a layer. ValueError as check_config."""
    size = check_config(quantization, where)
    return lambda layer, parts: _packed(layer, parts, size)


def _packed(layer, parts, size):
    check_there(layer, parts, PARTS)
    words, zero_words, scales = (parts[part] for part in PARTS)
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
