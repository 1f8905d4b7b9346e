"""From a GGUF file's metadata to the arguments of a transformers configuration.

Defaults are llama.cpp's own, which reads the same keys. What transformers' class cannot compute is refused by
name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .gguf_file import GGUFFile
from .gguf_models import FAMILIES, NEEDED, ROPE_TENSORS, Family
from .gguf_vocabulary import token_ids


def family(file: GGUFFile) -> Family:
    """The Family of a GGUFFile's architecture. ValueError naming those that can be read."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise ValueError(
            f"{file.path}: architecture {architecture!r}; those that can be read are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[architecture]


def config(file: GGUFFile) -> dict[str, Any]:
    """Arguments of transformers.AutoConfig.for_model for a GGUFFile.

    ValueError naming what the file lacks or what cannot be read.
    """
    meta, kind = file.metadata, family(file)
    if meta.get("split.count", 1) not in (0, 1):
        raise ValueError(
            f"{file.path} is one of {meta['split.count']!r:.40} parts; merge them first (llama-gguf-split --merge)"
        )
    experts = _number(file, "expert_count", 0)
    if experts > 0:
        raise ValueError(f"{file.path}: a mixture of {experts} experts; only dense models can be read")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: no tensor token_embd.weight, which every model has")
    found = {argument: _need(file, key, int) for key, argument in NEEDED.items()}
    if found["num_hidden_layers"] > len(file.tensors):
        raise ValueError(
            f"{file.path}: {len(file.tensors)} tensors are not {found['num_hidden_layers']} "
            "layers: the file is incomplete or damaged"
        )
    found |= {argument: _number(file, key) or default for key, (argument, default) in kind.options.items()}
    found |= {argument: tensor in file.tensors for argument, tensor in kind.biases.items()}
    head_dim = _head_dim(file, found)
    if kind.wide_depth:
        wide = found["num_hidden_layers"] == kind.wide_depth
        heads = found["num_attention_heads"]
        found["query_pre_attn_scalar"] = found["hidden_size"] // heads if wide else head_dim
    if kind.global_every:
        found["layer_types"] = _layer_types(file, kind, found["num_hidden_layers"])
    ids = token_ids(file)
    return (
        found
        | _rope(file, kind, head_dim)
        | {
            "model_type": kind.model_type,
            "architectures": [kind.cls],
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
            "num_key_value_heads": kv_heads(file),
            "head_dim": head_dim,
            "rms_norm_eps": _need(file, "attention.layer_norm_rms_epsilon", float),
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "bos_token_id": ids.get("bos"),
            "eos_token_id": ids.get("eos"),
            "pad_token_id": ids.get("padding"),
        }
    )


def heads(file: GGUFFile) -> int:
    """The number of query heads."""
    return _need(file, "attention.head_count", int)


def kv_heads(file: GGUFFile) -> int:
    """The number of key and value heads: as many as query heads where the file has none of its own."""
    key = "attention.head_count_kv"
    return heads(file) if _get(file, key) is None else _need(file, key, int)


def _get(file: GGUFFile, key: str, default: Any = None) -> Any:
    return file.metadata.get(_name(file, key), default)


def _name(file: GGUFFile, key: str) -> str:
    return f"{file.metadata['general.architecture']}.{key}"


def _number(file: GGUFFile, key: str, default: float | None = None, kinds: tuple[type, ...] = (int, float)) -> Any:
    value = _get(file, key, default)
    if isinstance(value, list):
        raise ValueError(
            f"{file.path}: {_name(file, key)} differs from layer to layer; only uniform models can be read"
        )
    if value is not None and (type(value) not in kinds or not 0 <= value < math.inf):
        raise ValueError(
            f"{file.path}: {_name(file, key)} is {value!r:.40}; it has to be "
            f"{' or '.join(kind.__name__ for kind in kinds)} from 0 on"
        )
    return value


def _need(file: GGUFFile, key: str, kind: type) -> Any:
    """A number above 0."""
    value = _number(file, key, None, (kind,))
    if not value:
        raise ValueError(f"{file.path}: no metadata {_name(file, key)}, or 0; every model needs it")
    return value


def _head_dim(file: GGUFFile, found: Mapping[str, Any]) -> int:
    size = _number(file, "attention.key_length", found["hidden_size"] // found["num_attention_heads"], (int,))
    values = _number(file, "attention.value_length", size, (int,))
    if size != values or size == 0:
        raise ValueError(
            f"{file.path}: heads of {size} for keys and of {values} for values; only equal ones can be read"
        )
    return size


def _layer_types(file: GGUFFile, kind: Family, count: int) -> list[str]:
    if not _get(file, "attention.sliding_window") and kind.local_theta:  # a Gemma 3 without windows
        return ["full_attention"] * count
    slides = _get(file, "attention.sliding_window_pattern")
    if not isinstance(slides, list):
        slides = _number(file, "attention.sliding_window_pattern", kind.global_every, (int,))
        slides = [slides == 0 or (layer + 1) % slides != 0 for layer in range(count)]
    if len(slides) < count:
        raise ValueError(
            f"{file.path}: attention.sliding_window_pattern tells of {len(slides)} layers, the model has {count}"
        )
    return ["sliding_attention" if slide else "full_attention" for slide in slides[:count]]


# ------------------------------------------------------------------------------------------ rotary scaling


def _rope(file: GGUFFile, kind: Family, head_dim: int) -> dict[str, Any]:
    """{"rope_parameters": ...} and what stands beside it."""
    theta = _base(file, "rope.freq_base", 10000.0)
    rotated = _number(file, "rope.dimension_count", head_dim, (int,))
    if rotated != head_dim and not kind.partial_rotary:
        raise ValueError(
            f"{file.path}: rotary embedding of {rotated} of {head_dim} head dimensions; only "
            f"whole heads can be read for {kind.cls}"
        )
    scaling, more = _scaling(file, kind, theta, rotated)
    rope = {"rope_theta": theta} | scaling
    if kind.partial_rotary:
        rope["partial_rotary_factor"] = rotated / head_dim
    if kind.local_theta:
        local = _base(file, "rope.freq_base_swa", kind.local_theta)
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return {"rope_parameters": rope} | more


def _base(file: GGUFFile, key: str, default: float) -> float:
    """What the rotary frequencies are powers of; 0 would make them infinite."""
    found = _number(file, key, default)
    if found == 0:
        raise ValueError(f"{file.path}: {_name(file, key)} is 0; rotary embeddings need a number above it")
    return found


def _scaling(file: GGUFFile, kind: Family, theta: float, rotated: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(rope parameters, further arguments) of the file's rotary scaling."""
    name = _get(file, "rope.scaling.type", "linear")
    factor = _number(file, "rope.scaling.factor", _number(file, "rope.scale_linear", 0.0)) or 1.0
    if name in ("none", "longrope") or (name == "linear" and factor == 1.0):
        name = "default"
    for scaling, tensors in ROPE_TENSORS.items():
        if any(tensor in file.tensors for tensor in tensors):
            name = scaling if name == "default" else f"{name} and {scaling}"
    if name == "default":
        return {"rope_type": "default"}, {}
    if name not in kind.scalings:
        raise ValueError(
            f"{file.path}: rotary scaling {name!r}; what can be read for {kind.cls} is {' and '.join(kind.scalings)}"
        )
    if name == "linear":
        return {"rope_type": "linear", "factor": factor}, {}
    factors = [_factors(file, tensor, rotated) for tensor in ROPE_TENSORS[name]]
    return _llama3(file, factors[0], theta) if name == "llama3" else _longrope(file, *factors)


def _factors(file: GGUFFile, tensor: str, rotated: int) -> list[float]:
    info = file.tensors.get(tensor)
    if info is None or info.shape != (rotated // 2,):
        found = "missing" if info is None else list(info.shape)
        raise ValueError(f"{file.path}: tensor {tensor} is {found}, the rotary embedding needs {[rotated // 2]}")
    return file.dense(info, torch.float32).tolist()


def _longrope(file: GGUFFile, short: list[float], long: list[float]) -> tuple[dict[str, Any], dict[str, Any]]:
    scaling = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "attention_factor": _number(file, "rope.scaling.attn_factor", 1.0),
    }
    original = _need(file, "rope.scaling.original_context_length", int)
    return scaling, {"original_max_position_embeddings": original}


def _llama3(file: GGUFFile, factors: Sequence[float], theta: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Llama 3.1's parameters, found again from what they give: by how much each frequency is divided.

    Models differ in the largest factor only. llama.cpp computes in float32, and 1 / ((1 - s) / factor + s)
    enlarges the rounding of s up to `factor` times: 1e-5 leaves room for Llama 3.2's 32, and for no other
    formula.
    """
    factor, low, high, context = max(factors), 1.0, 4.0, 8192
    for i, found in enumerate(factors):
        turns = context / (2 * math.pi * theta ** (i / len(factors)))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        wanted = 1 / ((1 - smooth) / factor + smooth)
        if not math.isclose(found, wanted, rel_tol=1e-5):
            raise ValueError(
                f"{file.path}: rope_freqs.weight holds {found:g} at {i}, Llama 3's scaling by "
                f"{factor:g} has {wanted:g}; other rotary factors cannot be read"
            )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }, {}
