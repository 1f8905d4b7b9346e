"""Whether GPTQModel loads what qzo saves and exports, as the weights and logits that qzo has.

By hand, where the library is installed:  python -m tests.interop.gptqmodel
"""

import functools
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import gptqmodel
import torch
from gptqmodel import BACKEND, GPTQModel

import qzo
from tests.support.checkpoints import quantized, relative_error, scale_randomly
from tests.support.gptq_checkpoints import gptq_layer, write_awq, write_gptq

FIXTURES = Path(__file__).parent.parent / "fixtures"
OWN = [
    "gptqmodel-gptq-sym-g128",
    "gptqmodel-gptq-asym-g32-v2",
    "gptqmodel-gptq-sym-g64-desc",
    "gptqmodel-gptq-3bit-sym-g64",
    "autoround-awq-zp-g128",
]
EXPORTED = [
    ("autoround-ar-sym-g128", "gptq"),
    ("autoround-awq-zp-g128", "gptq"),
    ("ct-w4a16-sym-g64-bias-tied", "gptq"),
    ("ct-w4a16-asym-g128-rtn", "gptq"),
    ("gptqmodel-gptq-asym-g32-v2", "awq"),
    ("gptqmodel-gptq-sym-g128", "awq"),
    ("ct-w4a16-sym-g128-gptq", "awq"),
]
MADE = {  # name: (how it is made, the format it is exported to or None)
    "8 bits, act-order": (
        functools.partial(
            write_gptq, bits=8, order=True, checkpoint_format="gptq_v2", layer=functools.partial(gptq_layer, version=2)
        ),
        None,
    ),
    "2 bits in one layer": (
        functools.partial(
            write_gptq, by_layer={"up_proj": (2, 32)}, zeros="middle", sym=True, dynamic={".*up_proj": {"bits": 2}}
        ),
        None,
    ),
    "quantized head": (functools.partial(write_awq, head=True), "gptq"),
    "whole rows, gptq": (functools.partial(write_awq, size=-1), "gptq"),
    "whole rows, awq": (functools.partial(write_awq, size=-1), "awq"),
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
LOGITS_FP16 = 6e-3  # its kernels run in float16
IDS = torch.arange(24).view(2, 12)


def weight_of(module):
    """float16 [N, K] of one of its layers: rounded once, from float32 scales or by the product with an identity."""
    if not hasattr(module, "dequantize_weight"):
        return module(torch.eye(module.in_features).half()).T
    half, module.scales = module.scales, module.scales.float()
    found = module.dequantize_weight().half().T
    module.scales = half
    return found


def check(folder, model, backend):
    """(error of its logits, how many of its weights are qzo's in float16, of how many, their class)."""
    for name in TOKENIZER:  # it loads no folder without one
        shutil.copy(FIXTURES / OWN[0] / name, folder)
    theirs = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16)
    modules, equal = dict(theirs.model.named_modules()), 0
    for name, layer in quantized(model).items():
        equal += torch.equal(weight_of(modules[name]), layer.dequantize().half())
    with torch.no_grad():
        error = relative_error(theirs.model(IDS).logits.float(), model(IDS).logits)
    return error, equal, len(quantized(model)), type(modules[name]).__name__


def main():
    print(f"gptqmodel {gptqmodel.__version__}, torch {torch.__version__}")
    warnings.simplefilter("ignore")
    torch.compiler.set_stance("force_eager")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        sources: list[tuple[str, Path, str | None]] = [(name, FIXTURES / name, None) for name in OWN]
        sources += [(name, FIXTURES / name, form) for name, form in EXPORTED]
        sources += [(name, make(Path(folder) / f"made {name}"), form) for name, (make, form) in MADE.items()]
        for name, source, form in sources:
            model, out = qzo.from_pretrained(source, device="cpu"), Path(folder) / f"{name} {form}"
            scale_randomly(model)
            if form is None:
                qzo.save_pretrained(model, out)
            else:
                qzo.export(model, out, form)
            own = json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"]
            backend = BACKEND.AWQ_TORCH if own == "awq" else BACKEND.GPTQ_TORCH
            error, equal, count, kind = check(out, qzo.from_pretrained(out, device="cpu"), backend)
            failures += error > LOGITS_FP16 or equal < count
            print(
                f"{'saved' if form is None else 'to ' + form:8} {name:30} logits {error:.1e}, {equal} of {count} "
                f"weights equal, {kind}"
            )
    return failures


if __name__ == "__main__":
    raise SystemExit(main() > 0)
