"""Small checkpoints made on the spot, and decoders of them that share nothing with the package."""

import json

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS, HIDDEN, FFN, LAYERS, VOCAB = 3, 1, 96, 160, 2, 64
HEAD_DIM = HIDDEN // HEADS
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}
HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TYPES = gguf.GGMLQuantizationType
HALVES = {
    TYPES.Q4_1: (0, 2),
    TYPES.Q5_1: (0, 2),
    TYPES.Q4_K: (0, 2),
    TYPES.Q5_K: (0, 2),
    TYPES.Q2_K: (80, 82),
    TYPES.Q3_K: (108,),
    TYPES.Q6_K: (208,),
}  # float16 fields, if not (0,)


def blocks(shape, kind, rng):
    """Random bytes of Q4_0 or Q8_0 (both signs of d) or Q4_1 blocks: uint8 [N, bytes of a row]."""
    n, groups = shape[0], shape[1] // 32
    d = rng.uniform(0.01, 0.03, (n, groups, 1)) / (16 if kind == TYPES.Q8_0 else 1)
    if kind != TYPES.Q4_1:
        d *= rng.choice([-1, 1], d.shape)
    parts = [d.astype(np.float16).view(np.uint8)]
    if kind == TYPES.Q4_1:
        parts.append((-d * rng.uniform(6, 9, d.shape)).astype(np.float16).view(np.uint8))
    parts.append(rng.integers(0, 256, (n, groups, 32 if kind == TYPES.Q8_0 else 16), dtype=np.uint8))
    return np.concatenate(parts, 2).reshape(n, -1)


def write_gguf(path, kind=TYPES.Q4_0, *, tied=True, change=None, metadata=(), seed=0, layers=LAYERS, tokenizer=()):
    """A Llama GGUF with Linears of `kind`.

    change: {tensor name: (bytes or floats, type), or None to leave it out}
    metadata: {key without "llama.": value, or None to leave it out}
    tokenizer: {what GGUFWriter has an add_... for: value}
    """
    rng, metadata = np.random.default_rng(seed), dict(metadata)
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    keys = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "block_count": layers,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": HEAD_DIM,
    }
    for key, value in (keys | metadata).items():
        if isinstance(value, str):
            writer.add_string("llama." + key, value)
        elif value is not None:
            writer.add_uint32("llama." + key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    for name, value in dict(tokenizer).items():
        getattr(writer, f"add_{name}")(value)
    tensors = {
        "token_embd.weight": (rng.normal(size=(VOCAB, HIDDEN)).astype(np.float16), None),
        "output_norm.weight": (rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32), None),
    }
    if not tied:
        tensors["output.weight"] = (rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32), None)
    for layer in range(layers):
        for name, shape in SHAPES.items():
            tensors[f"blk.{layer}.{name}.weight"] = (blocks(shape, kind, rng), kind)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = (rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32), None)
    for name, entry in (tensors | (change or {})).items():
        if entry is not None:
            writer.add_tensor(name, entry[0], raw_dtype=entry[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode_gguf(path):
    """{Hugging Face name of a Linear: float32 [N, K]} by the gguf package's own dequantization; a plain loop
    puts the rows of q and k in order."""
    reader = gguf.GGUFReader(path)
    heads = {
        "attn_q": reader.fields["llama.attention.head_count"].contents(),
        "attn_k": reader.fields["llama.attention.head_count_kv"].contents(),
    }
    found = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or parts[2] not in HF_NAMES:
            continue
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if parts[2] in heads:
            ordered, size = np.empty_like(weight), len(weight) // heads[parts[2]]
            for row in range(len(weight)):
                head, inside = divmod(row, size)
                ordered[head * size + inside // 2 + (inside % 2) * (size // 2)] = weight[row]
            weight = ordered
        found[f"model.layers.{parts[1]}.{HF_NAMES[parts[2]]}"] = torch.from_numpy(weight)
    return found


def pack_stream(codes, bits):
    """int32 [rows, ceil(count * bits / 32)] of integer codes [rows, count]: each row one number, lowest code first."""
    words = -(-codes.shape[1] * bits // 32)
    rows = [sum(int(code) << bits * i for i, code in enumerate(row)) for row in codes]
    return torch.stack(
        [torch.frombuffer(bytearray(row.to_bytes(4 * words, "little")), dtype=torch.int32) for row in rows]
    )


def unpack_stream(words, bits, count):
    """The first `count` codes of each row of pack_stream's words, int64 [rows, count]."""
    rows = [int.from_bytes(row.contiguous().numpy().tobytes(), "little") for row in words]
    return torch.tensor([[row >> bits * i & (1 << bits) - 1 for i in range(count)] for row in rows])


def decode_compressed(path, bits_of=lambda name: 4):
    """{name of a Linear: float32 [N, K]} of a compressed-tensors file, code by code. bits_of(name): its bits."""
    tensors = load_file(path)
    found = {}
    for name in [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]:
        bits = bits_of(name)
        n, k = tensors[f"{name}.weight_shape"].tolist()
        scale = tensors[f"{name}.weight_scale"].double()
        codes = unpack_stream(tensors[f"{name}.weight_packed"], bits, k) - 2 ** (bits - 1)
        zeros = torch.zeros_like(scale)
        if f"{name}.weight_zero_point" in tensors:
            packed = tensors[f"{name}.weight_zero_point"].T
            zeros = unpack_stream(packed, bits, n).T.double() - 2 ** (bits - 1)
        group = torch.arange(k) // (k // scale.shape[1])
        if f"{name}.weight_g_idx" in tensors and int(tensors[f"{name}.weight_g_idx"].max()) >= 0:
            group = tensors[f"{name}.weight_g_idx"].long()
        found[name] = ((codes - zeros[:, group]) * scale[:, group]).float()
    return found


def write_compressed(folder, schemes, groups, *, seed=0, order=()):
    """A Llama folder in compressed-tensors format, every Linear with random codes, scales of both signs.

    schemes: leaf name of a Linear ("q_proj"), or "" for the others -> (bits, group size or None, symmetric)
    groups: the config_groups of its config; order: leaf names that get a weight_g_idx of shuffled groups
    """
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        vocab_size=VOCAB,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        architectures=["LlamaForCausalLM"],
    )
    tensors = LlamaForCausalLM(config).half().state_dict()
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        leaf, (n, k) = name.split(".")[-2], tensors.pop(name).shape
        bits, size, symmetric = schemes.get(leaf, schemes[""])
        count = k // (size or k)
        codes = torch.randint(2**bits, (n, k), generator=generator)
        sign = torch.randint(2, (n, count), generator=generator) * 2 - 1
        scales = (torch.rand(n, count, generator=generator) + 0.5) * sign / (8 * 2**bits)
        tensors |= {
            f"{name}_packed": pack_stream(codes, bits),
            f"{name}_scale": scales.half(),
            f"{name}_shape": torch.tensor([n, k]),
        }
        if not symmetric:
            zeros = torch.randint(2**bits, (n, count), generator=generator)
            tensors[f"{name}_zero_point"] = pack_stream(zeros.T, bits).T.contiguous()
        if leaf in order:
            shuffled = torch.randperm(k, generator=generator) // (k // count)
            tensors[f"{name}_g_idx"] = shuffled.int()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }
    content = config.to_dict() | {"dtype": "float16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(content))


def change_config(folder, edit):
    """Edit the content of config.json; returns what `edit` gave."""
    content = json.loads((folder / "config.json").read_text())
    given = edit(content)
    (folder / "config.json").write_text(json.dumps(content))
    return given


def quantized(model):
    """name -> QZOLinear."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "QZOLinear"}


def scale_randomly(model, seed=0, keep=0.0):
    """Multiply the scales by U(0.8, 1.2); a fraction `keep` of them stays. Returns the new scales by name."""
    generator = torch.Generator().manual_seed(seed)
    new = {}
    for name, layer in quantized(model).items():
        scales = layer.read_scales()
        factor = torch.rand(scales.shape, generator=generator) * 0.4 + 0.8
        factor[torch.rand(scales.shape, generator=generator) < keep] = 1.0
        new[name] = scales * factor
        layer.arena.write(layer.arena_name, new[name])
    return new


def relative_error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())
