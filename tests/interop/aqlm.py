"""Whether the aqlm library, through transformers, loads what qzo saves, with the weights that qzo has.

By hand, where the library is installed:  python -m tests.interop.aqlm
Seen to pass with aqlm 1.1.7 (its cpu extra), transformers 5.24.0, accelerate 1.15.0, torch 2.13.0, on a CPU.

Each folder is read by both; qzo's model is trained one step, its codebooks too in half of the cases, and
saved, and the library reads that. Its weights are what its _dequantize_weight makes of the tensors it loaded.
"""

import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import numba
import torch
from aqlm.inference import QuantizedLinear
from aqlm.utils import _dequantize_weight, unpack_int_data
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qzo
from tests.support.aqlm_checkpoints import folder_of
from tests.support.checkpoints import quantized, relative_error

FIXTURES = Path(__file__).parent.parent / "fixtures"
OWN = ["aqlm-1x12-g8", "aqlm-2x8-g8"]
MADE = {"one codebook of 16 bits": (1, 16), "one of 8 bits": (1, 8), "three of 8 bits": (3, 8), "two of 6 bits": (2, 6)}
WEIGHTS, LOGITS = 4e-7, 2e-5  # float32 sums of a few entries in any order; float32 products
ROUNDED = 2 * 2.0**-11  # scales and codebooks, each once, to a file's float16
IDS = torch.arange(1, 25).view(2, 12)


def in_float32(folder):
    """The library's model in float32, the only dtype its CPU kernels take."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def weights_of(model):
    """name -> float32 [N, K]. Before a forward: the first turns codes of 256 entries around."""
    return {
        name: _dequantize_weight(
            unpack_int_data(layer.codes.data, layer.nbits_per_codebook), layer.codebooks.data, layer.scales.data
        )
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
    }


def worst(found, ours):
    """The largest relative error of the library's weights against a model of qzo's with the same layers."""
    mine = quantized(ours)
    if found.keys() != mine.keys():
        raise SystemExit(f"the library has the layers {sorted(found)}, qzo {sorted(mine)}")
    return max(relative_error(weight, mine[name].dequantize()) for name, weight in found.items())


def logits_differ(theirs, ours):
    with torch.no_grad():
        return relative_error(theirs(IDS).logits, ours(IDS).logits)


def numbers(model):
    """name -> what trains: scales, and codebooks where they do."""
    return qzo.scales(model) | {f"{name}.codebooks": books for name, books in qzo.codebooks(model).items()}


def step(model):
    """Train one step; whether every number that trains has moved, but zeros, which stay."""
    before, optimizer = numbers(model), qzo.QZO(model, lr=0.1)
    optimizer.step(lambda: qzo.losses(model, {"input_ids": IDS, "labels": IDS}, 2))
    return all(bool((new != before[name])[before[name] != 0].all()) for name, new in numbers(model).items())


def expected(folder):
    """Error of the library's own forward of a fixture against the logits that lie beside it."""
    want = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        return relative_error(in_float32(folder)(want["input_ids"]).logits, want["logits"])


def check(source, out, codebooks):
    """Whether the library agrees on what is read, on what is saved after a step, and with the model that was
    trained; and whether the step moved everything."""
    model, theirs = qzo.from_pretrained(source, device="cpu"), in_float32(source)
    found = {"read": worst(weights_of(theirs), model) < WEIGHTS and logits_differ(theirs, model) < LOGITS}
    if codebooks:
        qzo.train_codebooks_(model)
    found["moved"] = step(model)
    qzo.save_pretrained(model, out)
    again, theirs = qzo.from_pretrained(out, device="cpu"), in_float32(out)
    weights = weights_of(theirs)
    found["saved and loaded"] = worst(weights, again) < WEIGHTS and logits_differ(theirs, again) < LOGITS
    found["as trained"] = worst(weights, model) < ROUNDED
    return found


def main():
    print(f"aqlm {version('aqlm')}, torch {torch.__version__}")
    warnings.simplefilter("ignore")
    numba.set_num_threads(1)  # the threads of its kernel add to one sum at once
    failures = 0
    for name in OWN:
        error = expected(FIXTURES / name)
        failures += error > LOGITS
        print(f"{name}: the library's logits are off by {error:.1e}")
    with tempfile.TemporaryDirectory() as root:
        sources = {name: FIXTURES / name for name in OWN}
        for name, case in MADE.items():
            sources[name], _ = folder_of(Path(root) / name, *case)
        for name, source in sources.items():
            for codebooks in (False, True):
                found = check(source, Path(root) / f"{name}, {codebooks}", codebooks)
                failures += not all(found.values())
                words = ", ".join(f"{what} {'yes' if good else 'NO'}" for what, good in found.items())
                print(f"{name}, {'scales and codebooks' if codebooks else 'scales'}: {words}")
    return failures


if __name__ == "__main__":
    raise SystemExit(main() > 0)
