"""A checkpoint in a new folder, in any format that is a Target: weights, config.json and what travels along."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..nn.experts import model_name
from ..nn.layers import layers
from ..nn.weights import PackedWeight
from .formats import TARGETS, bnb, compressed_tensors, files, safetensors_file, told
from .formats.folder import GENERATION, INDEX, dense_entries, scale_dtypes
from .formats.protocol import NewTensor, Quantization, Target
from .integer_zeros import with_integer_zeros
from .source import Source
from .trained import Trained

WEIGHTS = "model.safetensors"


def own_target(model: Any) -> Target:
    """What a model is saved as that no copy of its source can hold: compressed-tensors, or bitsandbytes where codes
    stand for entries of a table."""
    table = any(layer.table for layer in layers(model, trainable=None).values())
    return TARGETS[bnb.METHOD if table else compressed_tensors.METHOD]


def new_scale_dtype(weight: PackedWeight) -> torch.dtype:
    """Of the scales in a new file where the source has none: bitsandbytes takes float32 only."""
    return torch.float32 if weight.table else torch.float16


def own_config(model: Any) -> dict[str, Any]:
    """The quantization_config of `own_target` for this model."""
    trained = Trained(model, None)
    return own_target(model).quantization_config(trained.packed(), trained.dense_linears())


def write_new(model: Any, source: Source, folder: Path, target: Target, round_zeros: bool = False) -> dict[str, float]:
    """Save a model to a new folder; returns what integer_zeros.py changed, {layer: error}, nothing without round_zeros.

    ValueError where the format cannot hold it, nothing being written then, and where the folder is the source, or holds
    another checkpoint's weights that readers would take for these.
    """
    if folder.exists() and folder.samefile(source.path):
        raise ValueError(
            f"{folder} is where this model was loaded from; the source is never overwritten, give another folder"
        )
    check_free(folder, {WEIGHTS})
    trained = Trained(model, source)
    packed, errors = with_integer_zeros(trained.packed()) if round_zeros else (trained.packed(), {})
    quantization = target.quantization_config(packed, trained.dense_linears())
    with files.staged(folder) as staging:
        source.format.take_along(source.path, staging)
        entries, dtypes = _dense(trained, source, packed)
        for name, weight in packed.items():
            entries += target.entries(name, weight, quantization, dtypes.get(name, torch.float16))
        config = source.format.new_config(source.path, model.config, source.dtype)
        write_into(staging, target, entries, told.untold(config), quantization)
        write_biases(model, staging)
    return errors


def write_biases(model: Any, staging: Path) -> None:
    """The model's label biases into the generation_config.json of a checkpoint that is being written; without any, or
    with those that stand there, not a byte of it changes."""
    biases = getattr(getattr(model, "generation_config", None), "sequence_bias", None)
    path = staging / GENERATION
    found = json.loads(path.read_text()) if path.exists() else {}
    if biases and biases != found.get("sequence_bias"):
        others = found or model.generation_config.to_diff_dict()  # without the file they are read from config.json
        _write_json(path, others | {"sequence_bias": biases})


def write_into(
    staging: Path, target: Target, entries: Iterable[NewTensor], config: dict[str, Any], quantization: Quantization
) -> None:
    """Weights and configuration of a new folder."""
    safetensors_file.write(staging / WEIGHTS, entries, {"format": "pt"})
    if target.repeated_in is not None:
        _write_json(staging / target.repeated_in, quantization)
    _write_json(staging / "config.json", config | {"quantization_config": quantization})


def check_free(folder: Path, names: set[str]) -> None:
    """ValueError where a folder holds weights that readers would take for those of the files of these names."""
    for left, written in ((INDEX, WEIGHTS), (WEIGHTS, INDEX)):
        if (folder / left).exists() and left not in names and written in names:
            raise ValueError(
                f"{folder} holds the {left} of another checkpoint, beside which readers would not find "
                "what would be written; give another folder"
            )


def stored_dtype(value: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype` if it holds these floats exactly, else their own; the own dtype of integers."""
    if not value.is_floating_point() or torch.equal(value.to(dtype).to(value.dtype), value):
        return dtype if value.is_floating_point() else value.dtype
    return value.dtype


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _dense(
    trained: Trained, source: Source, packed: Mapping[str, PackedWeight]
) -> tuple[list[NewTensor], dict[str, torch.dtype]]:
    """(entries of all tensors that are not in codes, layer -> dtype of its scales where it is not float16)."""
    if source.format.scales is None:
        return _dense_of_model(trained, source.dtype), {}
    dense = dense_entries(source.path, _is_dense(trained, source, packed))
    stored = scale_dtypes(source.path, source.format.scales)
    return (
        [(trained.renamed(name), dtype, shape, make) for name, dtype, shape, make in dense],
        {trained.outside(trained.inside(name)): dtype for name, dtype in stored.items()},
    )


def _is_dense(trained: Trained, source: Source, packed: Mapping[str, PackedWeight]) -> Callable[[str], bool]:
    """is_dense(name): whether a tensor of the source's files is no part of a layer's codes; a bias is none."""
    biased = {name for name in packed if trained.model.get_submodule(model_name(name)).bias is not None}

    def is_dense(name: str) -> bool:
        owner, _, leaf = trained.renamed(name).rpartition(".")
        served = source.format.for_servers(name)
        return not served and (owner not in packed or (leaf == "bias" and owner in biased))

    return is_dense


def _dense_of_model(trained: Trained, dtype: torch.dtype) -> list[NewTensor]:
    """The same from the model's own tensors, tied ones once."""
    model = trained.model
    dense, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    own = tuple(f"{name}." for name in layers(model, trainable=None))
    dense |= {name: buffers[name] for name in model.state_dict() if name in buffers and not name.startswith(own)}
    return [_entry(trained.outside(name), value, stored_dtype(value, dtype)) for name, value in dense.items()]


def _entry(name: str, value: torch.Tensor, dtype: torch.dtype) -> NewTensor:
    return name, dtype, value.shape, lambda: value.detach().to(dtype)
