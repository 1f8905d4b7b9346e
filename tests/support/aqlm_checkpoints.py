"""Folders and layers in AQLM's form, made here, and what its tests do with them."""

import json

import torch
from safetensors.torch import load_file, save_file

import qzo
from tests.support import paths, tiny

FIXTURES = {bits: paths.FIXTURES / f"aqlm-{books}x{bits}-g8" for books, bits in ((1, 12), (2, 8))}
LAYER = "model.layers.0.mlp.down_proj"
BATCH = {"input_ids": torch.arange(1, 25).view(2, 12), "labels": torch.arange(1, 25).view(2, 12)}


def decoded(tensors, layer):
    """float64 [N, K] of a layer, vector by vector."""
    codes, books, scales = (tensors[f"{layer}.{part}"] for part in ("codes", "codebooks", "scales"))
    index = codes.long() % books.shape[1]
    vectors = sum(books.double()[c, :, 0][index[:, :, c]] for c in range(codes.shape[2]))
    return vectors.flatten(1) * scales.double().view(-1, 1)


def vector_tensors(weight, books, bits, generator):
    """The tensors of a layer in AQLM's layout: random codes for vectors of the size of a float weight's [N, K]."""
    n, k = weight.shape
    codes = torch.randint(0, 1 << bits, (n, k // 8, books), generator=generator)
    signed = torch.where(codes >= 1 << bits - 1, codes - (1 << bits), codes)
    codebooks = torch.randn(books, 1 << bits, 1, 8, generator=generator) / books**0.5
    return {
        "codes": signed.to(torch.int8 if bits <= 8 else torch.int16),
        "codebooks": codebooks.half(),
        "scales": (weight.std(1) * (0.5 + torch.rand(n, generator=generator))).half().view(n, 1, 1, 1),
    }


def folder_of(path, books=2, bits=8):
    """A folder of a tiny Llama; returns (path, its tensors)."""
    tiny.save_checkpoint(path)
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(path / "model.safetensors")
    for name in sorted(name for name in tensors if name.endswith("_proj.weight")):
        made = vector_tensors(tensors.pop(name).float(), books, bits, generator)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in made.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    settle(path, num_codebooks=books, nbits_per_codebook=bits)
    return path, tensors


def settle(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "aqlm",
        "in_group_size": 8,
        "out_group_size": 1,
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
        "linear_weights_not_to_quantize": ["lm_head"],
    } | changes
    (path / "config.json").write_text(json.dumps(config))


def train(model, lr, steps=1, **options):
    optimizer = qzo.QZO(model, lr=lr, **options)
    for _ in range(steps):
        optimizer.step(lambda: qzo.losses(model, BATCH, 2 * optimizer.param_groups[0]["directions"]))
    optimizer.close()
    return model


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def changed(before, after):
    before, after = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def a_layer(books=2, bits=8, n=24, k=128):
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (n, k // 8, books), generator=random)
    packed = qzo.PackedWeight.from_vectors(
        codes, torch.rand(n, generator=random) - 0.5, torch.randn(books, 1 << bits, 8, generator=random)
    )
    return qzo.QZOLinear.from_packed(packed)
