"""What transformers' own save_pretrained writes of a model: the tensors of the checkpoint that saving here writes."""

from pathlib import Path
from typing import Any

import torch

from ..nn.layers import layers
from .formats import GATHERED, safetensors_file
from .formats.folder import tensor_places
from .formats.protocol import Gathered, Place
from .new_folder import own_target, stored_dtype
from .source import Source, source_of
from .trained import Trained


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """name -> tensor of the whole checkpoint, which transformers' save_pretrained writes.

    In the source's format, scales rounded to its dtype; what did not change has the source's own bytes. A float
    source, or none, gives what `save_pretrained` here writes for one. All but the dense tensors are copies in memory,
    where `save_pretrained` here patches copies of the files. ValueError for other formats than formats.GATHERED,
    FileNotFoundError or ValueError when the source is gone or has changed.
    """
    source = source_of(model)
    if source is None or source.copied is None:
        return _new(model, source)
    form = GATHERED.get(source.method)
    if form is None:
        raise ValueError(
            f"this model was loaded from {source.path} ({source.method}), which transformers' "
            "save_pretrained cannot write; use qzo.save_pretrained(model, folder)"
        )
    source.check()
    return _copied(model, source, form)


def _new(model: Any, source: Source | None) -> dict[str, torch.Tensor]:
    """As new_folder.write_new writes them."""
    trained, state = Trained(model, source), _dense_state(model)
    target, packed = own_target(model), trained.packed()
    quantization = target.quantization_config(packed, trained.dense_linears())
    if source is not None:
        cast = {id(t): t.to(stored_dtype(t, source.dtype)) for t in state.values()}
        state = {name: cast[id(t)] for name, t in state.items()}
    state = {trained.outside(name): t for name, t in state.items()}
    for name, weight in packed.items():
        state |= {part: make() for part, _, _, make in target.entries(name, weight, quantization, torch.float16)}
    return state


def _copied(model: Any, source: Source, form: Gathered) -> dict[str, torch.Tensor]:
    """As the source's files have them, with the model's scales."""
    trained, state, packed = Trained(model, source), _dense_state(model), layers(model, trainable=None)
    changed = form.changed_scales(source.path, trained.find)
    scales, stored = {(file, place): new for _, new, file, place in changed}, {}
    for name, (file, place) in tensor_places(source.path).items():
        owner, _, leaf = name.rpartition(".")
        owner = trained.inside(owner)
        inside = f"{owner}.{leaf}"
        if inside in state:
            stored[id(state[inside])] = _as_stored(state[inside], file, place)
        elif owner in packed or form.for_servers(name):
            new = scales.get((file, place))
            state[inside] = safetensors_file.read(file, place) if new is None else new
    return {trained.outside(name): stored.get(id(tensor), tensor) for name, tensor in state.items()}


def _dense_state(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers; tied ones are one tensor under each of their names.

    state_dict() would make planes of all codes first.
    """
    state: dict[str, torch.Tensor] = {}
    detached: dict[int, torch.Tensor] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        held = module._parameters | {
            name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        state |= {
            f"{owner}.{name}".removeprefix("."): detached.setdefault(id(t), t.detach())
            for name, t in held.items()
            if t is not None
        }
    return state


def _as_stored(tensor: torch.Tensor, file: Path, place: Place) -> torch.Tensor:
    """The file's tensor where the model's is the same in another dtype, else the model's."""
    if safetensors_file.DTYPES.get(place[0]) in (tensor.dtype, None) or list(place[1]) != list(tensor.shape):
        return tensor
    stored = safetensors_file.read(file, place)
    return stored if torch.equal(stored.to(tensor.dtype), tensor.cpu()) else tensor
