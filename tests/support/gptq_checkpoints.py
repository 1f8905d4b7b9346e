"""GPTQ and AWQ folders made on the spot, and decoders of them that share nothing with the package."""

import json
import re

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import qzo
from tests.support.checkpoints import FFN, HEADS, HIDDEN, KV_HEADS, VOCAB, pack_stream, unpack_stream

LAYER = "model.layers.0.mlp.up_proj"
IDS = torch.arange(24).view(2, 12)
WHERE = r"^model\.layers\.0\.mlp\.up_proj\.qweight in model\.safetensors: "
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's eight, from the lowest bits up


def whole_words_less_one(words, bits):
    """GPTQModel's version 1: every field less one by a single subtraction, which borrows from the neighbour."""
    ones = sum(1 << i for i in range(0, 32, bits))
    return torch.tensor(
        [[((int(word) - ones + 2**31) % 2**32) - 2**31 for word in row] for row in words], dtype=torch.int32
    )


def gptq_layer(codes, zeros, scales, bits, version=1, whole_words=False, order=None):
    """The tensors of a layer: integer codes [N, K] and zeros [G, N], scales [G, N]; order: groups of the inputs."""
    stored = zeros if version == 2 or (whole_words and bits != 3) else (zeros - 1) % 2**bits
    packed = pack_stream(stored, bits)
    if version == 1 and whole_words and bits != 3:
        packed = whole_words_less_one(packed, bits)
    tensors = {"qweight": pack_stream(codes, bits).T.contiguous(), "qzeros": packed, "scales": scales}
    return tensors if order is None else tensors | {"g_idx": order.int()}


def awq_words(values):
    """int32 [rows, N/8] of 4-bit integers [rows, N]."""
    return pack_stream(values.view(len(values), -1, 8)[..., list(AWQ_COLUMNS)].flatten(1), 4)


def awq_layer(codes, zeros, scales, bits):
    """The tensors of a layer in AWQ's layout; bits are 4."""
    return {"qweight": awq_words(codes.T), "qzeros": awq_words(zeros), "scales": scales}


def decode_folder(folder):
    """{name of a Linear: float32 [N, K]} of a folder in GPTQ's or AWQ's layout, code by code."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    found = {}
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        part = {p: tensors[f"{name}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{p}" in tensors}
        found[name] = (decode_awq if "awq" in str(quantization) else decode_gptq)(name, part, quantization)
    return found


def decode_gptq(name, part, quantization):
    bits = (
        next(
            (
                change.get("bits")
                for pattern, change in quantization.get("dynamic", {}).items()
                if re.match(pattern.removeprefix("+:").removeprefix("-:"), name)
            ),
            None,
        )
        or quantization["bits"]
    )
    (groups, n), k = part["scales"].shape, part["qweight"].shape[0] * 32 // bits
    codes = unpack_stream(part["qweight"].T, bits, k)
    words = part["qzeros"].long()
    if quantization.get("checkpoint_format") == "gptq_v2":
        zeros = unpack_stream(part["qzeros"], bits, n)
    elif bits != 3 and "gptqmodel" in str(quantization.get("meta")):
        ones = sum(1 << i for i in range(0, 32, bits))
        zeros = unpack_stream(((words + ones + 2**31) % 2**32 - 2**31).int(), bits, n)
    else:
        zeros = (unpack_stream(part["qzeros"], bits, n) + 1) % 2**bits
    group = part.get("g_idx", torch.arange(k) // (k // groups)).long()
    return ((codes.T - zeros[group]) * part["scales"].float()[group]).T


def decode_awq(name, part, quantization):
    (groups, n), k = part["scales"].shape, len(part["qweight"])

    def columns(words):
        nibbles = unpack_stream(words, 4, n).view(len(words), -1, 8)
        return torch.stack([nibbles[..., AWQ_COLUMNS.index(j)] for j in range(8)], -1).flatten(1)

    group = torch.arange(k) // (k // groups)
    return ((columns(part["qweight"]) - columns(part["qzeros"])[group]) * part["scales"].float()[group]).T


def write_gptq(
    folder,
    bits=4,
    size=32,
    *,
    zeros="any",
    change=None,
    seed=0,
    head=False,
    by_layer=None,
    order=False,
    layer=gptq_layer,
    layers=1,
    sizes=(),
    **config,
):
    """A Llama folder of layers with random codes and scales of both signs.

    zeros: "any" number, or "middle"; by_layer: {leaf name: (bits, group size)}; head: quantize lm_head too
    layer(codes, zeros, scales, bits): the tensors of a layer; change(tensors): what to do before they are saved
    sizes: {argument of LlamaConfig: value}; config: of the quantization_config
    """
    generator = torch.Generator().manual_seed(seed)
    shape = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS} | dict(sizes)
    llama = LlamaConfig(
        **shape,
        num_hidden_layers=layers,
        vocab_size=VOCAB,
        num_key_value_heads=KV_HEADS,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    tensors = LlamaForCausalLM(llama).half().state_dict()
    for name in [n for n in tensors if n.endswith("_proj.weight") or (head and n == "lm_head.weight")]:
        owner, (n, k) = name.removesuffix(".weight"), tensors.pop(name).shape
        b, g = (by_layer or {}).get(owner.split(".")[-1], (bits, size))
        groups = k // (k if g == -1 else g)
        values = torch.randint(2**b, (n, k), generator=generator)
        zero = torch.randint(2**b, (groups, n), generator=generator)
        zero[:, ::7] = 0
        zero = torch.full_like(zero, 2 ** (b - 1)) if zeros == "middle" else zero
        sign = torch.randint(2, (groups, n), generator=generator) * 2 - 1
        scales = ((torch.rand(groups, n, generator=generator) + 0.5) * sign / (4 * 2**b)).half()
        extra = {"order": torch.randperm(k, generator=generator) // (k // groups)} if order else {}
        tensors |= {f"{owner}.{part}": t for part, t in layer(values, zero, scales, b, **extra).items()}
    if change is not None:
        change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": order, "sym": False} | config
    content = llama.to_dict() | {"dtype": "float16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def write_awq(folder, **options):
    """As write_gptq, in AWQ's layout."""
    return write_gptq(folder, **{"layer": awq_layer, "quant_method": "awq", "version": "gemm", **options})


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def step(model, lr):
    optimizer = qzo.QZO(model, lr=lr, directions=2)
    optimizer.step(lambda: qzo.losses(model, {"input_ids": IDS, "labels": IDS}, 4))


def load(path):
    return qzo.from_pretrained(path, device="cpu")


# --------------------------------------------------------------------------------------- changes that spoil one


def drop(part):
    return lambda tensors: tensors.pop(f"{LAYER}.{part}")


def put(part, make):
    return lambda tensors: tensors.update({f"{LAYER}.{part}": make(tensors[f"{LAYER}.{part}"])})


def say(folder, changes):
    """Change what the config says of the weights."""
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(content))


def first(value):
    """A change of the first entry."""

    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change
