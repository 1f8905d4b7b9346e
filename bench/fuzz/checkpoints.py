"""Checkpoints with faults in them, and what reads them: containers, formats, configs."""

import functools
import io
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save

from ...checkpoints.formats import TARGETS, format_of, gguf_sd3, gguf_tokenizer, hqq, safetensors_file, told
from ...checkpoints.formats import gguf as gguf_format
from ...checkpoints.formats.folder import tensor_places
from ...checkpoints.formats.folder_format import FolderFormat
from ...checkpoints.formats.gguf_file import GGUFFile
from ...checkpoints.source import open_checkpoint
from ...kernels.table import NF4
from ...nn.quantize import quantize_weight
from . import mutations

LAYER, NORM = "model.layers.0.self_attn.v_proj", "model.norm.weight"
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "eos_token_id": [1, 2],
    "dtype": "float16",
}


# ------------------------------------------------------------------------------------------------ containers


def with_header(header, body, random):
    """A safetensors file of this header, JSON or bytes; its length now and then wrong."""
    text = header if isinstance(header, bytes) else mutations.text(header, random)
    longer = random.choice([0] * 9 + [-1, 1, 8, 2**60])
    return struct.pack("<Q", max(0, len(text) + longer)) + text + body


@functools.cache
def _safetensors():
    tensors = {"a": torch.arange(6, dtype=torch.float16).view(2, 3), "b": torch.ones(4, dtype=torch.int32)}
    return save({**tensors, "c": torch.zeros(0, 5)}, metadata={"format": "pt"})


def safetensors(random):
    """A file of three tensors: a fault in its bytes, or in what its header says."""
    whole = _safetensors()
    if random.random() < 0.4:
        return {"x.safetensors": mutations.data(whole, random, 300)}
    end = 8 + int.from_bytes(whole[:8], "little")
    return {"x.safetensors": with_header(json.loads(whole[8:end]), whole[end:], random)}


def read_safetensors(folder):
    path = folder / "x.safetensors"
    safetensors_file.metadata(path)
    for place in safetensors_file.places(path).values():
        safetensors_file.read(path, place)


def index(random):
    """Two shards and their index, which has a fault; one shard now and then."""
    shards = {f"model-0000{i}-of-00002.safetensors": save({f"t{i}": torch.ones(2)}) for i in (1, 2)}
    names = {"metadata": {"total_size": 16}, "weight_map": {f"t{i}": name for i, name in enumerate(shards, 1)}}
    if random.random() < 0.2:
        name = random.choice(list(shards))
        shards[name] = mutations.data(shards[name], random, 100)
    return {**shards, "model.safetensors.index.json": mutations.text(names, random)}


def read_index(folder):
    for file, place in tensor_places(folder).values():
        assert file.parent == folder, file
        safetensors_file.read(file, place)


# ------------------------------------------------------------------------------------------------ folders


def _weight(zeros=False, table=None):
    torch.manual_seed(0)
    return quantize_weight(torch.randn(32, 64), 32, symmetric=not zeros, table=table)


def _entries(found):
    return {name: make().contiguous() for name, _, _, make in found}


@functools.cache
def layer_of(method):
    """(quantization_config, tensors) of a layer and a norm in the format of this quant_method."""
    norm = {NORM: torch.ones(64, dtype=torch.float16)}
    if method == "aqlm":
        said: dict[str, Any] = {"in_group_size": 8, "out_group_size": 1, "nbits_per_codebook": 8, "num_codebooks": 2}
        codes = torch.arange(32 * 8 * 2).view(32, 8, 2).to(torch.int8)
        books = torch.ones(2, 256, 1, 8, dtype=torch.float16)
        parts = {"codes": codes, "codebooks": books, "scales": torch.ones(32, 1, 1, 1, dtype=torch.float16)}
        return {"quant_method": method, **said}, {f"{LAYER}.{part}": value for part, value in parts.items()} | norm
    target = TARGETS["gptq" if method == "auto-round" else method]
    weight = _weight(zeros=method in ("gptq", "awq"), table=NF4 if method == "bitsandbytes" else None)
    said = target.quantization_config({LAYER: weight}, ["lm_head"])
    tensors = _entries(target.entries(LAYER, weight, said, torch.float16)) | norm
    if method == "auto-round":
        del tensors[f"{LAYER}.g_idx"]
        plain: dict[str, Any] = {"packing_format": "auto_round:auto_gptq", "data_type": "int", "sym": True}
        extra = {"lm_head": {"bits": 16}, "model.*x": {"bits": 8}}
        said = {"quant_method": method, **plain, "act_bits": 16, "extra_config": extra, "bits": 4, "group_size": 32}
    if method == "gptq":
        said |= {"dynamic": {r"-:.*gate": {}, r"+:.*up": {"bits": 8, "group_size": 64}}}
    return said, tensors


def folder_of(method, random):
    """A folder of a format: a fault in its quantization_config, its tensors, or in both."""
    said, tensors = layer_of(method)
    spoiled = random.choice(["config", "tensors", "tensors", "both"])
    if spoiled != "tensors":
        said = mutations.tree(said, random, 2)
    if spoiled != "config":
        tensors = mutations.tensors(tensors, random)
    config = {**LLAMA, "quantization_config": said}
    return {"config.json": _json(config), "model.safetensors": save(tensors)}


def _json(content):
    try:
        return json.dumps(content).encode()
    except RecursionError:
        return b"[" * 5000


def read_folder(folder):
    quantization = told.quantization_of(folder)
    form = format_of(folder, quantization)
    if isinstance(form, FolderFormat):
        assert quantization is not None
        told.weight_only(quantization)
        for _ in form.weights(folder, quantization, torch.half):
            pass


def config(random):
    """A quantized folder whose config.json has a fault anywhere."""
    said, tensors = layer_of("gptq")
    found = mutations.text({**LLAMA, "quantization_config": said}, random)
    return {"config.json": found, "model.safetensors": save(tensors)}


def read_config(folder):
    open_checkpoint(folder)


@functools.cache
def _modules():
    weight = _weight(zeros=True)
    groups = 32 * 64 // 32
    codes = torch.arange(groups // 2 * 32, dtype=torch.int64).to(torch.uint8).view(groups // 2, 32)
    layer = {
        "W_q": codes,
        "scale": weight.scales.T.reshape(groups, 1).half().clone(),
        "zero": torch.full((groups, 1), 7.5).half(),
        "nbits": 4,
        "group_size": 32,
        "shape": torch.Size([32, 64]),
        "axis": 1,
        "packing": "4bit_u8",
        "view_as_float": False,
    }
    return {LAYER: layer, "model.norm": {"weight": torch.ones(64, dtype=torch.float16)}}


def torch_file(random):
    """HQQ's qmodel.pt: a fault in the archive's bytes, or in a module's fields."""
    modules = {name: dict(state) for name, state in _modules().items()}
    damaged = random.random() < 0.5
    for _ in range(0 if damaged else random.choice([1, 1, 2])):
        state = modules[random.choice(list(modules))]
        field = random.choice([*state, "meta"])
        if random.random() < 0.15:
            state.pop(field, None)
        elif isinstance(state.get(field), torch.Tensor) and random.random() < 0.7:
            state[field] = mutations.tensor(state[field], random)
        else:
            state[field] = random.choice([mutations.value(random), (), torch.ones(1), torch.Size([3])])
    stream = io.BytesIO()
    try:
        torch.save(modules, stream)
    except (RecursionError, ValueError, UnicodeEncodeError):
        torch.save(_modules(), stream)
    found = stream.getvalue()
    return {"qmodel.pt": mutations.data(found, random) if damaged else found}


def read_torch_file(folder):
    for _ in hqq.weights(folder, None, torch.half):
        pass


# ------------------------------------------------------------------------------------------------ GGUF


@functools.cache
def _gguf(kind):
    """The bytes of a GGUF: of a Llama of one block, the same with a vocabulary, a block of Stable Diffusion 3."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "sd3" if kind == "sd3" else "llama")
        if kind != "sd3":
            _add_llama(writer)
        if kind == "tokenizer":
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list([*"abcd", "ab", "<s>"])
            writer.add_token_merges(["a b"])
            writer.add_token_types([1, 1, 1, 1, 1, 3])
            writer.add_bos_token_id(5)
            writer.add_array("tokenizer.x", [[1, 2], [3]])
        for name, shape in (_SD3 if kind == "sd3" else _TENSORS).items():
            quantized = len(shape) == 2 and name != "token_embd.weight"
            values = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
            form = gguf.GGMLQuantizationType.Q4_1 if "ffn" in name else gguf.GGMLQuantizationType.Q4_0
            form = form if quantized else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(values, form), raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


_PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_TENSORS = {"token_embd.weight": (6, 32), "output_norm.weight": (32,)}
_TENSORS |= {f"blk.0.{part}.weight": (32, 32) for part in _PARTS}
_TENSORS |= {f"blk.0.{part}.weight": (32,) for part in ("attn_norm", "ffn_norm")}
_SD3 = {
    "joint_blocks.0.x_block.attn.qkv.weight": (96, 32),
    "joint_blocks.0.x_block.attn.qkv.bias": (96,),
    "joint_blocks.0.context_block.adaLN_modulation.1.weight": (64, 32),
    "final_layer.adaLN_modulation.1.weight": (64, 32),
    "final_layer.linear.bias": (16,),
}


def _add_llama(writer):
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)


def gguf_file(kind, random):
    """A GGUF with faults where its header has counts, types, sizes and names."""
    whole = bytearray(_gguf(kind))
    head = len(whole) if kind == "tokenizer" else min(len(whole), 1500)
    if random.random() < 0.5:
        return {"x.gguf": mutations.data(whole, random, head)}
    for _ in range(random.choice([1, 2])):  # a number of the header by another: counts, lengths, types, dimensions
        at = random.randrange(4, head)
        if random.random() < 0.5:
            at = whole.find(bytes(3), at)  # small numbers end in zeros: their first byte stands before these
        size = random.choice(["<I", "<Q", "<B"])
        number = random.choice([*mutations.NUMBERS, *range(14)]) % 2 ** (8 * struct.calcsize(size))
        whole[max(4, at - 1) : max(4, at - 1) + struct.calcsize(size)] = struct.pack(size, number)
    return {"x.gguf": bytes(whole)}


def read_gguf(folder):
    file = GGUFFile(folder / "x.gguf")
    gguf_format.config(file)
    for _ in gguf_format.weights(file, torch.half):
        pass


def read_tokenizer(folder):
    file = GGUFFile(folder / "x.gguf")
    if gguf_tokenizer.present(file):
        gguf_tokenizer.load(file)


def read_sd3(folder):
    for _ in gguf_sd3.weights(gguf_sd3.open_file(folder / "x.gguf"), torch.half):
        pass


# name -> (what makes the files of a case with a random.Random, what reads them in their folder)
PARSERS: dict[str, tuple[Callable, Callable]] = {
    "safetensors": (safetensors, read_safetensors),
    "index.json": (index, read_index),
    "config.json": (config, read_config),
    "hqq": (torch_file, read_torch_file),
    "gguf": (functools.partial(gguf_file, "llama"), read_gguf),
    "gguf tokenizer": (functools.partial(gguf_file, "tokenizer"), read_tokenizer),
    "gguf sd3": (functools.partial(gguf_file, "sd3"), read_sd3),
}
METHODS = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "aqlm", "auto-round")
PARSERS |= {method: (functools.partial(folder_of, method), read_folder) for method in METHODS}
