"""Models that load.py read, back to disk: in the format they came from, or in another."""

import functools
import json
from pathlib import Path

import torch
from torch import nn

from ..loss.losses import losses
from ..nn.arena import codebooks_name
from ..nn.experts import file_name, model_name
from ..nn.layers import layers
from ..nn.linear import QZOLinear
from .formats import (
    FOLDERS,
    GATHERED,
    TARGETS,
    bnb,
    compressed_tensors,
    files,
    gguf,
    gguf_tokenizer,
    gptq,
    safetensors_file,
    told,
)
from .formats.folder import INDEX, dense_entries, scale_dtypes, tensor_places
from .formats.gguf_file import GGUFFile
from .formats.rounding import new_scales
from .tokenizer import load_tokenizer

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_CONFIGS = (gptq.CONFIG, "quantization_config.json", told.AWQ_CONFIG)  # of the source's own format
_EXPORTS = (*TARGETS, "gguf")
WEIGHTS = "model.safetensors"


def save_pretrained(model, out_dir, batch=None):
    """Save in the format the model came from: the source's files with new scales, all else byte for byte.

    A GGUF file keeps its name. A float source is saved as compressed-tensors (pack-quantized), or as bitsandbytes
    with NF4 or FP4 codes. Files of other names in out_dir are left alone. Scales are rounded once, to the file's own
    dtype: with a batch (as `qzo.losses` takes it) returns what that costs, {"loss_before", "loss_after"}, else None.
    Raises ValueError or FileNotFoundError when the model does not come from `qzo.from_pretrained`, its source has
    changed or is gone, or out_dir is the source.
    """
    source = _source(model)
    report = None if batch is None else _rounding_losses(model, batch, _rounded(model, source))
    if source.kind == "float":
        _write_new(model, source, Path(out_dir), _own_form(model))
    else:
        _copy_with_scales(model, source, Path(out_dir), source.path.name)
    return report


def export(model, out, format="compressed-tensors"):
    """Save as "awq", "compressed-tensors" or "gptq" (a folder) or, from a GGUF source, "gguf" (a folder or .gguf file).

    Nothing is quantized again: the new files hold the same weights, exactly, in another arrangement; scales are rounded
    to the dtype that the source has them in. ValueError naming the layer and the reason where the format cannot hold
    them: a float minimum, an order of columns, bits, group sizes or sizes of a layer that it does not have.
    """
    source, out = _source(model), Path(out)
    check_format(format)
    if format == "gguf":
        if source.kind != "gguf":
            raise ValueError(
                f"export to 'gguf' needs a model that was loaded from a GGUF file, whose metadata and "
                f"tokenizer it copies; this one is {source.kind}; use {', '.join(map(repr, TARGETS))}"
            )
        folder, name = (out.parent, out.name) if out.suffix == ".gguf" else (out, source.path.name)
        return _copy_with_scales(model, source, folder, name)
    if source.kind == format:
        return _copy_with_scales(model, source, out, None)
    return _write_new(model, source, out, TARGETS[format])


def check_format(format):
    """ValueError unless it is a format that `export` knows."""
    if format not in _EXPORTS:
        raise ValueError(f"export to {format!r} is not supported; supported are {', '.join(map(repr, _EXPORTS))}")


def _source(model):
    source = getattr(model, "_qzo_source", None)
    if source is None:
        raise ValueError(
            f"this {type(model).__name__} was not loaded by qzo.from_pretrained, so there is "
            "no source to copy; load it that way, or keep its state_dict()"
        )
    source.check()
    return source


def _packed(name, layer):
    for what, values in (("scale", layer.read_scales()), ("number of a codebook", layer.read_codebooks())):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}: a {what} is NaN or infinite; the run has diverged, nothing was written")
    return layer.packed()


def _find(model, tensor):
    """PackedWeight of the layer whose weight has this name in the source, None where the model has no QZOLinear."""
    name = _inside(model._qzo_source, tensor.removesuffix(".weight"))
    try:
        layer = model.get_submodule(name)
    except AttributeError:  # a model without the head that the file has
        return None
    return _packed(name, layer) if isinstance(layer, QZOLinear) else None


def _inside(source, name):
    """The name in the model of a layer of the source's files."""
    return model_name(dict(source.names).get(name, name))


def _renamed(model, source, tensor):
    """The name in a new folder of a tensor of the source's files: the model's, which its config speaks of."""
    names, (owner, _, leaf) = dict(source.names), tensor.rpartition(".")
    inside = f"{model_name(names.get(owner, owner))}.{leaf}" if owner else names.get(tensor, tensor)
    return file_name(inside, model.config.model_type)


def _own_form(model):
    """What a float source is saved as: compressed-tensors, or bitsandbytes where codes stand for entries of a table."""
    return bnb if any(layer.table for layer in layers(model, trainable=None).values()) else compressed_tensors


def _all_packed(model):
    return {name: _packed(name, layer) for name, layer in layers(model, trainable=None).items()}


def _rounded(model, source):
    """(layer, scales, zeros or None) of each layer as `save_pretrained` writes them."""
    if source.kind == "float":
        packed = _all_packed(model).items()
        return (
            (name, new_scales(weight.scales, torch.float32 if weight.table else torch.float16, name).float(), None)
            for name, weight in packed
        )
    if source.kind == "gguf":
        return gguf.rounded(GGUFFile(source.path), functools.partial(_find, model))
    return FOLDERS[source.kind].rounded(source.path, functools.partial(_find, model))


def _rounding_losses(model, batch, rounded):
    """{"loss_before", "loss_after"}: the loss of a batch as the model is, and with its layers rounded.

    rounded: (layer's name, scales float32 [G, N], zeros float32 [G, N] or None where they stay) of each layer, or
    (layer.codebooks, float32, None). They are put into the arena for one forward; afterwards the model is as before,
    bit for bit.
    """
    before = float(losses(model, batch, 1))
    found = layers(model, trainable=None)
    arenas = {id(layer.arena): (layer.arena, layer.arena.data.clone()) for layer in found.values()}
    zeros = {name: layer.zeros for name, layer in found.items()}
    try:
        for name, scales, zero in rounded:
            owner, _, leaf = name.rpartition(".")
            layer = found[_inside(model._qzo_source, owner if leaf == "codebooks" else name)]
            if leaf != "codebooks":
                layer.arena.write(layer.arena_name, scales)
            elif layer.trains_codebooks:
                layer.arena.quads(codebooks_name(layer.arena_name)).copy_(scales.reshape(1, -1, 4))
            if zero is not None:
                layer.zeros = zero.contiguous().to(layer.zeros.device)
        after = float(losses(model, batch, 1))
    finally:
        for arena, data in arenas.values():
            arena.data.copy_(data)
        for name, layer in found.items():
            layer.zeros = zeros[name]
    return {"loss_before": before, "loss_after": after}


def _copy_with_scales(model, source, folder, name):
    find = functools.partial(_find, model)
    home = source.path.parent if source.kind == "gguf" else source.path
    target = folder if source.kind != "gguf" else folder / name
    if target.exists() and target.samefile(source.path):  # through whatever links
        raise ValueError(
            f"{folder} is where this model was loaded from; the source is never overwritten, give another folder"
        )
    if source.kind != "gguf":
        _check_free(folder, {file.name for file in home.iterdir()})
    with files.staged(folder) as staging:
        if source.kind == "gguf":
            gguf.save(GGUFFile(source.path), staging / name, find)
        else:
            FOLDERS[source.kind].save(source.path, staging, find)


def _check_free(folder, names):
    """ValueError where a folder holds weights that readers would take for those of the files of these names."""
    for left, written in ((INDEX, WEIGHTS), (WEIGHTS, INDEX)):
        if (folder / left).exists() and left not in names and written in names:
            raise ValueError(
                f"{folder} holds the {left} of another checkpoint, beside which readers would not find "
                "what would be written; give another folder"
            )


def _write_new(model, source, folder, form):
    """A new folder in the format of the module `form`."""
    if folder.exists() and folder.samefile(source.path):
        raise ValueError(
            f"{folder} is where this model was loaded from; the source is never overwritten, give another folder"
        )
    _check_free(folder, {WEIGHTS})
    kind = model.config.model_type
    packed = {file_name(name, kind): weight for name, weight in _all_packed(model).items()}
    linears = [file_name(name, kind) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantization = form.quantization_config(packed, linears)
    with files.staged(folder) as staging:
        if source.kind != "gguf":
            copy_companions(source.path, staging)
        elif gguf_tokenizer.present(GGUFFile(source.path)):
            load_tokenizer(source.path).save_pretrained(staging)
        entries, dtypes = _dense(model, source, packed)
        for name, weight in packed.items():
            entries += form.entries(name, weight, quantization, dtypes.get(name, torch.float16))
        write_into(staging, form, entries, _config(model, source), quantization)


def write_into(staging, form, entries, config, quantization):
    """Weights and configuration of a new folder in the format of the module `form`; entries: as safetensors_file takes
    them."""
    safetensors_file.write(staging / WEIGHTS, entries, {"format": "pt"})
    if form is gptq:
        _write_json(staging / gptq.CONFIG, quantization)
    _write_json(staging / "config.json", config | {"quantization_config": quantization})


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _config(model, source):
    """The config.json of a new folder."""
    if source.kind == "gguf":
        config = json.loads(model.config.to_json_string())
    else:
        config = told.untold(files.read_object(source.path / "config.json"))
    if source.kind in FOLDERS:
        return config  # dense tensors are the file's own, and so is what it says of them
    return config | {"dtype": str(source.dtype).removeprefix("torch.")}


def _dense(model, source, packed):
    """(entries of all tensors that are not in codes, layer -> dtype of its scales where it is not float16)."""
    scales = getattr(FOLDERS.get(source.kind), "SCALES", None)
    if scales is not None:
        biased = {name for name in packed if model.get_submodule(model_name(name)).bias is not None}

        def is_dense(name):
            owner, _, leaf = _renamed(model, source, name).rpartition(".")
            served = source.kind == compressed_tensors.METHOD and compressed_tensors.is_for_servers(name)
            return not served and (owner not in packed or (leaf == "bias" and owner in biased))

        dense = [(_renamed(model, source, name), *rest) for name, *rest in dense_entries(source.path, is_dense)]
        stored = scale_dtypes(source.path, scales)
        return dense, {file_name(_inside(source, name), model.config.model_type): stored[name] for name in stored}
    dense = dict(model.named_parameters())  # tied tensors once
    buffers = dict(model.named_buffers())
    own = tuple(f"{name}." for name in layers(model, trainable=None))
    dense |= {name: buffers[name] for name in model.state_dict() if name in buffers and not name.startswith(own)}
    kind = model.config.model_type
    return [
        (file_name(name, kind), dtype, value.shape, lambda value=value, dtype=dtype: value.detach().to(dtype))
        for name, value in dense.items()
        for dtype in [_stored_dtype(value, source.dtype)]
    ], {}


def _stored_dtype(value, dtype):
    """`dtype` if it holds these floats exactly, else their own; the own dtype of integers."""
    if not value.is_floating_point() or torch.equal(value.to(dtype).to(value.dtype), value):
        return dtype if value.is_floating_point() else value.dtype
    return value.dtype


def copy_companions(folder, staging):
    """Tokenizer, generation settings, licence and the like: every plain file that holds no weights."""
    for path in folder.iterdir():
        weights = path.name.endswith(_WEIGHT_SUFFIXES) or path.name in _CONFIGS
        if path.is_file() and not path.name.startswith(".") and not weights:
            files.copy(path, staging / path.name)


# ---------------------------------------------------------------------------------------------- transformers' own way


def own_config(model):
    """The quantization_config that a model from a float source is saved with."""
    kind = model.config.model_type
    linears = [file_name(name, kind) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    packed = {file_name(name, kind): weight for name, weight in _all_packed(model).items()}
    return _own_form(model).quantization_config(packed, linears)


def tensors(model):
    """name -> tensor of the whole checkpoint, which transformers' save_pretrained writes.

    In the source's format, scales rounded to its dtype; what did not change has the source's own bytes. A float
    source, or none, gives what `save_pretrained` here writes for one. All but the dense tensors are copies in memory,
    where `save_pretrained` here patches copies of the files. ValueError for other formats than formats.GATHERED,
    FileNotFoundError or ValueError when the source is gone or has changed.
    """
    source, state, kind = getattr(model, "_qzo_source", None), _dense_state(model), model.config.model_type
    if source is None or source.kind == "float":
        form, quantization = _own_form(model), own_config(model)
        if source is not None:
            cast = {id(t): t.to(_stored_dtype(t, source.dtype)) for t in state.values()}
            state = {name: cast[id(t)] for name, t in state.items()}
        state = {file_name(name, kind): t for name, t in state.items()}
        for layer, weight in _all_packed(model).items():
            entries = form.entries(file_name(layer, kind), weight, quantization, torch.float16)
            state |= {name: make() for name, _, _, make in entries}
        return state
    if source.kind not in GATHERED:
        raise ValueError(
            f"this model was loaded from {source.path} ({source.kind}), which transformers' "
            "save_pretrained cannot write; use qzo.save_pretrained(model, folder)"
        )
    source.check()
    names, packed = dict(source.names), layers(model, trainable=None)
    changed = GATHERED[source.kind].changed_scales(source.path, functools.partial(_find, model))
    scales, stored = {(file, place): new for _, new, file, place in changed}, {}
    for name, (file, place) in tensor_places(source.path).items():
        owner, _, leaf = name.rpartition(".")
        owner = model_name(names.get(owner, owner))
        inside = f"{owner}.{leaf}"
        if inside in state:
            stored[id(state[inside])] = _as_stored(state[inside], file, place)
        elif owner in packed or (source.kind == compressed_tensors.METHOD and compressed_tensors.is_for_servers(name)):
            new = scales.get((file, place))
            state[inside] = safetensors_file.read(file, place) if new is None else new
    return {file_name(name, kind): stored.get(id(tensor), tensor) for name, tensor in state.items()}


def _dense_state(model):
    """Parameters and saved buffers; tied ones are one tensor under each of their names.

    state_dict() would make planes of all codes first.
    """
    state, detached = {}, {}
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


def _as_stored(tensor, file, place):
    """The file's tensor where the model's is the same in another dtype, else the model's."""
    if safetensors_file.DTYPES.get(place[0]) in (tensor.dtype, None) or list(place[1]) != list(tensor.shape):
        return tensor
    stored = safetensors_file.read(file, place)
    return stored if torch.equal(stored.to(tensor.dtype), tensor.cpu()) else tensor
