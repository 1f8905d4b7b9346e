"""AWQ's two layouts for rows of few tokens, as AutoAWQ's WQLinear_GEMV and its WQLinear of "gemv_fast" pack them.

gemv        qweight       int32 [N, K/8]     eight codes a word along K, in order, lowest bits first
            qzeros        int32 [N, W]       zero points along the groups, packed alike
            scales        [N, 8 W]
gemv_fast   qweight       int16 [N/4, K]     four rows a word: `_SHUFFLED` tells which
            scales        [8 W, N]
            scaled_zeros  [8 W, N]           -scale * zero point, rounded to the dtype of scales
W words hold G groups and are padded: a multiple of 4 words for groups of 32, of 2 for 64. Padding keeps its bytes.
Rounded scaled_zeros are read as the whole zero points that AutoAWQ made them of, and written for a scale that moved.
"""

import torch

from .gptq import check_there
from .rounding import stored_scales
from .words import unpack

VERSIONS = ("gemv", "gemv_fast")
PARTS = {"gemv": ("qweight", "qzeros", "scales"), "gemv_fast": ("qweight", "scales", "scaled_zeros")}
_ROWS, _RUN = 4, 64  # of gemv_fast: rows that share words, and inputs of one row side by side
_WHOLE = 0.05  # how far -scaled_zeros / scales may be from a whole number; float16 rounds by less than 0.008
# where input i of 32 lies: pairs of four runs of eight change places, then even ones come before odd ones
_SHUFFLED = torch.arange(32).view(4, 4, 2).transpose(0, 1).reshape(4, 4, 2).transpose(1, 2).flatten()


def words_of_groups(in_features, size):
    """W, the words that a row's zero points take."""
    step = {32: 4, 64: 2}.get(size, 1)
    words = -(-(in_features // size) // 8)
    return -(-words // step) * step


def read(layer, parts, version, size):
    """(codes uint8 [N, K], scales [G, N], zero points uint8 [G, N]) of a layer; size None: the whole row."""
    check_there(layer, parts, PARTS[version])
    return (_gemv if version == "gemv" else _gemv_fast)(parts, size)


def _gemv(parts, size):
    words = _matrix(parts["qweight"], "", torch.int32)
    n, k = words.shape[0], 8 * words.shape[1]
    groups, width = _groups(k, size)
    _check(parts["qzeros"], "qzeros", torch.int32, [n, width])
    _check(parts["scales"], "scales", None, [n, 8 * width])
    zeros = unpack(parts["qzeros"], 8 * width)[:, :groups].T
    return unpack(words, k), parts["scales"][:, :groups].T, zeros


def _gemv_fast(parts, size):
    words = _matrix(parts["qweight"], "", torch.int16)
    n, k = _ROWS * words.shape[0], words.shape[1]
    if k % _RUN:
        raise ValueError(f"qweight has {k} inputs; gemv_fast packs them in runs of {_RUN}")
    groups, width = _groups(k, size)
    for part in ("scales", "scaled_zeros"):
        _check(parts[part], part, None, [8 * width, n])
    scales, moved = (parts[part][:groups] for part in ("scales", "scaled_zeros"))
    return _unshuffled(words), scales, _whole(scales.float(), moved.float())


def _unshuffled(words):
    """uint8 [N, K] of int16 words [N/4, K]."""
    fields = words.to(torch.int32).reshape(len(words), -1, _RUN)
    nibbles = torch.stack([fields >> 4 * j & 15 for j in range(_ROWS)], -1).to(torch.uint8)  # [N/4, K/64, 64, 4]
    rows = nibbles.reshape(len(words), -1, _ROWS, _RUN).transpose(1, 2).reshape(-1, words.shape[1] // 32, 32)
    codes = torch.empty_like(rows)
    codes[..., _SHUFFLED] = rows
    return codes.flatten(1)


def _whole(scales, moved):
    """uint8 zero points of -scale * zero point; the middle one where the scale is 0."""
    zeros = torch.where(scales == 0, 8.0, -moved / torch.where(scales == 0, 1.0, scales))
    found = zeros.round()
    if not bool(((zeros - found).abs() <= _WHOLE).all()) or float(found.min()) < 0 or float(found.max()) > 15:
        raise ValueError(
            "scaled_zeros are no scales times whole zero points from 0 to 15, as AutoAWQ writes them; quantize the "
            "model again, or as version 'gemm'"
        )
    return found.to(torch.uint8)


def _groups(k, size):
    size = size or k
    if k % size:
        raise ValueError(f"in_features {k} is no multiple of group_size {size}")
    return k // size, words_of_groups(k, size)


def _matrix(words, name, dtype):
    if words.dtype != dtype or words.dim() != 2 or words.numel() == 0:
        raise ValueError(f"{name}must be a matrix of {dtype}, got {words.dtype} {list(words.shape)}")
    return words


def _check(tensor, name, dtype, shape):
    fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if not fits or list(tensor.shape) != shape:
        kind = "floats" if dtype is None else dtype
        raise ValueError(f"{name} must be {kind} {shape}, got {tensor.dtype} {list(tensor.shape)}")


# ---------------------------------------------------------------------------------------------- writing


def new_parts(packed, stored, name):
    """{part: tensor} of a layer's scales as its file holds them. stored: {part: tensor} of the file, of either layout;
    packed: what the layer is now."""
    fast, groups = "scaled_zeros" in stored, len(packed.scales)
    scales = stored["scales"].clone()
    inside = scales[:groups] if fast else scales[:, :groups].T
    inside.copy_(stored_scales(packed.scales.cpu().contiguous(), inside.clone(), name))
    if not fast:
        return {"scales": scales}
    old, moved = stored["scales"][:groups], stored["scaled_zeros"].clone()
    zeros = torch.full_like(packed.scales, 8) if packed.zeros is None else packed.zeros
    by_new_scale = -(inside.float() * zeros.float().cpu())
    moved[:groups] = torch.where(inside == old, moved[:groups], by_new_scale.to(moved.dtype))
    return {"scales": scales, "scaled_zeros": moved}
