"""GGUF checkpoints of Llama models: blocks in, patched blocks out.

    Q4_0:  w = d (c - 8)      scale d, no zero points
    Q4_1:  w = d c + m        scale d, float32 zero point -m / d

On save d is rounded to float16 first, then m = -d * zero; a block whose scale did not change keeps its bytes.
The rows of q and k lie interleaved for the rotary embedding there, in halves in transformers: both ways
permute them.
"""
import warnings

import torch

from ..weights import PackedWeight
from . import files
from .gguf_file import Q4_0, Q4_1, Q6_K, codes4, dequantize, halves
from .rounding import stored_scales

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
          "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


def config(file):
    """Arguments of transformers.LlamaConfig from the file's metadata. ValueError for another architecture."""
    meta = file.metadata
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{file.path}: architecture {architecture!r}; GGUF can be read for 'llama' models "
                         "only")
    if meta.get("split.count", 1) > 1:
        raise ValueError(f"{file.path} is one of {meta['split.count']} parts; merge them first "
                         "(llama-gguf-split --merge)")
    if meta.get("llama.expert_count", 0) > 0:
        raise ValueError(f"{file.path}: a mixture of {meta['llama.expert_count']} experts; only dense "
                         "models can be read")
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise ValueError(f"{file.path}: rotary scaling "
                         f"({scaling if scaling != 'none' else 'rope_freqs.weight'}); only unscaled rotary "
                         "embeddings can be read")
    hidden, heads = _need(file, "embedding_length"), _need(file, "attention.head_count")
    head_dim = meta.get("llama.attention.key_length", hidden // heads)
    if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{file.path}: rotary embedding of {meta['llama.rope.dimension_count']} of "
                         f"{head_dim} head dimensions; only whole heads can be read")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: no tensor token_embd.weight, which every Llama model has")
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": _need(file, "feed_forward_length"),
        "num_hidden_layers": _need(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(file),
        "head_dim": head_dim,
        "max_position_embeddings": _need(file, "context_length"),
        "rms_norm_eps": _need(file, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": meta.get("llama.rope.freq_base", 10000.0)},
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "architectures": ["LlamaForCausalLM"],
    }


def _need(file, key):
    value = file.metadata.get("llama." + key)
    if value is None:
        raise ValueError(f"{file.path}: no metadata llama.{key}, which every Llama model needs")
    if isinstance(value, list):
        raise ValueError(f"{file.path}: llama.{key} differs from layer to layer; only uniform models can be "
                         "read")
    return value


def _kv_heads(file):
    key = "attention.head_count_kv"
    return _need(file, key if "llama." + key in file.metadata else "attention.head_count")


def hf_name(file, name):
    """The Hugging Face name of a tensor. ValueError for one that no plain Llama model has."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP:
        return f"{_TOP[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    raise ValueError(f"{file.path}: tensor {name} is unknown; a Llama model has none of this name")


def _row_order(file, info):
    """GGUF row of each Hugging Face row, for q and k; None for other tensors."""
    key = _HEADS.get(info.name.split(".")[-2])
    if key is None:
        return None
    heads = _kv_heads(file) if key.endswith("_kv") else _need(file, key)
    return torch.arange(info.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten()


def weights(file, dtype):
    """Yield (Hugging Face name, PackedWeight or tensor in `dtype`, where it came from) for every tensor."""
    for info in file.tensors.values():
        name, where = hf_name(file, info.name), f"{info.name} in {file.path.name}"
        embedding = info.name == "token_embd.weight"
        if info.type == Q6_K and not embedding and info.name != "output.weight":
            raise ValueError(f"{file.path}: tensor {info.name} is Q6_K, which is read for embeddings and "
                             "output only; the layers must be Q4_0, Q4_1 or Q8_0")
        raw = file.raw(info)
        order = _row_order(file, info)
        if order is not None:
            raw = raw.view(info.shape[0], -1)[order].flatten()
        packed = _packed(raw, info, where) if info.type in (Q4_0, Q4_1) and not embedding else None
        yield name, dequantize(raw, info, dtype) if packed is None else packed, where


def _packed(raw, info, where):
    """PackedWeight of Q4_0 or Q4_1 blocks; None where a block is a constant, which no zero point can
    express."""
    blocks = info.blocks(raw)
    scales, zeros = halves(blocks, 0).float(), None
    if info.type == Q4_1:
        minimum = halves(blocks, 2).float()
        if not bool(torch.isfinite(minimum).all()):
            raise ValueError(f"{where}: a minimum is NaN or infinite: the file is damaged")
        constant = scales == 0
        if bool((constant & (minimum != 0)).any()):
            warnings.warn(f"{where}: a block has scale 0 and a minimum; the whole layer stays dense and "
                          "frozen", stacklevel=2)
            return None
        zeros = torch.where(constant, 8.0, -minimum / scales).T
    try:
        return PackedWeight.from_codes(codes4(blocks, info), scales.T, zeros)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def save(file, target, find):
    """Copy `file` to `target` with the scales of the PackedWeight (or None) that `find(Hugging Face name)`
    gives."""
    files.copy(file.path, target)
    for info in file.tensors.values():
        packed = find(hf_name(file, info.name)) if info.type in (Q4_0, Q4_1) else None
        if packed is not None:
            raw = file.raw(info)
            if _patch(info.blocks(raw), info, packed, _row_order(file, info)):
                files.patch(target, [(info.offset, raw.numpy().tobytes())])


def rounded(file, find):
    """Yield (layer, float32 scales [G, N], zero points or None) as `save` would write them: -m / d moves too."""
    for info in file.tensors.values():
        name = hf_name(file, info.name)
        packed = find(name) if name and len(info.shape) == 2 else None
        if packed is not None:
            blocks, order = info.blocks(file.raw(info)), _row_order(file, info)
            _patch(blocks, info, packed, order)
            blocks = blocks if order is None else blocks[order]
            d = halves(blocks, 0).float()
            zeros = torch.where(d == 0, 8.0, -halves(blocks, 2).float() / d).T if info.type == Q4_1 else None
            yield name.removesuffix(".weight"), d.T, zeros


def _patch(blocks, info, packed, order):
    """Put new d (and m) into the blocks; returns whether any changed."""
    back = torch.arange(info.shape[0]) if order is None else order.argsort()
    scales = packed.scales.T.cpu()[back]
    old = halves(blocks, 0)
    changed = scales != old.float()
    if not bool(changed.any()):
        return False
    d = stored_scales(scales, old, info.name)
    blocks[..., :2][changed] = d[changed].unsqueeze(-1).view(torch.uint8)
    if info.type == Q4_1:
        m = (-d.float() * packed.zeros.T.cpu()[back]).to(torch.float16)
        if not bool(torch.isfinite(m).all()):
            raise ValueError(f"{info.name}: a minimum does not fit float16 any more; the run has diverged, "
                             "nothing was written")
        blocks[..., 2:4][changed] = m[changed].unsqueeze(-1).view(torch.uint8)
    return True

