"""What the compressed-tensors library makes of the folders that qzo writes, and qzo of the library's.

By hand, where the library is installed:  python -m tests.interop.compressed_tensors
For each case: the bytes that the library packs, and the weights or logits that it unpacks, against qzo's own.
"""

import json
import tempfile
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import qzo
from qzo.checkpoints.formats import compressed_tensors as ours
from tests.support.checkpoints import pack_stream, quantized, relative_error, scale_randomly
from tests.support.tiny import save_checkpoint

CASES = [(bits, size, symmetric) for bits in (2, 4, 8) for size in (32, -1) for symmetric in (True, False)]


def loaded_by_the_library(folder):
    """name -> weight as transformers gets it from the library, unpacked."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    return {name.removesuffix(".weight"): tensor for name, tensor in model.state_dict().items()}


def compare(folder):
    """How many Linears of a folder have the library's weights up to one rounding to float16."""
    theirs, mine = loaded_by_the_library(folder), quantized(qzo.from_pretrained(folder, device="cpu"))
    same = [torch.equal(theirs[name].half(), layer.dequantize().half()) for name, layer in mine.items()]
    return f"{sum(same)} of {len(same)} layers agree"


def written(root, bits, size, symmetric):
    """A folder that qzo writes from a float model."""
    save_checkpoint(root / "float")
    model = qzo.from_pretrained(root / "float", device="cpu", bits=bits, group_size=size, symmetric=symmetric)
    scale_randomly(model)
    qzo.save_pretrained(model, root / "out")
    return root / "out"


def mixed(root):
    """A folder that qzo writes with layers of several bits and group sizes."""
    save_checkpoint(root / "float", hidden=128)
    model = qzo.from_pretrained(root / "float", device="cpu", group_size=64)
    for name, kind in (("q_proj", (4, 32)), ("down_proj", (8, -1)), ("up_proj", (2, 64))):
        for layer in [layer for layer in quantized(model) if layer.endswith(name)]:
            parent, _, child = layer.rpartition(".")
            new = qzo.QZOLinear.from_linear(torch.nn.Linear(128, 128, bias=False), *kind)
            setattr(model.get_submodule(parent), child, new)
    qzo.save_pretrained(model, root / "out")
    return root / "out"


def their_bytes(bits, symmetric):
    """Whether the library packs a matrix into the bytes that the tests' own packer gives, and qzo reads them."""
    generator = torch.Generator().manual_seed(bits)
    codes, zeros = (torch.randint(2**bits, shape, generator=generator) for shape in ((48, 96), (48, 3)))
    scale = torch.rand(48, 3, generator=generator) + 0.5
    centre = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    weight = (codes - centre.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": (centre - 2 ** (bits - 1)).to(torch.int8)}
    packed = PackedQuantizationCompressor.compress(state, scheme)
    read = ours._packed(packed, {"bits": bits, "group_size": 32, "symmetric": symmetric})
    same = torch.equal(packed["weight_packed"], pack_stream(codes, bits))
    if not symmetric:
        same &= torch.equal(packed["weight_zero_point"], pack_stream(zeros.T, bits).T)
    weights = bool((read.dequantize() == weight).all())
    return f"bytes {'agree' if same else 'DIFFER'}, weights {'agree' if weights else 'DIFFER'}"


def quantization_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def compare_logits(folder):
    """Relative error of qzo's logits against those of the model that the library unpacks at the first forward.

    transformers unpacks all dense layers by one config group with dequantize=True, so several need this way.
    """
    ids = torch.arange(20).view(1, 20)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return relative_error(qzo.from_pretrained(folder, device="cpu")(ids).logits, theirs(ids).logits)


def main():
    print(f"compressed-tensors {compressed_tensors.__version__}")
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            print(f"packed by the library, {bits} bits, symmetric {symmetric}: {their_bytes(bits, symmetric)}")
    for case in CASES:
        with tempfile.TemporaryDirectory() as root:
            folder = written(Path(root), *case)
            QuantizationConfig.model_validate(quantization_of(folder))
            print("written by qzo, {} bits, group {}, symmetric {}:".format(*case), compare(folder))
    with tempfile.TemporaryDirectory() as root:
        print("written by qzo, several groups: logits differ by", compare_logits(mixed(Path(root))))


if __name__ == "__main__":
    main()
