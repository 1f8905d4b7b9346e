"""The transformer of a pipeline with QZOLinear inside: read in any of three forms, and written back.

    bitsandbytes   diffusers' folder of NF4 or FP4 codes; a copy with new scales
    float          quantized when it is read, to NF4 unless another table is asked for; a new folder of bitsandbytes'
    GGUF           a file beside the pipeline, with Q4_0, Q4_1 and Q8_0 blocks; a copy with new scales
What is written is read by diffusers itself. It reads no folder of GPTQ, AWQ or compressed-tensors weights, so none is
written or read here.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.empty import build_empty
from ..checkpoints.fill import fill
from ..checkpoints.formats import bnb, files, gguf_sd3, safetensors_file
from ..checkpoints.formats.folder import check_own, read_dense
from ..checkpoints.formats.protocol import Entry, NewTensor
from ..checkpoints.trained import Trained
from ..kernels.table import named_table
from ..nn.choice import choose
from ..nn.layers import arena_of, layers
from ..nn.quantize import quantize_weight
from .pipeline import INDEX, Pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
GROUP = 64  # bitsandbytes' usual block


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a transformer came from: what saving it copies.

    method : "bitsandbytes", "float" or "gguf"
    path : the folder, or the file
    """

    method: str
    path: Path


def load_transformer(
    pipeline: Pipeline,
    device: torch.device,
    dtype: torch.dtype,
    group_size: int | None = None,
    table: str = "nf4",
    gguf: Path | None = None,
) -> tuple[Any, Origin]:
    """(the pipeline's transformer in eval mode, every scale in one arena and on `device`, its Origin).

    gguf : a file to read in the place of the pipeline's own weights
    group_size, table : how float weights are quantized; None: in blocks of 64

    Raises ValueError for weights that cannot be read, or a quantization_config of another tool; FileNotFoundError for
    files that are missing.
    """
    folder, said = pipeline.path / "transformer", pipeline.transformer.get("quantization_config")
    model = empty_transformer(pipeline, dtype)
    entries: Iterable[Entry]
    if gguf is not None:
        origin, entries = Origin("gguf", gguf), gguf_sd3.weights(gguf_sd3.open_file(gguf), dtype)
    elif said is None:
        origin, entries = Origin("float", folder), _quantized(model, folder, dtype, group_size, table)
    elif isinstance(said, dict) and said.get("quant_method") == bnb.METHOD:
        origin, entries = Origin(bnb.METHOD, folder), bnb.weights(folder, said, dtype)
    else:
        method = said.get("quant_method") if isinstance(said, dict) else said
        raise ValueError(
            f"{folder}: quant_method {method!r:.60} cannot be read; a transformer is float, bitsandbytes (NF4, FP4) or "
            "a GGUF file (--transformer)"
        )
    fill(model, entries, origin.path, device)
    if not layers(model, trainable=None):
        raise ValueError(f"{origin.path} holds no 4-bit linear layer, so there is nothing to train")
    model.to(device=device)
    model.requires_grad_(False).eval()
    arena_of(model, exact=True)
    return model, origin


def empty_transformer(pipeline: Pipeline, dtype: torch.dtype) -> Any:
    """The transformer without weights: parameters on the meta device. ValueError where diffusers is missing or its
    class cannot be made of the config."""
    config = {key: value for key, value in pipeline.transformer.items() if key != "quantization_config"}
    try:
        return build_empty(config, dtype, diffusers_class(config["_class_name"])).eval()
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        where = pipeline.path / "transformer" / "config.json"
        raise ValueError(f"{where} makes no {config['_class_name']}: {' '.join(str(error).split()):.200}") from None


def diffusers_module() -> Any:
    """The package. ValueError where it is not installed."""
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            "diffusers is not installed, and pipelines are its own: pip install 'qzo[diffusion]'"
        ) from None
    return diffusers


def diffusers_class(name: str) -> Any:
    """A class of diffusers. ValueError for a name that it does not have."""
    found = getattr(diffusers_module(), name, None)
    if not isinstance(found, type):
        raise ValueError(f"{name!r:.60} is no class of this diffusers; a newer one may have it")
    return found


def _quantized(model: Any, folder: Path, dtype: torch.dtype, group_size: int | None, table: str) -> Iterable[Entry]:
    """The entries of a float folder, each weight quantized when it is read: one is in memory at a time."""
    entries = named_table(table)
    chosen = choose(model, group_size or GROUP, table=entries)

    def read() -> Iterator[Entry]:
        for name, value, where in read_dense(folder, None):
            assert isinstance(value, torch.Tensor), where  # a float folder has no others
            layer = chosen.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if layer is not None:
                yield name, quantize_weight(value, layer.group_size, table=entries), where
            else:
                yield name, value.to(dtype) if value.is_floating_point() else value, where

    return read()


# ---------------------------------------------------------------------------------------------- writing


def save_transformer(model: Any, origin: Origin, folder: Path) -> None:
    """Write the transformer to `folder` in the form that it came in, a float one as bitsandbytes, a GGUF file under its
    name.

    ValueError where the folder is the source, and for a scale that is not finite, nothing being written then.
    """
    target = folder / origin.path.name if origin.path.is_file() else folder
    if target.exists() and target.samefile(origin.path):
        raise ValueError(f"{folder} is where the transformer was loaded from; the source is never overwritten")
    with files.staged(folder) as staging:
        if origin.method == "gguf":
            gguf_sd3.save(gguf_sd3.open_file(origin.path), staging / origin.path.name, Trained(model, None).find)
        elif origin.method == bnb.METHOD:
            bnb.save(origin.path, staging, Trained(model, None).find)
        else:
            _write_new(model, origin.path, staging)


def _write_new(model: Any, source: Path, staging: Path) -> None:
    """A folder as diffusers writes one of a transformer that bitsandbytes quantized."""
    find = Trained(model, None).find
    packed = {name: weight for name in layers(model, trainable=None) if (weight := find(f"{name}.weight")) is not None}
    dense = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in packed}
    dense |= {f"{name}.bias": layer.bias for name, layer in layers(model, None).items() if layer.bias is not None}
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    dtype = str(model.dtype).removeprefix("torch.")
    said = bnb.quantization_config(packed, linears) | {"bnb_4bit_compute_dtype": dtype}
    entries: list[NewTensor] = [(name, value.dtype, value.shape, value.detach) for name, value in dense.items()]
    for name, weight in packed.items():
        entries += bnb.entries(name, weight, said, model.dtype)
    safetensors_file.write(staging / WEIGHTS, entries, {"format": "pt"})
    config = files.read_object(source / "config.json") | {"quantization_config": said}
    (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_pipeline(model: Any, origin: Origin, pipeline: Pipeline, folder: Path) -> None:
    """A pipeline's folder with this transformer; the other parts are the source's own files, linked where the file
    system can (their bytes are then held once), else copied. Of a transformer from a GGUF file the file alone."""
    if origin.method == "gguf":
        return save_transformer(model, origin, folder)
    save_transformer(model, origin, folder / "transformer")
    for part in pipeline.parts:
        if part != "transformer":
            for file in (pipeline.path / part).rglob("*"):
                if file.is_file():
                    check_own(file, pipeline.path)
                    _link(file, folder / part / file.relative_to(pipeline.path / part))
    check_own(pipeline.path / INDEX, pipeline.path)
    _link(pipeline.path / INDEX, folder / INDEX)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        files.copy(source, target)
