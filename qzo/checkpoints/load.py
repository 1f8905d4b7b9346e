"""transformers models with QZOLinear inside: a checkpoint is loaded."""

import warnings

import torch
from transformers import GenerationConfig

from ..kernels.table import named_table
from ..nn.choice import choose, choose_, quantize_
from ..nn.layers import arena_of, layers
from ..nn.quantize import check_form, quantize_weight
from .empty import auto_class, build_empty, check_depth, gguf_config, read_config, reading
from .fill import fill, needless_of
from .formats import gguf, gptq, hqq, of_method, safetensors_file, told
from .formats.folder import tensor_places
from .formats.gguf_file import GGUFFile
from .names import Names
from .quantizer import attach
from .source import Source, locate

_QUANTIZED = (".qweight", ".weight_packed", ".W_q", ".weight.absmax", ".weight.quant_map", ".SCB")


def from_pretrained(
    path_or_id,
    *,
    device=None,
    dtype=None,
    bits=4,
    group_size=128,
    symmetric=True,
    table=None,
    trust_remote_code=False,
    strict=False,
    weight_only=False,
):
    """Load a model with QZOLinear inside, in eval mode, every scale in one arena.

    path_or_id : a checkpoint folder, a .gguf file, a folder holding exactly one, or a Hugging Face Hub id
    device : where to; a GPU if there is one, else the CPU
    dtype : of dense tensors and activations; float16 on a GPU, float32 on the CPU
    bits, group_size, symmetric, table : how float weights are quantized, as in QZOLinear.from_linear; a quantized
        checkpoint loads as it is
    trust_remote_code : whether code that the folder brings along is run
    strict : refuse a group_size that does not divide the inputs of each layer (nn/choice.py tells which are quantized),
        instead of another for that layer and a warning
    weight_only : train the weights of a folder whose layers' inputs are quantized too (W4A8) as if they were not: a
        server rounds them, and what is learned meets that rounding there for the first time

    Returns a transformers.PreTrainedModel that needs no gradients. Raises FileNotFoundError for a path that
    is not there, ValueError for a checkpoint that cannot be read; the message names the format, tensor or
    key.
    """
    table = named_table(table)
    check_form(bits, symmetric, table)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    path, quantization = locate(path_or_id), None
    if path.is_file():
        model, source = _load_gguf(path, device, dtype)
    else:
        quantization = told.quantization_of(path)
        config = read_config(path, trust_remote_code)
        if quantization is None:
            options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "table": table}
            model, source = _load_float(path, config, trust_remote_code, options | {"strict": strict}, device, dtype)
        else:
            read = _as_weights(path, quantization) if weight_only else quantization
            model, source = _load_quantized(path, config, read, trust_remote_code, device, dtype)
    if not layers(model, trainable=None):
        raise ValueError(
            f"{path} holds no 4-bit linear layer, so there is nothing to train; give a 4-bit or a float checkpoint"
        )
    _cast(model, dtype)
    model.to(device=device)
    model.requires_grad_(False).eval()
    arena_of(model, exact=True)
    model._qzo_source = source
    attach(model, quantization)
    return model


def _as_weights(folder, quantization):
    """A quantization_config without what it says of inputs; a warning tells what is left out."""
    read, left = told.weight_only(quantization)
    if left:
        warnings.warn(
            f"{folder}: {left} of its quantization_config are left out, as weight_only asks: what goes into each layer "
            "is rounded where the model is served, not here; measure the tuned model there",
            stacklevel=3,
        )
    return read


def _cast(model, dtype):
    """Parameters and saved buffers to `dtype`; computed ones keep theirs: rotary angles need float32."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            kept = tensor is None or not tensor.is_floating_point() or name in module._non_persistent_buffers_set
            if not kept:
                tensor.data = tensor.data.to(dtype)


def _load_float(folder, config, trust_remote_code, options, device, dtype):
    stored = {name for file in folder.glob("*.safetensors") for name in safetensors_file.places(file)}
    for name in sorted(stored):  # transformers would put random weights in the place of these
        vectors = name.endswith(".codebooks") and f"{name.removesuffix('books')}s" in stored  # AQLM's
        if name.endswith(_QUANTIZED) or vectors:
            raise ValueError(
                f"{folder} holds the quantized tensor {name}, and its config.json has no "
                "quantization_config that tells how to read it; add the one that this model is published "
                f"with, there or as {gptq.CONFIG} (GPTQ) or {told.AWQ_CONFIG} (AWQ)"
            )
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = _quantize_streamed(folder, config, trust_remote_code, options, device, dtype)
    if model is None:
        model = _whole_float(folder, config, trust_remote_code)
        quantize_(model, **options)
    sizes = (("config.json", (folder / "config.json").stat().st_size),)
    return model, Source("float", folder, sizes, stored, tuple(sorted(options.items())))


def _whole_float(folder, config, trust_remote_code):
    """The float model as transformers loads it. ValueError where it would put random weights in the place of tensors
    that the files lack; a warning where the files have others."""
    with reading(folder, "it cannot be loaded"):
        model, info = auto_class(config).from_pretrained(
            folder,
            dtype="auto",
            trust_remote_code=trust_remote_code,
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


def warn_left(names, model, folder):
    """Warn of the tensors of these names, which no part of the model takes."""
    needless = needless_of(model)
    left = sorted(name for name in names if not needless(name))
    if left:
        warnings.warn(
            f"{folder}: {type(model).__name__} of its config.json has no place for {len(left)} tensors of "
            f"the files (the first: {left[0]}); they are left out, and will be missing in what is saved",
            stacklevel=2,
        )


def _quantize_streamed(folder, config, trust_remote_code, options, device, dtype):
    """The model, each weight quantized when it is read: the float model never is in memory.

    None where transformers has more to do than to take tensors by the model's own names (prefixes, other layouts,
    pickles): that is left to it.
    """
    if not any(folder.glob("*.safetensors")):
        return None
    places = tensor_places(folder)
    model = build_empty(config, dtype, trust_remote_code=trust_remote_code)
    asked = {name: options[name] for name in ("group_size", "strict", "table")}
    choose_(model, **asked, quiet=True)
    own = {name: options[name] for name in ("symmetric", "bits", "table")}
    names, wanted = Names(model), {name: value.shape for name, value in model.state_dict().items()}
    there = {name: names(name) for name in places if not names.converted(name)}
    absent = wanted.keys() - set(there.values()) - set(model.all_tied_weights_keys)
    if absent or any(wanted.get(there.get(name)) != torch.Size(place[1]) for name, (_, place) in places.items()):
        return None

    chosen = choose(model, **asked)  # again, for what it has to tell

    def entries():
        for name, (file, place) in places.items():
            tensor, layer = safetensors_file.read(file, place), there[name].removesuffix(".weight")
            if layer in chosen and name.endswith(".weight"):
                tensor = quantize_weight(chosen[layer].matrix(tensor), chosen[layer].group_size, **own)
            elif tensor.is_floating_point():
                tensor = tensor.to(dtype)
            yield name, tensor, f"{name} in {file.name}"

    fill(model, entries(), folder, device)
    _take_generation_config(model, folder)
    return model


def _take_generation_config(model, folder):
    if (folder / "generation_config.json").exists() and hasattr(model, "generation_config"):
        with reading(folder, "its generation_config.json cannot be read"):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def _load_gguf(path, device, dtype):
    file = GGUFFile(path)
    model = build_empty(gguf_config(file), dtype)
    fill(model, gguf.weights(file, dtype), path, device)
    return model, Source("gguf", path, ((path.name, file.size),), torch.float16)


def _load_quantized(folder, config, quantization, trust_remote_code, device, dtype):
    method = quantization.get("quant_method") if quantization else hqq.METHOD
    form = of_method(method, folder)
    form.check_config(quantization, folder)
    told.forget(config)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16
    used = {*form.weight_files(folder), folder / "config.json"}
    sizes = tuple(sorted((file.name, file.stat().st_size) for file in used))
    check_depth(config, folder, sum(size for _, size in sizes))
    model = build_empty(config, dtype, trust_remote_code=trust_remote_code)
    names = fill(model, form.weights(folder, quantization, dtype), folder, device)
    model._weight_conversions = names.used()
    _take_generation_config(model, folder)
    return model, Source(method, folder, sizes, stored, names=tuple(names.changed.items()))
