"""What every folder of safetensors files shares: where tensors lie, dense ones in, new scales out."""

import functools
from pathlib import Path

from . import files, safetensors_file
from .rounding import stored_scales

INDEX = "model.safetensors.index.json"


def tensor_places(folder):
    """name -> (file, place) of every tensor in the folder's safetensors files.

    FileNotFoundError for a file that the index names and the folder lacks; ValueError for an index that is
    damaged or names files elsewhere, a tensor that is in two files and one that is not in its file.
    """
    index = _index(folder)
    names = sorted(set(index.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not index and "model.safetensors" in names:
        names = ["model.safetensors"]
    if not names:
        raise FileNotFoundError(f"{folder} holds a config.json but no safetensors file")
    found = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing or no file, though {INDEX} names it; fetch the checkpoint again"
            )
        for tensor, place in safetensors_file.places(folder / name).items():
            if tensor in found:
                raise ValueError(
                    f"{folder}: tensor {tensor} is in {found[tensor][0].name} and in {name}; one "
                    "of them is of another checkpoint, remove it"
                )
            found[tensor] = folder / name, place
    for tensor, name in index.items():
        if tensor not in found or found[tensor][0].name != name:
            raise ValueError(
                f"{folder / name} holds no tensor {tensor!r:.200}, though {INDEX} says so; fetch the checkpoint again"
            )
    return found


def _index(folder):
    """tensor -> file name from the index of a folder that has one, else an empty dictionary."""
    path = folder / INDEX
    if not path.exists():
        return {}
    names = files.read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} is damaged: it has no weight_map of tensors and their files; fetch it again")
    for name in names.values():
        if Path(name).name != name or not name.isprintable():
            raise ValueError(
                f"{path} names {name!r:.200}, which is no file of this folder; weights elsewhere are not read"
            )
    return names


def weight_files(folder):
    """The files that hold the weights."""
    return {file for file, _ in tensor_places(folder).values()}


def read_weights(folder, dtype, parts, make):
    """Yield (Hugging Face name, PackedWeight or tensor in `dtype`, where it came from) for every tensor.

    parts: the names of a layer's tensors; a layer is where the first of them is. make(layer, {part: tensor})
    gives its PackedWeight; a ValueError of it is told with the layer's tensor and file.
    """
    found = tensor_places(folder)
    layers = [name.removesuffix(f".{parts[0]}") for name in found if name.endswith(f".{parts[0]}")]
    taken = {f"{layer}.{part}" for layer in layers for part in parts}
    for layer in layers:
        where = f"{layer}.{parts[0]} in {found[f'{layer}.{parts[0]}'][0].name}"
        beside = [part for part in parts if f"{layer}.{part}" in found]
        tensors = {part: safetensors_file.read(*found[f"{layer}.{part}"]) for part in beside}
        try:
            yield f"{layer}.weight", make(layer, tensors), where
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    for name, (file, place) in found.items():
        if name not in taken:
            tensor = safetensors_file.read(file, place)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor, f"{name} in {file.name}"


# ---------------------------------------------------------------------------------------------- writing


def save_scales(folder, staging, changes):
    """Copy all of `folder` to `staging` with the scales that `scale_changes` gives."""
    copy_all(folder, staging)
    for _, new, file, place in changes:
        files.patch(staging / file.name, [(place[2], safetensors_file.to_bytes(new))])


def scale_changes(folder, find, part, transposed=False):
    """Yield (layer, its scales in the file's dtype and order, file, place).

    part: the name of a layer's scales, [G, N] in the file or, transposed, [N, G]. find(name of a weight) gives
    its PackedWeight, or None.
    """
    for name, (file, place) in tensor_places(folder).items():
        layer, _, leaf = name.rpartition(".")
        packed = find(f"{layer}.weight") if leaf == part else None
        if packed is not None:
            scales = packed.scales.T if transposed else packed.scales
            yield layer, stored_scales(scales.cpu(), safetensors_file.read(file, place), name), file, place


def dense_entries(folder, is_dense):
    """The tensors for whose names `is_dense(name)`, as safetensors_file.write takes them, unchanged."""
    return [
        (name, safetensors_file.DTYPES[place[0]], place[1], functools.partial(safetensors_file.read, file, place))
        for name, (file, place) in tensor_places(folder).items()
        if is_dense(name)
    ]


def scale_dtypes(folder, part):
    """layer -> dtype of its scales; part: their name."""
    return {
        name.removesuffix(f".{part}"): safetensors_file.DTYPES[place[0]]
        for name, (_, place) in tensor_places(folder).items()
        if name.endswith(f".{part}")
    }


def copy_all(folder, staging):
    """Every file but hidden ones; other folders' staging and version control are not the checkpoint."""
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            files.copy(path, staging / inside)
