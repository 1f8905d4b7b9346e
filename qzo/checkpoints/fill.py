"""A model on the meta device and what a file holds of it: every entry in its place, none missing, none left."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn.choice import sizes_of
from ..nn.experts import stack_of
from ..nn.linear import QZOLinear
from ..nn.weights import PackedWeight
from ..system.memory import Trimmer
from ..system.progress import tracked
from .formats.protocol import Entry
from .names import Names

Keep = Callable[[torch.Tensor], torch.Tensor]  # a layer's codes, as they are made -> the same, as they are to be held


def fill(model: Any, entries: Iterable[Entry], path: Path, device: torch.device, keep: Keep | None = None) -> Names:
    """Put every entry in its place and return the Names; ValueError for an entry that the model lacks and for what
    stays empty."""
    names, trimmer = Names(model), Trimmer()
    filled: dict[str, str] = {}
    missing, needless = set(names.known), needless_of(model)
    for name, value, where in tracked(entries, "loading", "tensors", len(names.known)):
        name = names(name)
        stack = None if name in missing else stack_of(model, name)
        if stack:  # the file has a tensor for each expert, the model one for all
            old, new = names.split(stack)
            missing = missing - old | new
        if name not in missing:
            if needless(name) or _empty_bias(name, value, model):
                continue
            if name in filled:
                raise ValueError(
                    f"{where}: {name} is there already, from {filled[name]}; the files are of two "
                    "checkpoints, remove those of one"
                )
            raise ValueError(
                f"{where}: {type(model).__name__} has no tensor {name}; the file is of another architecture"
            )
        missing.discard(name)
        filled[name] = where
        if isinstance(value, PackedWeight):
            layer = put_packed(model, name, value, where, device)
            layer.codes = layer.codes if keep is None else keep(layer.codes)
            trimmer.took(value.codes.nbytes)
        else:
            _put_dense(model, name, value, where, device)
            trimmer.took(value.nbytes)
    if hasattr(model, "tie_weights"):  # a diffusers model ties none
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} tensors are missing, the first is {min(missing)}; the checkpoint is incomplete"
        )
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise ValueError(
            f"{path}: nothing fills {empty[0]} of {type(model).__name__}; this architecture cannot be loaded"
        )
    return names


def needless_of(model: Any) -> Callable[[str], bool]:
    """needless(name): whether a tensor of a file is one that the model computes by itself, or its class leaves out.

    Older files hold angles of rotary embeddings, and numbers of positions, that transformers keeps as plain buffers.
    """
    buffers = [name for name, _ in model.named_buffers()]
    computed = ("rotary_emb.inv_freq", "position_ids")
    patterns = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        *(rf"(^|\.){re.escape(leaf)}$" for leaf in computed if any(name.endswith(leaf) for name in buffers)),
    ]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _empty_bias(name: str, value: PackedWeight | torch.Tensor, model: nn.Module) -> bool:
    """Whether it is a bias of zeros for a Linear without one: AutoGPTQ wrote one for every layer."""
    owner, _, leaf = name.rpartition(".")
    if leaf != "bias" or isinstance(value, PackedWeight) or bool(value.any()):
        return False
    return isinstance(dict(model.named_modules()).get(owner), nn.Linear | QZOLinear)


def put_packed(model: Any, name: str, packed: PackedWeight, where: str, device: torch.device) -> QZOLinear:
    """Replace the nn.Linear, or Conv1D, whose weight has this name by a QZOLinear, and return that. ValueError if it is
    none or of other shape."""
    owner, _, leaf = name.rpartition(".")
    linear = model.get_submodule(owner)
    sizes = sizes_of(linear)
    if sizes is None or leaf != "weight":
        raise ValueError(
            f"{where}: 4-bit weights for {owner}, which is a {type(linear).__name__}; only nn.Linear and transformers' "
            "Conv1D can be replaced: quantize the model again, and leave this layer out"
        )
    tied = getattr(model, "all_tied_weights_keys", {}).get(name)
    if tied is not None:
        raise ValueError(
            f"{where}: {owner} is quantized, but the config ties it to {tied}; if the quantized one is "
            "meant, set tie_word_embeddings to false in config.json"
        )
    if (packed.out_features, packed.in_features) != sizes:
        raise ValueError(
            f"{where}: has shape {[packed.out_features, packed.in_features]}, {owner} of this model needs {list(sizes)}"
        )
    layer = QZOLinear.from_packed(packed).to(device)
    layer.bias = linear.bias  # filled by its own entry, before or after this one
    parent, _, child = owner.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return layer


def _put_dense(model: nn.Module, name: str, tensor: torch.Tensor, where: str, device: torch.device) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    old = getattr(owner, leaf)
    if old.shape != tensor.shape:
        raise ValueError(f"{where}: has shape {list(tensor.shape)}, {name} of this model needs {list(old.shape)}")
    if old.is_floating_point() and not tensor.is_floating_point():
        raise ValueError(
            f"{where}: {str(tensor.dtype).removeprefix('torch.')} for {name}, which holds floats: it is "
            "quantized in a way that the quantization_config does not tell"
        )
    tensor = tensor.to(device=device, dtype=old.dtype)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, leaf, tensor)
