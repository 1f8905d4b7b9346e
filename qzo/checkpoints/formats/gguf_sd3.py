"""GGUF files of Stable Diffusion 3 and 3.5 transformers, as the tools that serve them write and read them.

general.architecture is "sd3". Tensors have the names of Stability's own checkpoints: q, k and v of an attention are
one, rows one after another, and the last modulations hold shift and scale in the other order. So a tensor of the file
may be several of diffusers', and rows may be in another order: `parts_of` tells which. Blocks are as in gguf.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ...nn.weights import PackedWeight
from ...system.progress import tracked
from . import files
from .gguf import TRAINED, packed_rows, patch_rows
from .gguf_blocks import NAMES
from .gguf_file import GGUFFile, TensorInfo
from .protocol import Entry, Find

ARCHITECTURE = "sd3"
_PREFIX = "model.diffusion_model."
_TOP = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_BLOCK = {  # of joint_blocks.N -> of transformer_blocks.N; q, k and v of one tensor
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
Parts = list[tuple[str, torch.Tensor | None]]  # diffusers' tensor, the file's rows that are its; None: all, in order


def open_file(path: Path) -> GGUFFile:
    """The file; ValueError for one of another architecture."""
    file = GGUFFile(path)
    found = file.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise ValueError(
            f"{path}: general.architecture is {found!r:.60}; a transformer of Stable Diffusion 3 or 3.5 "
            f"({ARCHITECTURE!r}) can be read"
        )
    return file


def parts_of(file: GGUFFile, info: TensorInfo) -> Parts:
    """What a tensor is in diffusers' model. ValueError for a name that no such file has."""
    name = info.name.removeprefix(_PREFIX)
    owner, _, leaf = name.rpartition(".")
    if name in _TOP:
        return [(_TOP[name], None)]
    if owner in _TOP:
        order = _swapped(info) if owner == "final_layer.adaLN_modulation.1" else None
        return [(f"{_TOP[owner]}.{leaf}", order)]
    found = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", owner)
    if found is None or found[2] not in _BLOCK:
        raise ValueError(f"{file.path}: tensor {info.name} is unknown; a transformer of {ARCHITECTURE} has none such")
    number, inside = int(found[1]), _BLOCK[found[2]]
    names = [f"transformer_blocks.{number}.{part}.{leaf}" for part in inside]
    if info.shape[0] % len(names):
        raise ValueError(f"{file.path}: tensor {info.name} has {info.shape[0]} rows, which are not those of q, k and v")
    if len(names) == 1:
        last = found[2] == "context_block.adaLN_modulation.1" and number == _blocks(file) - 1
        return [(names[0], _swapped(info) if last else None)]
    rows = info.shape[0] // 3
    return [(name, torch.arange(i * rows, (i + 1) * rows)) for i, name in enumerate(names)]


def _blocks(file: GGUFFile) -> int:
    found = (re.search(r"joint_blocks\.(\d+)\.", name) for name in file.tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _swapped(info: TensorInfo) -> torch.Tensor:
    """Rows of shift before scale, where the file has scale after shift."""
    half, odd = divmod(info.shape[0], 2)
    if odd:
        raise ValueError(f"tensor {info.name} has {info.shape[0]} rows, which are not shift and scale")
    return torch.arange(2 * half).roll(-half)


def weights(file: GGUFFile, dtype: torch.dtype) -> Iterator[Entry]:
    """Yield (diffusers' name, PackedWeight or tensor in `dtype`, where it came from) for every tensor.

    ValueError if no tensor can be trained.
    """
    if not any(map(_trains, file.tensors.values())):
        trained = ", ".join(NAMES[kind] for kind in TRAINED)
        kinds = ", ".join(sorted({info.type_name for info in file.tensors.values()}))
        raise ValueError(f"{file.path}: no tensor can be trained: they are {kinds}, and only {trained} train")
    for info in file.tensors.values():
        where = f"{info.name} in {file.path.name}"
        if info.quantized and len(info.shape) != 2:
            raise ValueError(f"{where}: {info.type_name} of shape {list(info.shape)}; only matrices may be quantized")
        parts = parts_of(file, info)
        packed = _packed(file, info, parts, where) if _trains(info) else None
        if packed is not None:
            yield from ((name, weight, where) for name, weight in packed.items())
            continue
        whole = file.dense(info, dtype)
        for name, order in parts:
            yield name, whole if order is None else whole[order].clone(), where


def _trains(info: TensorInfo) -> bool:
    return info.type in TRAINED and len(info.shape) == 2


def _packed(file: GGUFFile, info: TensorInfo, parts: Parts, where: str) -> dict[str, PackedWeight] | None:
    """{diffusers' name: PackedWeight}; None where a part stays dense, as all of them do then."""
    found = {}
    for name, order in parts:
        try:
            weight = packed_rows(file, info, order, where)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if weight is None:
            return None
        found[name] = weight
    return found


def save(file: GGUFFile, target: Path, find: Find) -> None:
    """Copy `file` to `target` with the scales of the PackedWeight (or None) that `find(diffusers' name)` gives."""
    files.copy(file.path, target)
    for info in tracked(file.tensors.values(), "saving", "tensors"):
        if not _trains(info):
            continue
        parts = parts_of(file, info)
        found = [weight for name, _ in parts if (weight := find(name)) is not None]
        if len(found) < len(parts):
            continue
        orders = [order for _, order in parts if order is not None]
        zeros = [weight.zeros for weight in found if weight.zeros is not None]
        raw = file.raw(info)
        changed = patch_rows(
            info.blocks(raw),
            info,
            torch.cat([weight.scales for weight in found], 1),
            torch.cat(zeros, 1) if zeros else None,
            torch.cat(orders) if orders else None,
        )
        if changed:
            files.patch(target, [(info.offset, raw.numpy().tobytes())])
