"""What every folder of safetensors files shares: where tensors lie, dense ones in, new scales out."""

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ...nn.weights import PackedWeight
from ...system.progress import tracked
from . import files, safetensors_file
from .protocol import Change, Entry, Find, NewTensor, Place
from .rounding import stored_scales

GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
_NAMES = ("model", "diffusion_pytorch_model")  # of the weights: transformers', diffusers'
# what a new folder does not take over: weights, and the quantization_config of the source's own format
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
CONFIGS = ("quantize_config.json", "quantization_config.json", "quant_config.json")  # GPTQ's, ..., AWQ's


def tensor_places(folder: Path) -> dict[str, tuple[Path, Place]]:
    """name -> (file, place) of every tensor in the folder's safetensors files.

    FileNotFoundError for a file that the index names and the folder lacks; ValueError for an index that is
    damaged or names files elsewhere, a tensor that is in two files and one that is not in its file.
    """
    index = _index(folder)
    names = sorted(set(index.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
    whole = [f"{name}.safetensors" for name in _NAMES if not index and f"{name}.safetensors" in names]
    names = whole[:1] or names
    if not names:
        raise FileNotFoundError(f"{folder} holds a config.json but no safetensors file")
    found: dict[str, tuple[Path, Place]] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing or no file, though {index_of(folder).name} names it; fetch the "
                "checkpoint again"
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
                f"{folder / name} holds no tensor {tensor!r:.200}, though {index_of(folder).name} says so; fetch the "
                "checkpoint again"
            )
    return found


def index_of(folder: Path) -> Path:
    """Where the folder's index is, or would be."""
    found = [path for name in _NAMES if (path := folder / f"{name}.safetensors.index.json").exists()]
    return found[0] if found else folder / INDEX


def _index(folder: Path) -> dict[str, str]:
    """tensor -> file name from the index of a folder that has one, else an empty dictionary."""
    path = index_of(folder)
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


def weight_files(folder: Path) -> set[Path]:
    """The files that hold the weights."""
    return {file for file, _ in tensor_places(folder).values()}


def read_weights(
    folder: Path,
    dtype: torch.dtype | None,
    parts: tuple[str, ...],
    make: Callable[[str, dict[str, torch.Tensor]], PackedWeight | torch.Tensor],
) -> Iterator[Entry]:
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
    yield from _dense(found, dtype, taken)


def read_dense(folder: Path, dtype: torch.dtype | None) -> Iterator[Entry]:
    """Yield every tensor, floats in `dtype` or, with None, as they are stored; in the order of `tensor_places`."""
    return _dense(tensor_places(folder), dtype, ())


def _dense(
    places: Mapping[str, tuple[Path, Place]], dtype: torch.dtype | None, taken: Container[str]
) -> Iterator[Entry]:
    for name, (file, place) in places.items():
        if name not in taken:
            yield name, _in_dtype(safetensors_file.read(file, place), dtype), f"{name} in {file.name}"


def _in_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


# ---------------------------------------------------------------------------------------------- writing


def save_scales(folder: Path, staging: Path, changes: Iterable[Change]) -> None:
    """Copy all of `folder` to `staging` with the scales that `scale_changes` gives."""
    copy_all(folder, staging)
    for _, new, file, place in tracked(changes, "saving", "layers"):
        files.patch(staging / file.name, [(place[2], safetensors_file.to_bytes(new))])


def scale_changes(folder: Path, find: Find, part: str, transposed: bool = False) -> Iterator[Change]:
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


def dense_entries(folder: Path, is_dense: Callable[[str], bool]) -> list[NewTensor]:
    """The tensors for whose names `is_dense(name)`, as safetensors_file.write takes them, unchanged."""
    return [
        (name, safetensors_file.DTYPES[place[0]], place[1], functools.partial(safetensors_file.read, file, place))
        for name, (file, place) in tensor_places(folder).items()
        if is_dense(name)
    ]


def scale_dtypes(folder: Path, part: str) -> dict[str, torch.dtype]:
    """layer -> dtype of its scales; part: their name."""
    return {
        name.removesuffix(f".{part}"): safetensors_file.DTYPES[place[0]]
        for name, (_, place) in tensor_places(folder).items()
        if name.endswith(f".{part}")
    }


def copy_all(folder: Path, staging: Path) -> None:
    """Every file but hidden ones; other folders' staging and version control are not the checkpoint. ValueError as
    copy_companions."""
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            if not path.name.endswith(_WEIGHT_SUFFIXES):
                check_own(path, folder)
            files.copy(path, staging / inside)


def copy_companions(folder: Path, staging: Path) -> None:
    """Tokenizer, generation settings, licence and the like: every plain file that holds no weights. ValueError for a
    link to a file elsewhere: what is written is given to others."""
    for path in folder.iterdir():
        weights = path.name.endswith(_WEIGHT_SUFFIXES) or path.name in CONFIGS
        if path.is_file() and not path.name.startswith(".") and not weights:
            check_own(path, folder)
            files.copy(path, staging / path.name)


def check_own(path: Path, folder: Path) -> None:
    """ValueError for a link that leads out of its folder; in a cache of the Hub it leads to the repository's blobs."""
    target = path.resolve()
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    if path.is_symlink() and not any(target.is_relative_to(home) for home in homes):
        raise ValueError(
            f"{path} is a link to {target}, outside of the checkpoint, and its content would be copied into the "
            "result: put the file itself there, or remove the link"
        )
