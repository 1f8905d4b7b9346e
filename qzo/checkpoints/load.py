"""transformers models with QZOLinear inside: a checkpoint is loaded."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..kernels.table import named_table
from ..nn.choice import choose, choose_, quantize_
from ..nn.layers import arena_of, layers
from ..nn.quantize import check_form, quantize_weight
from .empty import auto_class, build_empty
from .fill import fill, needless_of
from .formats.folder import GENERATION, tensor_places
from .formats.protocol import Checkpoint, Entry
from .formats.reading import reading
from .names import Names
from .quantizer import attach
from .source import Source, open_checkpoint, set_source


def from_pretrained(
    path_or_id: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    table: Any = None,
    trust_remote_code: bool = False,
    strict: bool = False,
    weight_only: bool = False,
) -> Any:
    """Load a model with QZOLinear inside, in eval mode, every scale in one arena.

    Parameters
    ----------
    path_or_id
        A checkpoint folder, a .gguf file, a folder that holds exactly one, or a Hugging Face Hub id.
    device
        Where to; a GPU if there is one, else the CPU.
    dtype
        Of dense tensors and activations; float16 on a GPU, float32 on the CPU.
    bits, group_size, symmetric, table
        How float weights are quantized, as in `QZOLinear.from_linear`; a quantized checkpoint loads as it is.
    trust_remote_code
        Whether code that the folder brings along is run.
    strict
        Refuse a group_size that does not divide the inputs of each layer (qzo/nn/choice.py says which are quantized),
        instead of taking another for that layer with a warning.
    weight_only
        Train the weights of a folder whose layers' inputs are quantized too (W4A8) as if they were not: a server rounds
        the inputs, and what is learned meets that rounding there for the first time.

    Returns
    -------
    transformers.PreTrainedModel
        No parameter of it needs gradients.

    Raises
    ------
    FileNotFoundError
        For a path that is not there.
    ValueError
        For a checkpoint that cannot be read; the message names the format, tensor or key.
    """
    table = named_table(table)
    check_form(bits, symmetric, table)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    checkpoint = open_checkpoint(path_or_id, trust_remote_code, weight_only)
    if checkpoint.quantized:
        model, names = _load_codes(checkpoint, device, dtype)
    else:
        options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "table": table, "strict": strict}
        model, names = _load_float(checkpoint, options, device, dtype), None
    if not layers(model, trainable=None):
        raise ValueError(
            f"{checkpoint.path} holds no 4-bit linear layer, so there is nothing to train; give a 4-bit or a float "
            "checkpoint"
        )
    _cast(model, dtype)
    model.to(device=device)
    model.requires_grad_(False).eval()
    arena_of(model, exact=True)
    set_source(model, Source.of(checkpoint, names))
    attach(model, checkpoint.quantization)
    return model


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Parameters and saved buffers to `dtype`; computed ones keep theirs: rotary angles need float32."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            kept = tensor is None or not tensor.is_floating_point() or name in module._non_persistent_buffers_set
            if not kept:
                tensor.data = tensor.data.to(dtype)


def _load_float(checkpoint: Checkpoint, options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A float checkpoint's model, quantized with `options`."""
    model = _quantize_streamed(checkpoint, options, device, dtype)
    if model is None:
        model = _whole_float(checkpoint)
        quantize_(model, **options)
    return model


def _whole_float(checkpoint: Checkpoint) -> Any:
    """The float model as transformers loads it. ValueError where it would put random weights in the place of tensors
    that the files lack; a warning where the files have others."""
    folder = checkpoint.path
    with reading(folder, "it cannot be loaded"):
        model, info = auto_class(checkpoint.config).from_pretrained(
            folder,
            dtype="auto",
            trust_remote_code=checkpoint.trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    name = type(model).__name__
    for tensor, stored, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{folder}: tensor {tensor} has shape {list(stored)}, which {name} of its config.json needs "
            f"as {list(wanted)}; one of them is damaged or of another model"
        )
    if info["missing_keys"]:
        raise ValueError(
            f"{folder}: {len(info['missing_keys'])} tensors are missing, the first is "
            f"{min(info['missing_keys'])}; the checkpoint is incomplete, or its config.json is of another "
            "model"
        )
    warn_left(info["unexpected_keys"], model, folder)
    return model


def warn_left(names: Iterable[str], model: Any, folder: Path) -> None:
    """Warn of the tensors of these names, which no part of the model takes."""
    needless = needless_of(model)
    left = sorted(name for name in names if not needless(name))
    if left:
        warnings.warn(
            f"{folder}: {type(model).__name__} of its config.json has no place for {len(left)} tensors of "
            f"the files (the first: {left[0]}); they are left out, and will be missing in what is saved",
            stacklevel=2,
        )


def _quantize_streamed(
    checkpoint: Checkpoint, options: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Any | None:
    """The model, each weight quantized when it is read: the float model never is in memory.

    None where transformers has more to do than to take tensors by the model's own names (prefixes, other layouts,
    pickles): that is left to it.
    """
    folder = checkpoint.path
    if not any(folder.glob("*.safetensors")):
        return None
    places = tensor_places(folder)
    model = build_empty(checkpoint.config, dtype, trust_remote_code=checkpoint.trust_remote_code)
    asked = {name: options[name] for name in ("group_size", "strict", "table")}
    choose_(model, **asked, quiet=True)
    own = {name: options[name] for name in ("symmetric", "bits", "table")}
    names, wanted = Names(model), {name: value.shape for name, value in model.state_dict().items()}
    there = {name: names(name) for name in places if not names.converted(name)}
    absent = wanted.keys() - set(there.values()) - set(model.all_tied_weights_keys)
    if absent or any(wanted.get(there.get(name)) != torch.Size(place[1]) for name, (_, place) in places.items()):
        return None

    chosen = choose(model, **asked)  # again, for what it has to tell

    def entries() -> Iterator[Entry]:
        for name, value, where in checkpoint.read(None):
            layer = there[name].removesuffix(".weight")
            assert isinstance(value, torch.Tensor), where  # a float checkpoint has no others
            if layer in chosen and name.endswith(".weight"):  # the same name: the float weight is let go here
                value = quantize_weight(chosen[layer].matrix(value), chosen[layer].group_size, **own)
            elif value.is_floating_point():
                value = value.to(dtype)
            yield name, value, where

    fill(model, entries(), folder, device)
    _take_generation_config(model, folder)
    return model


def _take_generation_config(model: Any, path: Path) -> None:
    """generation_config.json of a folder, or beside a file, which keeps its own settings and takes label biases."""
    folder = path if path.is_dir() else path.parent
    if (folder / GENERATION).exists() and hasattr(model, "generation_config"):
        with reading(folder, f"its {GENERATION} cannot be read"):
            found = GenerationConfig.from_pretrained(folder)
        if path.is_dir():
            model.generation_config = found
        else:
            model.generation_config.sequence_bias = found.sequence_bias


def _load_codes(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Any, Names]:
    """A quantized checkpoint's model as it is, and the Names of the files' tensors in it."""
    model = build_empty(checkpoint.config, dtype, trust_remote_code=checkpoint.trust_remote_code)
    names = fill(model, checkpoint.read(dtype), checkpoint.path, device)
    model._weight_conversions = names.used()
    _take_generation_config(model, checkpoint.path)
    return model, names
