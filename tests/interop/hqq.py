"""Whether the hqq library's own layers are read as it unpacks them, and it loads what qzo saves.

By hand, where the library is installed:  python -m tests.interop.hqq
"""

import tempfile
import zipfile
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

from qzo.checkpoints.formats import hqq

CASES = [
    (bits, size, dtype, as_float)
    for bits in (8, 4, 3, 2)
    for size in (32, 64)
    for dtype in (torch.float32, torch.float16)
    for as_float in (False, True)
]


def layer(bits, size, dtype, as_float):
    torch.manual_seed(bits)
    config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=1, view_as_float=as_float)
    made = HQQLinear(torch.nn.Linear(128, 96), config, compute_dtype=dtype, device="cpu")
    made.encoded_state_dict = False  # as save_quantized sets it
    return made


def read(folder):
    return {name: value for name, value, _ in hqq.weights(folder, None, torch.float32)}["a.weight"]


def unpacked(theirs):
    """The library's weight in float32: its own codes, scale and zero, multiplied without rounding to 16 bits."""
    state = {key: value.float() if key in ("scale", "zero") else value for key, value in theirs.state_dict().items()}
    state["compute_dtype"] = torch.float32
    again = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    again.load_state_dict(state)
    return again.dequantize().float()


def check(case, root):
    """A word for each of: what is read, what comes back unchanged, what the library makes of new scales."""
    theirs, source, out = layer(*case), root / "in", root / "out"
    source.mkdir()
    out.mkdir()
    torch.save({"a": theirs.state_dict()}, source / hqq.FILE)
    packed = read(source)
    same = torch.equal(packed.dequantize(), unpacked(theirs))
    hqq.save(source, out, lambda name: packed)
    unchanged = (out / hqq.FILE).read_bytes() == (source / hqq.FILE).read_bytes()
    packed.scales *= torch.rand(packed.scales.shape) * 0.4 + 0.8
    hqq.save(source, out, lambda name: packed)
    loaded = HQQLinear(None, None, compute_dtype=case[2], device="cpu")
    loaded.encoded_state_dict = False
    loaded.load_state_dict(torch.load(out / hqq.FILE, weights_only=True)["a"])
    whole = zipfile.ZipFile(out / hqq.FILE).testzip() is None
    new = torch.equal(read(out).dequantize(), unpacked(loaded))
    moved = not torch.equal(read(out).scales, read(source).scales)
    return {"read": same, "unchanged": unchanged, "archive": whole, "saved and loaded": new and moved}


def main():
    for case in CASES:
        with tempfile.TemporaryDirectory() as root:
            found = check(case, Path(root))
        words = ", ".join(f"{name} {'agrees' if good else 'DIFFERS'}" for name, good in found.items())
        print("{} bits, group {}, {}, view_as_float {}:".format(*case), words)


if __name__ == "__main__":
    main()
