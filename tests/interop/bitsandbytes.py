"""Whether bitsandbytes, through transformers, loads what qzo saves, and qzo reads what bitsandbytes makes.

By hand, where the library is installed:  python -m tests.interop.bitsandbytes
Seen to pass with bitsandbytes 0.50.2, transformers 5.24.0, accelerate 1.15.0 and torch 2.13.0, on a CPU.

Each folder is read by both; qzo's model is trained one step and saved, and the library reads that too. A
weight is equal if what the library's dequantize_4bit gives, in the dtype that the layer's quant_state names,
is that of qzo's model rounded once to that dtype.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qzo
from qzo.cli.main import main as command
from tests.support import tiny
from tests.support.checkpoints import quantized, relative_error

FIXTURE = Path(__file__).parent.parent / "fixtures/bnb-nf4"
MADE = {  # name: (table, double quantization, storage, dtype of the floats)
    "nf4": ("nf4", False, torch.uint8, torch.float32),
    "fp4": ("fp4", False, torch.uint8, torch.float32),
    "nf4, double": ("nf4", True, torch.uint8, torch.bfloat16),
    "fp4, double": ("fp4", True, torch.uint8, torch.float16),
    "nf4, bfloat16 storage": ("nf4", False, torch.bfloat16, torch.bfloat16),
}
QUANTIZED: dict[str, tuple[Any, ...]] = {  # name: (table, group size[, width]) for qzo quantize
    "nf4": ("nf4", 64),
    "fp4": ("fp4", 64),
    "nf4, groups of 32": ("nf4", 32),
    "nf4, groups of 128": ("nf4", 128),
    "nf4, whole rows": ("nf4", -1),
    "nf4, whole rows of 192": ("nf4", -1, 192),
}
LOGITS = 2e-5  # both compute in float32
IDS = torch.arange(24).view(2, 12)


def made(folder, kind, double, storage, dtype):
    """A folder that the library quantizes and transformers saves."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_quant_storage=storage
    )
    tiny.save_checkpoint(folder / "float", hidden=128)
    AutoModelForCausalLM.from_pretrained(folder / "float", dtype=dtype, quantization_config=config).save_pretrained(
        folder / "made"
    )
    return folder / "made"


def by_the_command(folder, table, size, hidden=128):
    """A folder that `qzo quantize` writes."""
    tiny.save_checkpoint(folder / "float", hidden)
    status = command(
        [
            "quantize",
            str(folder / "float"),
            "--output-dir",
            str(folder / "quantized"),
            "--table",
            table,
            "--group-size",
            str(size),
            "--json",
        ]
    )
    if status:
        raise SystemExit(f"qzo quantize --table {table} --group-size {size} ended with {status}")
    return folder / "quantized"


def in_float32(folder):
    """The library's model, computing in float32: transformers leaves dense tensors in the file's dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    for parameter in model.parameters():
        if not isinstance(parameter, bitsandbytes.nn.Params4bit):
            parameter.data = parameter.data.float()
    return model.train()  # in eval mode a CPU with AVX512-BF16 computes in bfloat16


def check(folder, ours):
    """(error of the library's logits, how many weights are equal, of how many) against a model of qzo's."""
    theirs, equal = in_float32(folder), 0
    for name, layer in quantized(ours).items():
        weight = theirs.get_submodule(name).weight
        unpacked = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        equal += torch.equal(unpacked, layer.dequantize().to(weight.quant_state.dtype))
    with torch.no_grad():
        return relative_error(theirs(IDS).logits, ours(IDS).logits), equal, len(quantized(ours))


def step(model):
    """Train one step; how many layers have scales that all moved."""
    before, optimizer = qzo.scales(model), qzo.QZO(model, lr=0.1)
    optimizer.step(lambda: qzo.losses(model, {"input_ids": IDS, "labels": IDS}, 2))
    return sum(bool((scales != before[name]).all()) for name, scales in qzo.scales(model).items())


def main():
    print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
    warnings.simplefilter("ignore")
    failures = 0
    with tempfile.TemporaryDirectory() as root:
        sources = {"the fixture": FIXTURE}
        for name, case in MADE.items():
            sources[f"by bitsandbytes: {name}"] = made(Path(root) / f"made {name}", *case)
        for name, (table, size, *hidden) in QUANTIZED.items():
            sources[f"by qzo quantize: {name}"] = by_the_command(Path(root) / f"quantized {name}", table, size, *hidden)
        for number, (name, source) in enumerate(sources.items()):
            model, out = qzo.from_pretrained(source, device="cpu"), Path(root) / str(number)
            read, moved = check(source, model), step(model)
            qzo.save_pretrained(model, out)
            saved = check(out, model)
            failures += any(error > LOGITS or equal < count for error, equal, count in (read, saved))
            failures += moved < saved[2]
            print(
                f"{name:40} as it is: logits {read[0]:.1e}, {read[1]} of {read[2]} weights equal; saved: "
                f"{moved} layers moved, logits {saved[0]:.1e}, {saved[1]} of {saved[2]} weights equal"
            )
    return failures


if __name__ == "__main__":
    raise SystemExit(main() > 0)
