"""GGUF checkpoints: blocks in, patched blocks out. gguf_models.py tells which architectures.

    Q4_0:  w = d (c - 8)      scale d, no zero points
    Q4_1:  w = d c + m        scale d, float32 zero point -m / d
    Q8_0:  w = d (c - 128)    scale d, no zero points, codes of 8 bits; embedding and output stay dense

On save d is rounded to float16 first, then m = -d * zero; a block whose scale did not change keeps its bytes.
Tensors of other types are dense here and stay as they are. Llama's rows of q and k lie interleaved for the
rotary embedding there, in halves in transformers: both ways permute them.
"""

import collections
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ...kernels.codes import pack_rows, row_shape
from ...nn.weights import PackedWeight
from ...system.progress import tracked
from . import files, gguf_tokenizer
from .gguf_blocks import NAMES, Q4_0, Q4_1, Q8_0, codes, halves
from .gguf_config import config, family, heads, kv_heads
from .gguf_file import GGUFFile, TensorInfo
from .gguf_models import ROPE_TENSORS, TOP
from .protocol import Checkpoint, Entry, Find, Quantization, SavedScales
from .reading import make_config
from .rounding import stored_scales

__all__ = ["FORMAT", "METHOD", "TRAINED", "config", "hf_name", "save", "saved_scales", "weights"]
METHOD = "gguf"
TRAINED = {Q4_0: 4, Q4_1: 4, Q8_0: 8}  # bits of a code
_HEADS = {"attn_q": heads, "attn_k": kv_heads}


def hf_name(file: GGUFFile, name: str) -> str | None:
    """The Hugging Face name of a tensor, None for one that the configuration takes in.

    ValueError for one that no model of the file's architecture has.
    """
    kind, parts = family(file), name.split(".")
    if len(parts) == 2 and parts[0] in TOP:
        return f"{TOP[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in kind.layer:
        return f"model.layers.{parts[1]}.{kind.layer[parts[2]]}.{parts[3]}"
    if any(name in ROPE_TENSORS.get(scaling, ()) for scaling in kind.scalings):
        return None
    raise ValueError(f"{file.path}: tensor {name} is unknown; {kind.cls} has none of this name")


def _row_order(file: GGUFFile, info: TensorInfo) -> torch.Tensor | None:
    """GGUF row of each Hugging Face row, for interleaved q and k; None for other tensors."""
    count = _HEADS.get(info.name.split(".")[-2])
    if count is None or not family(file).interleaved:
        return None
    if info.shape[0] % (2 * count(file)):
        raise ValueError(
            f"{file.path}: tensor {info.name} has {info.shape[0]} rows, which {count(file)} "
            "heads do not divide into pairs"
        )
    return torch.arange(info.shape[0]).view(count(file), -1, 2).transpose(1, 2).flatten()


def weights(file: GGUFFile, dtype: torch.dtype) -> Iterator[Entry]:
    """Yield (Hugging Face name, PackedWeight or tensor in `dtype`, where it came from) for every tensor.

    Warns once of the layers that stay frozen, by count and type. ValueError if nothing in the file trains.
    """
    _report_frozen(file)
    offset = family(file).norm_offset
    for info in file.tensors.values():
        name, where = hf_name(file, info.name), f"{info.name} in {file.path.name}"
        if name is not None:
            if len(info.shape) > 2 or (len(info.shape) == 1 and info.quantized):
                raise ValueError(
                    f"{where}: {info.type_name} of shape {list(info.shape)}; only matrices and "
                    "plain vectors can be read"
                )
            order = _row_order(file, info)
            try:
                packed = packed_rows(file, info, order, where) if _trains(info) else None
                minus = offset if info.name.endswith("norm.weight") else 0.0
                value = packed or file.dense(info, dtype, order, minus)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            yield name, value, where


def _trains(info: TensorInfo) -> bool:
    dense = ("token_embd.weight", "output.weight") if info.type == Q8_0 else ("token_embd.weight",)
    return info.type in TRAINED and info.name not in dense


def _report_frozen(file: GGUFFile) -> None:
    """Warn of layers whose type does not train. ValueError if no tensor's does."""
    layers = [info for info in file.tensors.values() if len(info.shape) > 1 and info.name.startswith("blk.")]
    frozen = collections.Counter(info.type_name for info in layers if not _trains(info))
    named = ", ".join(f"{count} {kind}" for kind, count in frozen.most_common())
    trained = ", ".join(NAMES[kind] for kind in TRAINED)
    if not any(_trains(info) for info in file.tensors.values()):
        raise ValueError(
            f"{file.path}: no tensor can be trained: the layers are {named}, and only {trained} "
            "train; make such a file (llama-quantize MODEL OUT Q4_0), or give the float "
            "checkpoint"
        )
    if frozen:
        warnings.warn(
            f"{file.path}: {frozen.total()} of {len(layers)} layers stay frozen ({named}); only {trained} train",
            stacklevel=2,
        )


def packed_rows(file: GGUFFile, info: TensorInfo, order: torch.Tensor | None, where: str) -> PackedWeight | None:
    """PackedWeight of blocks of a type that trains, of the rows `order` alone if given; None where a block is a
    constant, which no zero point can express."""
    blocks = info.blocks(file.raw(info))
    blocks = blocks if order is None else blocks[order]
    scales, zeros = halves(blocks, 0).float(), None
    if info.type == Q4_1:
        minimum = halves(blocks, 2).float()
        if not bool(torch.isfinite(minimum).all()):
            raise ValueError("a minimum is NaN or infinite: the file is damaged")
        constant = scales == 0
        if bool((constant & (minimum != 0)).any()):
            warnings.warn(
                f"{where}: a block has scale 0 and a minimum; the whole layer stays dense and frozen", stacklevel=2
            )
            return None
        zeros = torch.where(constant, 8.0, -minimum / scales).T.contiguous()
    bits, n, k = TRAINED[info.type], len(blocks), info.shape[1]
    rows, step = torch.empty(row_shape(n, k, bits), dtype=torch.uint8), max(1, (1 << 20) // k)
    # in blocks of rows: a byte for every code of a wide layer would be twice what the layer takes
    for part, target in zip(blocks.split(step), rows.split(step), strict=True):
        target.copy_(pack_rows(codes(part, info.type), bits))
    return PackedWeight(rows, scales.T.contiguous(), zeros, k, bits)


def save(file: GGUFFile, target: Path, find: Find) -> None:
    """Copy `file` to `target` with the scales of the PackedWeight (or None) that `find(Hugging Face name)`
    gives."""
    files.copy(file.path, target)
    for info in tracked(file.tensors.values(), "saving", "tensors"):
        name = hf_name(file, info.name) if _trains(info) else None
        packed = find(name) if name else None
        if packed is not None:
            raw = file.raw(info)
            if patch_rows(info.blocks(raw), info, packed.scales, packed.zeros, _row_order(file, info)):
                files.patch(target, [(info.offset, raw.numpy().tobytes())])


def saved_scales(file: GGUFFile, find: Find) -> Iterator[SavedScales]:
    """Yield (layer, float32 scales [G, N], zero points or None) as `save` writes them: -m / d moves too."""
    for info in file.tensors.values():
        name = hf_name(file, info.name)
        packed = find(name) if name and len(info.shape) == 2 else None
        if name and packed is not None:
            blocks, order = info.blocks(file.raw(info)), _row_order(file, info)
            patch_rows(blocks, info, packed.scales, packed.zeros, order)
            blocks = blocks if order is None else blocks[order]
            d = halves(blocks, 0).float()
            zeros = torch.where(d == 0, 8.0, -halves(blocks, 2).float() / d).T if info.type == Q4_1 else None
            yield name.removesuffix(".weight"), d.T, zeros


def patch_rows(
    blocks: torch.Tensor,
    info: TensorInfo,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
) -> bool:
    """Put new d (and m) into the blocks; returns whether any changed. scales, zeros: float32 [G, N]; order[i]: the
    file's row that is row i of them."""
    back = torch.arange(info.shape[0]) if order is None else order.argsort()
    new = scales.T.cpu()[back]
    old = halves(blocks, 0)
    changed = new != old.float()
    if not bool(changed.any()):
        return False
    d = stored_scales(new, old, info.name)
    blocks[..., :2][changed] = d[changed].unsqueeze(-1).view(torch.uint8)
    if info.type == Q4_1:
        assert zeros is not None, info.name
        m = (-d.float() * zeros.T.cpu()[back]).to(torch.float16)
        if not bool(torch.isfinite(m).all()):
            raise ValueError(
                f"{info.name}: a minimum does not fit float16 any more; the run has diverged, nothing was written"
            )
        blocks[..., 2:4][changed] = m[changed].unsqueeze(-1).view(torch.uint8)
    return True


# ---------------------------------------------------------------------------------------------- as a format


class GGUFFormat:
    """A protocol.Copied of single files, which bring their configuration and tokenizer as metadata."""

    method, quantized, scales = METHOD, True, None

    def open(self, path: Path, quantization: Quantization | None, trust_remote_code: bool) -> Checkpoint:
        """As protocol.Format."""
        file = GGUFFile(path)
        return Checkpoint(
            format=self,
            path=path,
            config=make_config(path, config(file)),
            quantization=None,
            trust_remote_code=trust_remote_code,
            files=((path, file.size),),
            dtype=torch.float16,
            read=lambda dtype: weights(file, dtype or torch.float16),
            stored_types=lambda: {
                name: (info.type_name, info.nbytes)
                for info in file.tensors.values()
                if (name := hf_name(file, info.name)) is not None
            },
            float_zeros=lambda: next(
                (
                    name.removesuffix(".weight")
                    for info in file.tensors.values()
                    if info.type == Q4_1 and _trains(info) and (name := hf_name(file, info.name)) is not None
                ),
                None,
            ),
        )

    def for_servers(self, name: str) -> bool:
        """As protocol.Format: none is."""
        return False

    def take_along(self, path: Path, staging: Path) -> None:
        """As protocol.Format: the tokenizer, where the file has one."""
        file = GGUFFile(path)
        if gguf_tokenizer.present(file):
            gguf_tokenizer.load(file).save_pretrained(staging)

    def new_config(self, path: Path, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
        """As protocol.Format."""
        return json.loads(config.to_json_string()) | {"dtype": str(dtype).removeprefix("torch.")}

    def save(self, path: Path, target: Path, find: Find) -> None:
        """As protocol.Copied."""
        save(GGUFFile(path), target, find)

    def saved_scales(self, path: Path, find: Find) -> Iterator[SavedScales]:
        """As protocol.Copied: -m / d moves too."""
        return saved_scales(GGUFFile(path), find)


FORMAT = GGUFFormat()
